"""A V1 node class as the execution core reads it, and how a widget's literal becomes the node's value."""

from __future__ import annotations

import inspect
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from .protocols import Nodes

WRAPPER = "__value__"  # {"__value__": [...]} is a literal list, which would otherwise read as a link


@dataclass(frozen=True)
class InputSpec:
    """One declared input: its type is a name, a union such as "INT,FLOAT", or the list of a combo's choices."""

    name: str
    type: str | list[Any]
    options: Mapping[str, Any]
    required: bool
    config: Any  # as INPUT_TYPES gave it, for error reports

    @property
    def lazy(self) -> bool:
        return bool(self.options.get("lazy"))

    @property
    def raw_link(self) -> bool:
        """Whether the node wants the link itself instead of the value at its other end."""
        return bool(self.options.get("rawLink"))

    @property
    def choices(self) -> list[Any] | None:
        """What a combo offers; None for other widgets and for combos filled by the browser."""
        offered = self.options.get("options") if self.type == "COMBO" else self.type
        return list(offered) if isinstance(offered, (list, tuple)) else None

    @property
    def several(self) -> bool:
        """Whether a combo's value is a list of choices."""
        return bool(self.options.get("multi_select") or self.options.get("multiselect"))


class NodeSpec:
    """What a node class declares. Making one calls INPUT_TYPES, which may raise whatever the node's author let it."""

    def __init__(self, node_class: type) -> None:
        self.node_class = node_class
        declared = node_class.INPUT_TYPES()
        self.hidden: dict[str, str] = {name: _hidden_kind(kind) for name, kind in declared.get("hidden", {}).items()}
        self.inputs: dict[str, InputSpec] = {
            name: _input_spec(name, config, required=group == "required")
            for group in ("required", "optional")
            for name, config in declared.get(group, {}).items()
        }

    @property
    def returns(self) -> Sequence[Any]:
        return getattr(self.node_class, "RETURN_TYPES", ())

    @property
    def list_outputs(self) -> Sequence[bool]:
        return getattr(self.node_class, "OUTPUT_IS_LIST", ())

    @property
    def wants_lists(self) -> bool:
        return bool(getattr(self.node_class, "INPUT_IS_LIST", False))

    @property
    def is_output(self) -> bool:
        return getattr(self.node_class, "OUTPUT_NODE", False) is True

    @property
    def keyed_by_id(self) -> bool:
        """Whether two equal nodes may give different results, so that one must not stand in for the other."""
        return bool(getattr(self.node_class, "NOT_IDEMPOTENT", False)) or "UNIQUE_ID" in self.hidden.values()

    @property
    def function(self) -> str:
        """The name of the method that does the work."""
        return self.node_class.FUNCTION

    @cached_property
    def is_async(self) -> bool:
        return inspect.iscoroutinefunction(getattr(self.node_class, self.function, None))

    def is_lazy(self, name: str) -> bool:
        """Whether an input waits until the node asks for it; a node that never asks gets it at once."""
        declared = self.inputs.get(name)
        return declared is not None and declared.lazy and hasattr(self.node_class, "check_lazy_status")

    def is_raw_link(self, name: str) -> bool:
        declared = self.inputs.get(name)
        return declared is not None and declared.raw_link


class Specs:
    """The specs of the classes that one prompt uses, each read once."""

    def __init__(self, nodes: Nodes) -> None:
        self.nodes = nodes
        self._known: dict[str, NodeSpec] = {}

    def __getitem__(self, class_type: str) -> NodeSpec:
        """The spec of a node id; KeyError when no pack offers it."""
        if class_type not in self._known:
            self._known[class_type] = NodeSpec(self.nodes[class_type])
        return self._known[class_type]

    def __contains__(self, class_type: object) -> bool:
        return class_type in self.nodes


def _hidden_kind(kind: Any) -> str:
    return kind[0] if isinstance(kind, (list, tuple)) else kind


def _input_spec(name: str, config: Any, required: bool) -> InputSpec:
    kind, *rest = config if isinstance(config, (list, tuple)) else (config,)
    options = rest[0] if rest and isinstance(rest[0], Mapping) else {}
    return InputSpec(name, kind if isinstance(kind, str) else list(kind), options, required, config)


_repr = reprlib.Repr()
_repr.maxstring = _repr.maxlong = _repr.maxother = 80


def short(value: Any) -> str:
    """A value for a message, in which an absurdly long or deep one must not fill the screen."""
    return _repr.repr(value)


def unwrap(value: Any) -> Any:
    """The literal itself, without the wrapper that lists travel in."""
    return value[WRAPPER] if isinstance(value, dict) and set(value) == {WRAPPER} else value


def coerce(value: Any, kind: str | list[Any]) -> Any:
    """A literal as the value that a widget of this type holds, such as "5" as 5; ValueError says why it cannot be."""
    convert = _CONVERSIONS.get(str(kind)) if isinstance(kind, str) else None
    return convert(value) if convert else value


def _integer(value: Any) -> int:
    if isinstance(value, int) or (isinstance(value, str) and value.strip().lstrip("+-").isdecimal()):
        return int(value)  # directly, so that a large seed keeps every digit
    number = _decimal(value, "a whole number")
    if number != int(number):
        raise ValueError(f"{short(value)} is not a whole number")
    return int(number)


def _decimal(value: Any, wanted: str = "a number") -> float:
    if not isinstance(value, (int, float, str)):
        raise ValueError(f"{short(value)} is not {wanted}")
    try:
        number = float(value)
    except (ValueError, OverflowError):
        raise ValueError(f"{short(value)} is not {wanted}") from None
    if not math.isfinite(number):
        raise ValueError(f"{short(value)} is not a finite number")
    return number


def _text(value: Any) -> str:
    if isinstance(value, (str, int, float)):
        return str(value)
    raise ValueError(f"{short(value)} is not text")


def _truth(value: Any) -> bool:
    if isinstance(value, (bool, int, float)):
        return bool(value)
    words = {"true": True, "false": False}
    if isinstance(value, str) and value.strip().lower() in words:
        return words[value.strip().lower()]
    raise ValueError(f"{short(value)} is neither true nor false")


_CONVERSIONS: dict[str, Callable[[Any], Any]] = {"INT": _integer, "FLOAT": _decimal, "STRING": _text, "BOOLEAN": _truth}
