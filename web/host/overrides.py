"""`--set NODE.INPUT=VALUE`: finds the node by id or title, and reads the value by the input's type."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from .convert import WorkflowError, widget_position
from .spec import WRAPPER

Definitions = Mapping[str, Mapping[str, Any]]
WIDGETS = ("INT", "FLOAT", "BOOLEAN", "STRING", "COMBO")
TRUE, FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")
MOST_SHOWN = 12


@dataclass(frozen=True)
class Change:
    """One input of one node, and its new value."""

    node: str
    input: str
    value: Any


def apply_settings(prompt: dict[str, Any], settings: Iterable[str], definitions: Definitions) -> list[Change]:
    """Change inputs of a prompt in place. WorkflowError lists the candidates where a name fits none or several."""
    changes = [_change(prompt, setting, definitions) for setting in settings]
    for change in changes:
        prompt[change.node]["inputs"][change.input] = change.value
    return changes


def reflect(workflow: dict[str, Any], changes: Iterable[Change], definitions: Definitions) -> bool:
    """Make the same changes in a UI-format workflow, in place. False when one has no widget of its own there."""
    nodes = {str(node.get("id")): node for node in workflow.get("nodes", ()) if isinstance(node, dict)}
    return all(_reflect_one(nodes.get(change.node), change, definitions) for change in changes)


def _reflect_one(node: dict[str, Any] | None, change: Change, definitions: Definitions) -> bool:
    if node is None or not isinstance(node.get("widgets_values"), list) or node.get("type") not in definitions:
        return False
    linked = any(
        entry.get("name") == change.input and entry.get("link") is not None
        for entry in node.get("inputs") or ()
        if isinstance(entry, Mapping)
    )
    position = widget_position(definitions[node["type"]], change.input)
    if linked or position is None or position >= len(node["widgets_values"]):
        return False
    value = change.value[WRAPPER] if isinstance(change.value, dict) and WRAPPER in change.value else change.value
    node["widgets_values"][position] = value
    if isinstance(node.get("widgets_values_named"), dict):
        node["widgets_values_named"][change.input] = value
    return True


def _change(prompt: Mapping[str, Any], setting: str, definitions: Definitions) -> Change:
    place, _, text = setting.partition("=")
    node_id, name = _find(prompt, place, definitions)
    node = prompt[node_id]
    spec = _inputs(definitions.get(node["class_type"], {})).get(name)
    kind = spec[0] if spec else "STRING"
    if isinstance(kind, str) and kind not in WIDGETS and not _holds_literal(node, name):
        raise WorkflowError(
            f"--set {place}: {name} of {describe(node_id, node)} takes a connection ({kind}), not a value; "
            "change the workflow on the canvas to connect something else."
        )
    return Change(node_id, name, _typed(text, kind, spec[1] if spec and len(spec) > 1 else {}, place))


def _holds_literal(node: Mapping[str, Any], name: str) -> bool:
    return name in node["inputs"] and not isinstance(node["inputs"][name], list)


def _find(prompt: Mapping[str, Any], place: str, definitions: Definitions) -> tuple[str, str]:
    """The node and input that NODE.INPUT names; titles and inputs may have dots in them, so every dot is tried."""
    for name, wanted in _splits(place):
        found = _matching(prompt, name)
        if len(found) > 1:
            raise WorkflowError(
                f"--set {place}: several nodes are called {name!r}: {_listed(prompt, found)}; "
                f"use the id, such as --set {found[0]}.{wanted}=..."
            )
        if found:
            known = _known_inputs(prompt[found[0]], definitions)
            if wanted in known:
                return found[0], wanted
            raise WorkflowError(
                f"--set {place}: {describe(found[0], prompt[found[0]])} has no input {wanted!r}; "
                f"it has {', '.join(known) or 'none'}."
            )
    raise WorkflowError(
        f"--set {place}: no node has the id or title {place.rpartition('.')[0]!r}; there are "
        f"{_listed(prompt, list(prompt))}."
    )


def _splits(place: str) -> Iterator[tuple[str, str]]:
    """(node, input) for every dot, from the last one."""
    parts = place.split(".")
    return ((".".join(parts[:cut]), ".".join(parts[cut:])) for cut in range(len(parts) - 1, 0, -1))


def _matching(prompt: Mapping[str, Any], name: str) -> list[str]:
    """The ids of the nodes meant: by id, else by title, else by title in any case, else by class."""
    if name in prompt:
        return [name]
    for same in (
        lambda node: _title(node) == name,
        lambda node: _title(node).lower() == name.lower(),
        lambda node: node["class_type"] == name,
    ):
        found = [node_id for node_id, node in prompt.items() if same(node)]
        if found:
            return found
    return []


def _title(node: Mapping[str, Any]) -> str:
    meta = node.get("_meta")
    return str(meta.get("title") or "") if isinstance(meta, Mapping) else ""


def describe(node_id: str, node: Mapping[str, Any]) -> str:
    """A node in words: `node 4 (Sample)`."""
    return f"node {node_id} ({_title(node) or node.get('class_type')})"


def _listed(prompt: Mapping[str, Any], ids: list[str]) -> str:
    shown = [f"{node_id} ({_title(prompt[node_id]) or prompt[node_id]['class_type']})" for node_id in ids[:MOST_SHOWN]]
    return ", ".join(shown) + (", ..." if len(ids) > MOST_SHOWN else "")


def _inputs(definition: Mapping[str, Any]) -> dict[str, Any]:
    groups = definition.get("input", {})
    return {name: spec for group in ("required", "optional") for name, spec in (groups.get(group) or {}).items()}


def _known_inputs(node: Mapping[str, Any], definitions: Definitions) -> list[str]:
    return list(dict.fromkeys([*_inputs(definitions.get(node["class_type"], {})), *node["inputs"]]))


def _typed(text: str, kind: Any, options: Mapping[str, Any], place: str) -> Any:
    """The value that a text stands for in an input of a type."""
    if not isinstance(kind, str) or kind == "COMBO":
        choices = kind if not isinstance(kind, str) else options.get("options") or ()
        return _choice(text, choices, several=bool(options.get("multi_select")))
    if kind == "STRING":
        return text
    try:
        if kind == "INT":
            return int(text)
        if kind == "FLOAT":
            return float(text)
        if kind == "BOOLEAN":
            return _boolean(text)
    except ValueError as error:
        wanted = {"INT": "a whole number", "FLOAT": "a number", "BOOLEAN": "true or false"}[kind]
        raise WorkflowError(f"--set {place}: {text[:60]!r} is not {wanted}.") from error
    return _json(text)


def _boolean(text: str) -> bool:
    if text.lower() not in TRUE + FALSE:
        raise ValueError(text)
    return text.lower() in TRUE


def _choice(text: str, choices: Iterable[Any], several: bool) -> Any:
    """A combo's choice as the combo has it (it may be a number); what is not offered is left for the validation."""
    if several:
        value = _json(text)
        return value if isinstance(value, dict) else {WRAPPER: text.split(",")}
    return next((choice for choice in choices if str(choice) == text), text)


def _json(text: str) -> Any:
    try:
        value = json.loads(text)
    except ValueError:
        return text
    return {WRAPPER: value} if isinstance(value, list) else value
