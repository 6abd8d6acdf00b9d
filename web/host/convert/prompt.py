"""Puts the prompt together: every executed node with its widgets' values and its links."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import Any

from .document import CANVAS_ONLY, PRIMITIVE, Node, fail, read_document
from .node_types import NodeType, Widget, fit_number, widget_values
from .sources import Given, Output, compatible, source_of
from .subgraphs import Scope, Subgraphs
from .text import dynamic_prompt, file_name
from .unique_ids import make_ids_unique

log = logging.getLogger("fluxcanvas")
FILE_NAMES = ("SaveImage", "filename_prefix")  # the widget whose placeholders the canvas fills in


def is_prompt(workflow: Any) -> bool:
    """Whether a JSON value is already in API format: nodes by id, each with a class_type."""
    return (
        isinstance(workflow, Mapping)
        and "nodes" not in workflow
        and any(isinstance(node, Mapping) and "class_type" in node for node in workflow.values())
    )


def convert(
    workflow: Any,
    definitions: Mapping[str, Mapping[str, Any]],
    *,
    rng: random.Random | None = None,
    now: datetime | None = None,
) -> dict[str, dict[str, Any]]:
    """The API-format prompt of a UI-format workflow, as the canvas's own graphToPrompt gives it.

    `definitions` are object_info entries by class; `rng` chooses in dynamic prompts, `now` dates file names.
    WorkflowError names the node that cannot be converted and what to do.
    """
    document = read_document(workflow, definitions)
    make_ids_unique(document, workflow.get("last_node_id"))
    subgraphs = Subgraphs(document)
    scopes = subgraphs.expand(document.root)
    executed = [
        (scope, node)
        for scope in scopes.values()
        for node in scope.graph.nodes.values()
        if node.active and node.type not in CANVAS_ONLY and node.type not in subgraphs.graphs
    ]
    _check_known(executed)
    builder = _Builder(scopes, rng or random.Random(), now or datetime.now())
    return {scope.id_of(node): builder.entry(scope, node, node.kind) for scope, node in executed if node.kind}


def _check_known(executed: list[tuple[Scope, Node]]) -> None:
    unknown = [f"{scope.id_of(node)} of type {node.type!r}" for scope, node in executed if node.kind is None]
    if unknown:
        fail(
            f"This host does not have the class of node {', node '.join(unknown[:10])}; install the node pack that "
            "brings it, or bypass or delete the node on the canvas."
        )


class _Builder:
    """Makes the entries of one prompt."""

    def __init__(self, scopes: Mapping[str, Scope], rng: random.Random, now: datetime) -> None:
        self.scopes, self.rng, self.now = scopes, rng, now

    def entry(self, scope: Scope, node: Node, kind: NodeType) -> dict[str, Any]:
        """One node of the prompt."""
        saved = widget_values(kind, node.values, node.named)
        inputs = {
            widget.name: _literal(self._value(scope, node, widget, saved)) for widget in kind.widgets if widget.sent
        }
        widgets = {widget.name: widget for widget in kind.widgets}
        for slot in node.slots:
            source = source_of(self.scopes, scope, node, slot)
            if isinstance(source, Output):
                inputs[slot.name] = [source.node, source.slot]
            elif isinstance(source, Given):
                inputs[slot.name] = _literal(_chosen(widgets.get(slot.name), source.value))
        return {"inputs": inputs, "class_type": node.type, "_meta": {"title": node.title}}

    def _value(self, scope: Scope, node: Node, widget: Widget, saved: Mapping[str, Any]) -> Any:
        """A widget's value: what an older file's instance shows it as, a primitive's, or its own."""
        if (node.id, widget.name) in scope.shown:
            return _chosen(widget, scope.shown[node.id, widget.name])
        value = _chosen(widget, self._primitive(scope, node, widget, saved[widget.name]))
        if not isinstance(value, str):
            return value
        if widget.options.get("dynamicPrompts"):
            return dynamic_prompt(value, self.rng)
        return file_name(value, self._search, self.now) if (node.type, widget.name) == FILE_NAMES else value

    def _primitive(self, scope: Scope, node: Node, widget: Widget, own: Any) -> Any:
        """The value of the primitive node that is connected to a widget, else the widget's own."""
        link = scope.graph.into.get((node.id, widget.name))
        origin = scope.graph.nodes.get(link.origin) if link else None
        if not link or not origin or origin.type != PRIMITIVE or not isinstance(origin.values, list):
            return own
        kind = next(slot.type for slot in node.slots if slot.name == widget.name)
        return fit_number(widget, origin.values[0]) if origin.values and compatible(link.type, kind) else own

    def _search(self, name: str, widget: str) -> Any:
        """The value of a widget of the first node that a file name's placeholder names; None without one."""
        nodes = list(self._nodes())
        found = [node for node in nodes if node.search_name == name] or [node for node in nodes if node.title == name]
        if not found:
            log.warning("The file name asks for %%%s.%s%%, but no node is called %s", name, widget, name)
            return None
        return widget_values(found[0].kind, found[0].values, found[0].named).get(widget) if found[0].kind else None

    def _nodes(self) -> Iterator[Node]:
        for scope in self.scopes.values():
            yield from scope.graph.nodes.values()


def _chosen(widget: Widget | None, value: Any) -> Any:
    """A combo without a value stands on its first choice."""
    return next(iter(widget.choices), None) if widget and value is None and widget.type == "COMBO" else value


def _literal(value: Any) -> Any:
    """A list is wrapped, because a bare one reads as a link."""
    return {"__value__": value} if isinstance(value, list) else value
