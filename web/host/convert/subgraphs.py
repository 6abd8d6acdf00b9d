"""Subgraph instances: what is inside them, and which values their own widgets give to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from .document import CANVAS_ONLY, INPUT_NODE, Document, Graph, Node, fail
from .node_types import widget_values

DEEPEST = 64
MOST_NODES = 100_000


@dataclass
class Scope:
    """A graph in one of its places: the canvas itself, or a subgraph inside the instance `host` of `parent`.

    `values` are the instance's values by subgraph input; `shown` those of older files, which name a widget inside.
    """

    graph: Graph
    prefix: str = ""
    parent: Scope | None = None
    host: Node | None = None
    values: dict[str, Any] = field(default_factory=dict)
    shown: dict[tuple[str, str], Any] = field(default_factory=dict)

    def id_of(self, node: Node) -> str:
        """The node's id in the prompt: `5:3` is node 3 inside the instance 5."""
        return self.prefix + node.id


class Subgraphs:
    """The subgraphs of one file and the values of their promoted widgets."""

    def __init__(self, document: Document) -> None:
        self.graphs = document.subgraphs
        self._promoted: dict[str, dict[str, tuple[str, str]]] = {}

    def expand(self, root: Graph) -> dict[str, Scope]:
        """The canvas and every expanded instance, by prefix. WorkflowError when a subgraph contains itself."""
        scopes: dict[str, Scope] = {}
        waiting = [Scope(root)]
        count = 0
        while waiting:
            scope = waiting.pop(0)
            scopes[scope.prefix] = scope
            count += len(scope.graph.nodes)
            if scope.prefix.count(":") > DEEPEST or count > MOST_NODES:
                fail(
                    f"{scope.host} holds subgraphs within subgraphs without an end (more than {DEEPEST} deep or "
                    f"{MOST_NODES} nodes); take the subgraph out of itself on the canvas."
                )
            # The canvas leaves out what is inside a muted or bypassed instance, but not where that instance lies within
            # another subgraph: so it is here, for one file must not run in two ways.
            waiting += [
                self._inside(scope, node)
                for node in scope.graph.nodes.values()
                if node.type in self.graphs and (node.active or scope.parent)
            ]
        return scopes

    def _inside(self, scope: Scope, host: Node) -> Scope:
        inner = Scope(self.graphs[host.type], f"{scope.id_of(host)}:", scope, host)
        inner.values, inner.shown = self._given(host)
        for (node_id, widget), value in scope.shown.items():
            if node_id == host.id:
                self._show(host, widget, value, inner.values, inner.shown)
        return inner

    def promoted(self, key: str) -> dict[str, tuple[str, str]]:
        """The inputs of a subgraph that stand for a widget inside, in order -> (node id, name) of the first such."""
        if key not in self._promoted:
            self._promoted[key] = {}  # a subgraph inside itself finds nothing and ends
            graph = self.graphs[key]
            for index, slot in enumerate(graph.inputs):
                target = next((place for place in _fed(graph, index) if self._is_widget(graph, place)), None)
                if target:
                    self._promoted[key][slot.name] = target
        return self._promoted[key]

    def _is_widget(self, graph: Graph, place: tuple[str, str]) -> bool:
        node = graph.nodes.get(place[0])
        if node is None or node.type in CANVAS_ONLY:
            return False
        if node.type in self.graphs:
            return place[1] in self.promoted(node.type)
        return any(slot.name == place[1] and slot.widget for slot in node.slots)

    def _given(self, host: Node) -> tuple[dict[str, Any], dict[tuple[str, str], Any]]:
        """An instance's values: its own by position over its promoted inputs, else what stands inside."""
        promoted = self.promoted(host.type)
        values = {name: self._inner_value(self.graphs[host.type], place) for name, place in promoted.items()}
        saved = host.values
        if isinstance(saved, list):
            values.update(zip(promoted, saved, strict=False))
        else:
            by_name: Mapping[str, Any] = saved if isinstance(saved, Mapping) else host.named
            values.update({name: by_name[name] for name in promoted if name in by_name})
        shown: dict[tuple[str, str], Any] = {}
        for proxy, value in zip(host.proxies, saved if isinstance(saved, list) else (), strict=False):
            self._set_shown(host, proxy.node, proxy.widget, value, values, shown)
        return values, shown

    def _inner_value(self, graph: Graph, place: tuple[str, str]) -> Any:
        node = graph.nodes[place[0]]
        if node.type in self.graphs:
            return self._given(node)[0].get(place[1])
        return widget_values(node.kind, node.values, node.named).get(place[1]) if node.kind else None

    def _set_shown(
        self,
        host: Node,
        node_id: str,
        widget: str,
        value: Any,
        values: dict[str, Any],
        shown: dict[tuple[str, str], Any],
    ) -> None:
        """Set a widget inside, or the promoted input that feeds it."""
        if node_id == "-1":
            if widget in values:
                values[widget] = value
            return
        graph = self.graphs[host.type]
        link = graph.into.get((node_id, widget))
        if link and link.origin == INPUT_NODE and link.slot < len(graph.inputs):
            values[graph.inputs[link.slot].name] = value
        elif node_id in graph.nodes:
            shown[node_id, widget] = value

    def _show(
        self, host: Node, widget: str, value: Any, values: dict[str, Any], shown: dict[tuple[str, str], Any]
    ) -> None:
        """Set a widget that the instance itself shows, from outside of it."""
        if widget in self.promoted(host.type):
            values[widget] = value
            return
        for proxy in host.proxies:
            if proxy.widget == widget:
                self._set_shown(host, proxy.node, widget, value, values, shown)
                return


def _fed(graph: Graph, index: int) -> Iterator[tuple[str, str]]:
    """The places that a subgraph's input leads to."""
    return (place for place, link in graph.into.items() if link.origin == INPUT_NODE and link.slot == index)
