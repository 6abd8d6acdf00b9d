"""The values that a node is called with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .cache import Entry
from .graph import Graph, GraphError, is_link
from .spec import InputSpec, NodeSpec, Specs, coerce, unwrap

TOKENS = {"AUTH_TOKEN_COMFY_ORG": "auth_token_comfy_org", "API_KEY_COMFY_ORG": "api_key_comfy_org"}
SENSITIVE = frozenset(TOKENS.values())  # in extra_data: for the nodes that ask, never for history


@dataclass(frozen=True)
class Gathered:
    """A node's inputs as lists of values; the linked ones that are not there (yet) are None and listed."""

    values: dict[str, Sequence[Any]]
    missing: frozenset[str]


class Inputs:
    """Gathers inputs for the nodes of one prompt."""

    def __init__(self, graph: Graph, specs: Specs, extra_data: Mapping[str, Any]) -> None:
        self._graph = graph
        self._specs = specs
        self._extra_data = extra_data

    def gather(self, node_id: str, results: Mapping[str, Entry]) -> Gathered:
        """Literals, results at the other end of links, and hidden inputs. Undeclared literals are left out."""
        node = self._graph.get_node(node_id)
        spec = self._specs[node["class_type"]]
        values: dict[str, Sequence[Any]] = {}
        missing = set()
        for name, value in node["inputs"].items():
            if is_link(value) and not spec.is_raw_link(name):
                values[name] = linked(value, results) if value[0] in results else (None,)
                if value[0] not in results:
                    missing.add(name)
            elif name in spec.inputs:
                values[name] = (_literal(value, spec.inputs[name]),)
        return Gathered({**values, **self._hidden(node_id, spec)}, frozenset(missing))

    def _hidden(self, node_id: str, spec: NodeSpec) -> dict[str, Sequence[Any]]:
        offered = {
            "UNIQUE_ID": node_id,
            "PROMPT": self._graph.get_original_prompt(),
            "DYNPROMPT": self._graph,
            "EXTRA_PNGINFO": self._extra_data.get("extra_pnginfo"),
            **{kind: self._extra_data.get(key) for kind, key in TOKENS.items()},
        }
        return {name: (offered[kind],) for name, kind in spec.hidden.items() if kind in offered}


def linked(link: list[Any], results: Mapping[str, Entry]) -> Sequence[Any]:
    """The values at the other end of a link."""
    source, slot = link
    outputs = results[source].outputs
    if not 0 <= slot < len(outputs):
        raise GraphError(f"it reads output {slot} of node {source}, which gave only {len(outputs)}")
    return outputs[slot]


def _literal(value: Any, declared: InputSpec) -> Any:
    """The widget's value. Expansions may put any object in a widget's place: it is passed on as it is."""
    try:
        return coerce(unwrap(value), declared.type)
    except ValueError:
        return value
