"""Calling a node over lists of inputs, and putting what the calls returned together again."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from .blocker import is_blocker
from .spec import NodeSpec

Values = Mapping[str, Sequence[Any]]  # every input is a list of values, most often of one
Outputs = tuple[tuple[Any, ...], ...]  # for each slot the values it gave


async def call_each(
    function: Callable[..., Any],
    inputs: Values,
    *,
    whole: bool,
    before: Callable[[int], None] = lambda index: None,
    blocked: Callable[[Any], Any] = lambda blocker: blocker,
) -> list[Any]:
    """Call a function once for each element of its inputs, shorter lists repeating their last; `whole`: once with all.

    `before` is told the index of each call. Where an input blocks there is no call, and the result is what `blocked`
    makes of the blocker. Async functions are awaited together, so that their calls overlap.
    """
    results: list[Any] = []
    for index, arguments in enumerate([_copies(inputs)] if whole else _slices(inputs)):
        before(index)
        blocker = _find_blocker(arguments, whole)
        result = function(**arguments) if blocker is None else blocked(blocker)
        results.append(asyncio.ensure_future(result) if inspect.isawaitable(result) else result)
    pending = [result for result in results if isinstance(result, asyncio.Future)]
    await asyncio.gather(*pending)
    return [result.result() if isinstance(result, asyncio.Future) else result for result in results]


def _copies(inputs: Values) -> dict[str, list[Any]]:
    """The lists themselves are shared between nodes; the node gets its own."""
    return {name: list(values) for name, values in inputs.items()}


def _slices(inputs: Values) -> Iterator[dict[str, Any]]:
    """The arguments of each call; none at all when an input is an empty list, one when there are no inputs."""
    lengths = [len(values) for values in inputs.values()]
    count = 0 if 0 in lengths else max(lengths, default=1)
    for index in range(count):
        yield {name: values[min(index, len(values) - 1)] for name, values in inputs.items()}


def _find_blocker(arguments: Mapping[str, Any], whole: bool) -> Any:
    values = (value for listed in arguments.values() for value in listed) if whole else arguments.values()
    return next(filter(is_blocker, values), None)


@dataclass(frozen=True)
class Returned:
    """What one call of a node's function returned."""

    values: tuple[Any, ...]
    ui: Mapping[str, Any] = field(default_factory=dict)
    expand: Mapping[str, Any] | None = None


def read_return(returned: Any, spec: NodeSpec) -> Returned:
    """Read a node function's return value: a tuple, a dict of ui, result and expand, or a blocker; else TypeError."""
    if isinstance(returned, Mapping):
        ui, expand = returned.get("ui") or {}, returned.get("expand")
        return Returned(_read_values(returned.get("result", ()), spec), ui, expand)
    return Returned(_read_values(returned, spec))


def _read_values(values: Any, spec: NodeSpec) -> tuple[Any, ...]:
    if is_blocker(values):
        return (values,) * len(spec.returns)
    if values is None and not spec.returns:
        return ()
    if isinstance(values, (tuple, list)):
        return tuple(values)
    raise TypeError(
        f"{spec.node_class.__name__}.{spec.function} returned {type(values).__name__}; "
        "a node function returns a tuple with one value for each output"
    )


def slot_values(value: Any, slot: int, spec: NodeSpec) -> tuple[Any, ...]:
    """What one call gave for a slot, as a list: the value, or what the slot's own list holds."""
    return tuple(value) if _is_list(spec, slot) and not is_blocker(value) else (value,)


def _is_list(spec: NodeSpec, slot: int) -> bool:
    return slot < len(spec.list_outputs) and bool(spec.list_outputs[slot])


def join(calls: Sequence[Outputs], slots: int) -> Outputs:
    """The outputs of all calls, slot by slot one after another; without any call `slots` empty lists."""
    count = max((len(outputs) for outputs in calls), default=slots)
    return tuple(
        tuple(value for outputs in calls if slot < len(outputs) for value in outputs[slot]) for slot in range(count)
    )


def join_ui(calls: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The ui of all calls, key by key one after another."""
    joined: dict[str, list[Any]] = {}
    for ui in calls:
        for key, values in ui.items():
            joined.setdefault(key, []).extend(values if isinstance(values, (list, tuple)) else [values])
    return joined
