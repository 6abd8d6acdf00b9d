"""The graph of a prompt: its links, the order in which they are followed, and the nodes that are added as it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from ...flux_runtime.errors import FluxError
from .protocols import Prompt

CYCLES_SHOWN = 8  # an absurd graph has thousands; the first few tell the user enough


class GraphError(FluxError):
    """The graph cannot run as it is wired."""


def is_link(value: Any) -> bool:
    """Whether an input's value is a link, ["node id", slot], rather than a literal."""
    return (
        isinstance(value, list)
        and len(value) == 2
        and isinstance(value[0], str)
        and isinstance(value[1], int)
        and not isinstance(value[1], bool)
    )


def links(node: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """The linked inputs of a node, as (input, source node, slot)."""
    for name, value in node["inputs"].items():
        if is_link(value):
            yield name, value[0], value[1]


def walk(roots: Iterable[str], sources: Callable[[str], Iterable[str]]) -> tuple[list[str], list[list[str]]]:
    """Everything the roots depend on and they themselves, sources first; and the cycles met on the way.

    Each cycle lists its nodes from the one that closes it on. Only the first few are listed whole, of further ones
    just the closing node. Works without recursion, so that a chain may be of any length.
    """
    order: list[str] = []
    cycles: list[list[str]] = []
    done: set[str] = set()
    path: dict[str, Iterator[str]] = {}  # the nodes being followed, each with the sources still to visit
    for root in roots:
        if root not in done:
            path[root] = iter(sources(root))
        while path:
            node, rest = next(reversed(path.items()))
            source = next(rest, None)
            if source is None:
                path.popitem()
                done.add(node)
                order.append(node)
            elif source in path:
                cycles.append(_cycle(path, node, source) if len(cycles) < CYCLES_SHOWN else [node])
            elif source not in done:
                path[source] = iter(sources(source))
    return order, cycles


def _cycle(path: Iterable[str], node: str, source: str) -> list[str]:
    followed = list(path)
    return [node, *followed[followed.index(source) : -1]]


@dataclass(frozen=True)
class Origin:
    """Where a node added during execution belongs: its maker, the node to show it on, and the prompt's own node."""

    parent: str
    display: str
    real: str


class Graph:
    """A prompt and the nodes added to it by expansion.

    Nodes that ask for the hidden input DYNPROMPT get this object; its method names are the ones they know.
    """

    def __init__(self, prompt: Prompt) -> None:
        self._prompt = prompt
        self._added: Prompt = {}
        self._origins: dict[str, Origin] = {}

    def get_original_prompt(self) -> Prompt:
        """The prompt as it was submitted."""
        return self._prompt

    def get_node(self, node_id: str) -> dict[str, Any]:
        """A node of the prompt or an added one."""
        node = self._added.get(node_id) or self._prompt.get(node_id)
        if node is None:
            raise GraphError(f"there is no node {node_id} in this prompt")
        return node

    def has_node(self, node_id: str) -> bool:
        return node_id in self._added or node_id in self._prompt

    def all_node_ids(self) -> set[str]:
        return {*self._prompt, *self._added}

    def get_parent_node_id(self, node_id: str) -> str | None:
        """The node whose expansion made this one; None for the prompt's own nodes."""
        return self._origins[node_id].parent if node_id in self._origins else None

    def get_display_node_id(self, node_id: str) -> str:
        """The node on which the canvas shows what this one does."""
        return self._origins[node_id].display if node_id in self._origins else node_id

    def get_real_node_id(self, node_id: str) -> str:
        """The node of the submitted prompt from which this one descends."""
        return self._origins[node_id].real if node_id in self._origins else node_id

    def add(self, node_id: str, node: dict[str, Any], parent: str) -> None:
        """Add a node that `parent` expanded into; it is shown where the parent is, unless it says otherwise."""
        if self.has_node(node_id):
            raise GraphError(
                f"the graph it expands into has a node {node_id}, which exists already; "
                "ids made by an expansion must be new"
            )
        display = self.get_display_node_id(node.get("override_display_id") or parent)
        self._added[node_id] = node
        self._origins[node_id] = Origin(parent, display, self.get_real_node_id(parent))
