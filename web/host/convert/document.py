"""A workflow file read into plain values, and checked once so that nothing after it has to doubt them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ....flux_runtime.errors import FluxError
from .node_types import NodeType, Slot, node_type

MUTED, BYPASSED = 2, 4
INPUT_NODE, OUTPUT_NODE = "-10", "-20"  # the ends of a subgraph, as its links name them
REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"
CANVAS_ONLY = (REROUTE, PRIMITIVE, "Note", "MarkdownNote")  # nodes that the canvas keeps to itself


class WorkflowError(FluxError):
    """A workflow file that cannot be run as it is; the message names the node and what to do."""


@dataclass(frozen=True)
class Proxy:
    """A widget that an instance shows of a node inside it, as files from 2025 name it; node "-1" is the instance."""

    node: str
    widget: str


@dataclass(frozen=True)
class Link:
    """Where an input's value comes from."""

    origin: str
    slot: int
    type: str


@dataclass
class Node:
    """A node as saved. `kind` is None for the canvas's own nodes, subgraph instances and unknown classes."""

    id: str
    type: str
    title: str
    mode: int
    slots: tuple[Slot, ...]
    kind: NodeType | None
    values: Any = None
    named: Mapping[str, Any] = field(default_factory=dict)
    search_name: str = ""
    proxies: tuple[Proxy, ...] = ()

    @property
    def active(self) -> bool:
        return self.mode not in (MUTED, BYPASSED)

    def __str__(self) -> str:
        return f"node {self.id} ({self.title})" if self.title else f"node {self.id} of type {self.type}"


@dataclass
class Graph:
    """The nodes of the canvas or of one subgraph; `into` has the link of each connected (node id, input name)."""

    nodes: dict[str, Node]
    into: dict[tuple[str, str], Link]
    inputs: tuple[Slot, ...] = ()


@dataclass
class Document:
    """A whole file: the canvas and the subgraphs defined in it, by id."""

    root: Graph
    subgraphs: dict[str, Graph]


def fail(sentence: str) -> None:
    """Raise a WorkflowError."""
    raise WorkflowError(sentence)


def read_document(workflow: Any, definitions: Mapping[str, Mapping[str, Any]]) -> Document:
    """Read a UI-format workflow; `definitions` are object_info entries by class. WorkflowError names what is wrong."""
    if not isinstance(workflow, Mapping):
        fail("The workflow is not a JSON object; save it again from the canvas (Workflow > Save or Export).")
    reader = _Reader(definitions, _subgraph_sources(workflow))
    return Document(
        reader.graph(workflow, "the workflow"),
        {
            key: reader.graph(source, f"the subgraph {source.get('name') or key!r}")
            for key, source in reader.sources.items()
        },
    )


def _subgraph_sources(workflow: Mapping[str, Any], depth: int = 0) -> dict[str, Mapping[str, Any]]:
    """The saved subgraph definitions by id, those inside others too."""
    definitions = workflow.get("definitions")
    found: dict[str, Mapping[str, Any]] = {}
    for source in _list(definitions if isinstance(definitions, Mapping) else {}, "subgraphs", "definitions"):
        if not isinstance(source, Mapping) or not isinstance(source.get("id"), str):
            fail("A subgraph in the workflow's definitions has no id; save the workflow again from the canvas.")
        if depth < 100:
            found.update(_subgraph_sources(source, depth + 1))
        found[source["id"]] = source
    return found


def _list(source: Mapping[str, Any], key: str, where: str) -> list[Any]:
    value = source.get(key)
    if value is not None and not isinstance(value, list):
        fail(f"{where}: {key!r} is not a list; save the workflow again from the canvas.")
    return value or []


def identifier(value: Any) -> str | None:
    """A node or link id as text: files have whole numbers or texts; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


@dataclass
class _SavedLink:
    origin: str
    origin_slot: int
    target: str
    target_slot: int
    type: str


class _Reader:
    """Reads the graphs of one file."""

    def __init__(self, definitions: Mapping[str, Mapping[str, Any]], sources: dict[str, Mapping[str, Any]]) -> None:
        self.definitions, self.sources = definitions, sources
        self._types: dict[str, NodeType] = {}

    def graph(self, source: Mapping[str, Any], where: str) -> Graph:
        if not isinstance(source.get("nodes"), list):
            fail(
                f"{where} has no list of nodes, so it is not a workflow of the canvas; open it there and save it again."
            )
        links = self._links(source, where)
        nodes: dict[str, Node] = {}
        into: dict[tuple[str, str], Link] = {}
        unclaimed = dict(links)
        for saved in source["nodes"]:
            node = self._node(saved, where)
            if node.id in nodes:
                fail(f"{where} has two nodes with the id {node.id}; delete one of them on the canvas and save again.")
            nodes[node.id] = node
            for entry in _entries(saved, "inputs"):
                key = identifier(entry.get("link"))
                if key in unclaimed:
                    into[node.id, str(entry.get("name", ""))] = _link(unclaimed.pop(key))
        for link in unclaimed.values():  # the link list is the truth where an input does not name its link
            self._place(link, nodes, source, into)
        return Graph(nodes, into, _ports(source, "inputs"))

    def _links(self, source: Mapping[str, Any], where: str) -> dict[str, _SavedLink]:
        links: dict[str, _SavedLink] = {}
        for saved in _list(source, "links", where):
            link = _read_link(saved)
            if link is None:
                fail(
                    f"{where} has a link that cannot be read ({json.dumps(saved, default=str)[:80]}); "
                    "save the workflow again from the canvas."
                )
            links[link[0]] = link[1]
        return links

    def _node(self, saved: Any, where: str) -> Node:
        key = identifier(saved.get("id")) if isinstance(saved, Mapping) else None
        if key is None or not isinstance(saved.get("type"), str):
            fail(
                f"{where} has a node without id or type ({json.dumps(saved, default=str)[:80]}); "
                "delete it and save the workflow again from the canvas."
            )
        name, properties = saved["type"], saved.get("properties")
        properties = properties if isinstance(properties, Mapping) else {}
        kind = self._type(name)
        named = saved.get("widgets_values_named")
        return Node(
            id=key,
            type=name,
            title=str(saved.get("title") or (kind.title if kind else "")),
            mode=saved.get("mode") if isinstance(saved.get("mode"), int) else 0,
            slots=self._slots(saved, name, kind),
            kind=kind,
            values=saved.get("widgets_values"),
            named=named if isinstance(named, Mapping) else {},
            search_name=str(properties.get("Node name for S&R") or name),
            proxies=_proxies(properties),
        )

    def _type(self, name: str) -> NodeType | None:
        if name in self.sources or name in CANVAS_ONLY or name not in self.definitions:
            return None
        if name not in self._types:
            self._types[name] = node_type(name, self.definitions[name])
        return self._types[name]

    def _slots(self, saved: Mapping[str, Any], name: str, kind: NodeType | None) -> tuple[Slot, ...]:
        """The inputs as the canvas orders them: the definition's, then what only the file has."""
        known = kind.slots if kind else _ports(self.sources[name], "inputs") if name in self.sources else ()
        names = {slot.name for slot in known}
        return (*known, *(slot for slot in _ports(saved, "inputs") if slot.name not in names))

    def _place(
        self, link: _SavedLink, nodes: Mapping[str, Node], source: Mapping[str, Any], into: dict[tuple[str, str], Link]
    ) -> None:
        if link.target == OUTPUT_NODE:
            into.setdefault((OUTPUT_NODE, str(link.target_slot)), _link(link))
            return
        if link.target not in nodes:
            return
        saved = next(entry for entry in source["nodes"] if identifier(entry["id"]) == link.target)
        slots = _ports(saved, "inputs") or nodes[link.target].slots
        if link.target_slot >= len(slots):
            slots = nodes[link.target].slots
        if 0 <= link.target_slot < len(slots):
            into.setdefault((link.target, slots[link.target_slot].name), _link(link))


def _link(saved: _SavedLink) -> Link:
    return Link(saved.origin, saved.origin_slot, saved.type)


def _read_link(saved: Any) -> tuple[str, _SavedLink] | None:
    """A link from its list (schema 0.4) or object (schema 1) with its id; None when it is neither."""
    keys = ("id", "origin_id", "origin_slot", "target_id", "target_slot")
    values = [saved.get(key) for key in keys] if isinstance(saved, Mapping) else saved
    if not isinstance(values, list) or len(values) < 5:
        return None
    key, origin, target = identifier(values[0]), identifier(values[1]), identifier(values[3])
    slots = [values[2], values[4]]
    if None in (key, origin, target) or any(isinstance(slot, bool) or not isinstance(slot, int) for slot in slots):
        return None
    kind = saved.get("type") if isinstance(saved, Mapping) else values[5] if len(values) > 5 else "*"
    return key, _SavedLink(origin, slots[0], target, slots[1], kind if isinstance(kind, str) else "*")


def _entries(saved: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    entries = saved.get(key)
    return [entry for entry in entries if isinstance(entry, Mapping)] if isinstance(entries, list) else []


def _ports(saved: Mapping[str, Any], key: str) -> tuple[Slot, ...]:
    return tuple(
        Slot(str(entry.get("name", "")), str(entry.get("type") or "*"), bool(entry.get("widget")))
        for entry in _entries(saved, key)
    )


def _proxies(properties: Mapping[str, Any]) -> tuple[Proxy, ...]:
    """The property `proxyWidgets`: a list of [node id, widget name], saved as such or as JSON text."""
    saved = properties.get("proxyWidgets")
    if isinstance(saved, str):
        try:
            saved = json.loads(saved)
        except ValueError:
            return ()
    if not isinstance(saved, list):
        return ()
    pairs = [entry if isinstance(entry, list) and len(entry) >= 2 else ["", ""] for entry in saved]
    return tuple(Proxy(str(pair[0]), str(pair[1])) for pair in pairs)
