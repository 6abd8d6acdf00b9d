"""Node classes as the canvas sees them, and checks that no definition can empty its node library.

The frontend does not validate definitions: one malformed entry can leave it without any node, so they are checked here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

log = logging.getLogger("fluxcanvas")
_FLAGS = (("DEPRECATED", "deprecated"), ("EXPERIMENTAL", "experimental"), ("DEV_ONLY", "dev_only"))


class NodeDefinitionError(ValueError):
    """A node class that does not keep to ComfyUI's V1 conventions; the message says where."""


def _need(condition: bool, sentence: str) -> None:
    if not condition:
        raise NodeDefinitionError(sentence)


def _texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _input_entry(group: str, name: str, spec: Any) -> list[Any]:
    """One input as [type, options]; a type is a name or a list of choices."""
    where = f"input {name!r} in {group!r}"
    _need(isinstance(name, str), f"{where} must have a text as its name")
    if group == "hidden":
        return spec
    _need(isinstance(spec, (tuple, list)) and len(spec) > 0, f"{where} must be a tuple (type, options)")
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    _need(isinstance(kind, (str, list, tuple)), f"{where} must have a type name or a list of choices")
    _need(isinstance(options, Mapping), f"{where} must have its options in a dict")
    # A type may be a str subclass that compares equal to anything ("*" tricks of packs): send plain text.
    return [str.__str__(kind) if isinstance(kind, str) else list(kind), dict(options)]


def _inputs(cls: type) -> dict[str, dict[str, Any]]:
    inputs = cls.INPUT_TYPES()  # type: ignore[attr-defined]
    _need(isinstance(inputs, Mapping), "INPUT_TYPES must return a dict")
    groups: dict[str, dict[str, Any]] = {}
    for group, entries in inputs.items():
        _need(isinstance(entries, Mapping), f"INPUT_TYPES()[{group!r}] must be a dict")
        groups[group] = {name: _input_entry(group, name, spec) for name, spec in entries.items()}
    groups.setdefault("required", {})
    return groups


def _outputs(cls: type) -> dict[str, Any]:
    types = getattr(cls, "RETURN_TYPES", None)
    _need(
        isinstance(types, (tuple, list)) and all(isinstance(item, (str, list, tuple)) for item in types),
        "RETURN_TYPES must be a tuple of type names",
    )
    types = [str.__str__(item) if isinstance(item, str) else list(item) for item in types]
    plain = [item if isinstance(item, str) else "COMBO" for item in types]
    names = getattr(cls, "RETURN_NAMES", None) or plain
    lists = getattr(cls, "OUTPUT_IS_LIST", None) or [False] * len(types)
    tooltips = getattr(cls, "OUTPUT_TOOLTIPS", None) or [None] * len(types)
    _need(_texts(names), "RETURN_NAMES must be a tuple of texts")
    for label, values in (("RETURN_NAMES", names), ("OUTPUT_IS_LIST", lists)):
        _need(len(values) == len(types), f"{label} has {len(values)} entries for {len(types)} outputs")
    return {
        "output": types,
        "output_is_list": [bool(item) for item in lists],
        "output_name": list(names),
        "output_tooltips": list(tooltips),
    }


def _check_function(cls: type) -> None:
    name = getattr(cls, "FUNCTION", None)
    _need(isinstance(name, str), "FUNCTION must name the method that runs the node")
    _need(callable(getattr(cls, name, None)), f"FUNCTION names {name!r}, which the class does not have")


def node_info(node_id: str, cls: type, display_name: str | None = None) -> dict[str, Any]:
    """The object_info entry of a node class; NodeDefinitionError says what is wrong with a malformed one."""
    _need(isinstance(cls, type), "the mapping must hold classes")
    _need(callable(getattr(cls, "INPUT_TYPES", None)), "INPUT_TYPES is missing")
    _check_function(cls)
    inputs = _inputs(cls)
    info = {
        "input": inputs,
        "input_order": {group: list(entries) for group, entries in inputs.items()},
        "is_input_list": bool(getattr(cls, "INPUT_IS_LIST", False)),
        **_outputs(cls),
        "name": node_id,
        "display_name": str(display_name or node_id),
        "description": str(getattr(cls, "DESCRIPTION", "")),
        "python_module": str(getattr(cls, "RELATIVE_PYTHON_MODULE", "nodes")),
        "category": str(getattr(cls, "CATEGORY", "sd")),
        "output_node": bool(getattr(cls, "OUTPUT_NODE", False)),
        "api_node": bool(getattr(cls, "API_NODE", False)),
    }
    aliases = getattr(cls, "SEARCH_ALIASES", ())
    _need(_texts(aliases), "SEARCH_ALIASES must be a list of texts")
    info["search_aliases"] = list(aliases)
    info.update({key: True for attribute, key in _FLAGS if getattr(cls, attribute, False)})
    if getattr(cls, "ESSENTIALS_CATEGORY", None):
        info["essentials_category"] = str(cls.ESSENTIALS_CATEGORY)  # type: ignore[attr-defined]
    return info


def object_info(nodes: Mapping[str, type], display_names: Mapping[str, str]) -> dict[str, Any]:
    """The entries of all nodes; one whose definition fails now (a vanished folder, say) is left out and told."""
    entries = {}
    for node_id, cls in nodes.items():
        try:
            entries[node_id] = node_info(node_id, cls, display_names.get(node_id))
        except Exception as error:  # INPUT_TYPES is foreign code, and one node must not hide the others
            log.error("Node %s is left out of the node library: %s", node_id, error)
    return entries
