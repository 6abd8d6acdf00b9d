"""Why a prompt did not finish, as plain data: an exception would keep the failed node's values alive."""

from __future__ import annotations

import math
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .embedded import Interrupted, is_out_of_memory

LONGEST = 1000  # characters of a text that an error report repeats


@dataclass(frozen=True)
class Failure:
    """What ended a prompt, at which node, and the report that goes into `execution_error`."""

    node_id: str
    message: str
    interrupted: bool
    out_of_memory: bool
    report: dict[str, Any]


def explain(
    node_id: str, node_type: str, error: BaseException, inputs: Mapping[str, Sequence[Any]], finished: Sequence[str]
) -> Failure:
    """Describe what a node raised when it was called with these inputs; `finished` are the nodes that have results."""
    full = is_out_of_memory(error)
    message = f"{_message(error)} ({_relief(node_id, node_type)})" if full else _message(error)
    return Failure(
        node_id,
        message,
        isinstance(error, (Interrupted, KeyboardInterrupt)),
        full,
        {
            "exception_message": message,
            "exception_type": _type_name(error),
            "traceback": traceback.format_tb(error.__traceback__),
            "current_inputs": {name: [_describe(value) for value in values] for name, values in inputs.items()},
            "current_outputs": list(finished),
        },
    )


def _message(error: BaseException) -> str:
    """The exception's own words; a bare word, as KeyError's, says nothing without the kind of error."""
    text = str(error).strip()
    return text if " " in text else f"{type(error).__name__}: {text or 'no further explanation'}"


def _relief(node_id: str, node_type: str) -> str:
    return (
        f"node {node_id}, {node_type}, ran out of memory; what was cached has been freed now: run it again, "
        "and if that does not help use a smaller size, fewer images at once or a quantised model"
    )


def _type_name(error: BaseException) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _describe(value: Any) -> Any:
    """A value for JSON: plain ones as they are, of others only what they are."""
    if isinstance(value, str):
        return value if len(value) <= LONGEST else f"{value[:LONGEST]}... ({len(value)} characters)"
    if value is None or isinstance(value, (bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, float):
        return str(value)
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__}{list(shape) if isinstance(shape, tuple) else ''}"
