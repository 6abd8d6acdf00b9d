"""Where an input's value really comes from: through reroutes, bypassed nodes and the walls of subgraphs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .document import BYPASSED, INPUT_NODE, MUTED, OUTPUT_NODE, PRIMITIVE, REROUTE, Node, fail
from .node_types import Slot
from .subgraphs import Scope


@dataclass(frozen=True)
class Output:
    """The output of an executed node."""

    node: str
    slot: int


@dataclass(frozen=True)
class Given:
    """A value that stands in the widget of a subgraph instance."""

    value: Any


def compatible(one: str, other: str) -> bool:
    """Whether two slot types may be connected: `*` is any, a comma separates alternatives."""
    if "*" in (one, other) or "" in (one, other):
        return True
    return bool(set(one.upper().split(",")) & set(other.upper().split(",")))


def passed_through(slots: Sequence[Slot], output: int, output_type: str, wanted: str) -> Slot | None:
    """The input that a bypassed node hands on for one of its outputs: the one opposite when it fits, else by type.

    `wanted` is the type of the input at the far end: it decides, before the output's own type.
    """

    def fits(slot: Slot) -> bool:
        return compatible(slot.type, wanted) and compatible(slot.type, output_type)

    opposite = slots[output] if output < len(slots) else None
    if wanted == "*":
        return opposite or (slots[0] if slots else None)
    if opposite and fits(opposite):
        return opposite
    same = (slot for slot in slots if slot.type == wanted)
    return next(same, None) or next((slot for slot in slots if fits(slot)), None)


def source_of(scopes: Mapping[str, Scope], scope: Scope, node: Node, slot: Slot) -> Output | Given | None:
    """Follow an input to the node that makes its value, or to the widget that holds it; None when nothing does."""
    place: tuple[str, str] = (node.id, slot.name)
    seen: set[tuple[str, str, str]] = set()
    while True:
        if (scope.prefix, *place) in seen:
            fail(f"The links run in a circle behind the input {slot.name!r} of {node}; take one of them out.")
        seen.add((scope.prefix, *place))
        link = scope.graph.into.get(place)
        if link is None:
            return None
        if link.origin == INPUT_NODE:
            if scope.host is None or scope.parent is None or not 0 <= link.slot < len(scope.graph.inputs):
                return None
            name = scope.graph.inputs[link.slot].name
            if (scope.host.id, name) not in scope.parent.graph.into:
                return Given(scope.values[name]) if name in scope.values else None
            place, scope = (scope.host.id, name), scope.parent
            continue
        origin = scope.graph.nodes.get(link.origin)
        if origin is None or origin.mode == MUTED or link.slot < 0:
            return None
        behind = _behind(scopes, scope, origin, link.slot, slot.type)
        if behind is None or isinstance(behind, Output):
            return behind
        scope, place = behind


def _behind(
    scopes: Mapping[str, Scope], scope: Scope, origin: Node, output: int, wanted: str
) -> Output | tuple[Scope, tuple[str, str]] | None:
    """The next place to look at behind a node's output; the output itself when the node is executed."""
    if origin.type == REROUTE:
        return scope, (origin.id, origin.slots[0].name if origin.slots else "")
    if origin.mode == BYPASSED:
        kinds = origin.kind.outputs if origin.kind else ()
        found = passed_through(origin.slots, output, kinds[output] if output < len(kinds) else "*", wanted)
        return (scope, (origin.id, found.name)) if found else None
    inner = scopes.get(f"{scope.id_of(origin)}:")
    if inner is not None:
        return inner, (OUTPUT_NODE, str(output))
    return None if origin.kind is None or origin.type == PRIMITIVE else Output(scope.id_of(origin), output)
