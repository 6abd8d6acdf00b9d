"""Ids that a subgraph's nodes share with other nodes are replaced, as the canvas does when it opens a file."""

from __future__ import annotations

from typing import Any

from .document import Document, Graph, Link, Proxy


def make_ids_unique(document: Document, last: Any) -> None:
    """Give a node in a subgraph whose id is taken elsewhere the next free one, counting from `last`; in place."""
    taken = set(document.root.nodes)
    numbers = [int(key) for key in taken if key.isdecimal()]
    counter = max([last if isinstance(last, int) and not isinstance(last, bool) else 0, *numbers])
    for key, graph in document.subgraphs.items():
        renamed: dict[str, str] = {}
        for node_id in graph.nodes:
            new = node_id
            while new in taken:
                counter += 1
                new = str(counter)
            taken.add(new)
            if new != node_id:
                renamed[node_id] = new
        if renamed:
            _rename_nodes(graph, renamed)
            _rename_proxies(document, key, renamed)


def _rename_nodes(graph: Graph, renamed: dict[str, str]) -> None:
    for node in graph.nodes.values():
        node.id = renamed.get(node.id, node.id)
    graph.nodes = {node.id: node for node in graph.nodes.values()}
    graph.into = {
        (renamed.get(target, target), name): Link(renamed.get(link.origin, link.origin), link.slot, link.type)
        for (target, name), link in graph.into.items()
    }


def _rename_proxies(document: Document, key: str, renamed: dict[str, str]) -> None:
    """The instances of the subgraph name its nodes."""
    for graph in (document.root, *document.subgraphs.values()):
        for node in graph.nodes.values():
            if node.type == key:
                node.proxies = tuple(Proxy(renamed.get(old.node, old.node), old.widget) for old in node.proxies)
