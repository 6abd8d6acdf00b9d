"""What one prompt tells the outside: its events, in the order the canvas expects, and the record kept in history."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .graph import Graph
from .protocols import Events

if TYPE_CHECKING:
    from PIL import Image

STATES_KEPT = 256  # progress_state repeats all nodes each time; of an absurdly long prompt it repeats the latest


class Reporter:
    """Sends one prompt's events to the client that submitted it; without a client only broadcasts are sent."""

    def __init__(self, events: Events, prompt_id: str, client_id: str | None, graph: Graph) -> None:
        self.prompt_id = prompt_id
        self.messages: list[tuple[str, dict[str, Any]]] = []  # the record for history
        self.executed: list[str] = []  # nodes that ran, in order
        self.outputs: dict[str, dict[str, Any]] = {}  # node id to what it shows
        self.meta: dict[str, dict[str, Any]] = {}
        self.texts: dict[str, str] = {}  # node id to the last line that it told
        self._events = events
        self._client = client_id
        self._graph = graph
        self._states: dict[str, dict[str, Any]] = {}

    # The prompt

    def prompt_started(self) -> None:
        self._record("execution_start", {})

    def cached(self, node_ids: Iterable[str]) -> None:
        """These nodes need not run."""
        self._record("execution_cached", {"nodes": list(node_ids)})

    def succeeded(self) -> None:
        self._record("execution_success", {})

    def interrupted(self, node_id: str | None) -> None:
        """The prompt stopped at this node; everybody is told."""
        self._record("execution_interrupted", self._place(node_id), broadcast=True)

    def failed(self, node_id: str | None, error: dict[str, Any]) -> None:
        """The prompt stopped at this node; `error` holds exception_message, exception_type, traceback and values."""
        self._record("execution_error", {**self._place(node_id), **error})

    def blocked(self, node_id: str, message: str) -> None:
        """A node was skipped on purpose and there is something to say about it; the prompt goes on."""
        error = {
            "exception_message": f"Execution was blocked: {message}",
            "exception_type": "ExecutionBlocked",
            "traceback": [],
            "current_inputs": {},
            "current_outputs": [],
        }
        self._send("execution_error", {**self._place(node_id), **error})

    def _place(self, node_id: str | None) -> dict[str, Any]:
        node = self._graph.get_node(node_id) if node_id is not None else {}
        return {"node_id": node_id, "node_type": node.get("class_type"), "executed": list(self.executed)}

    # One node

    def node_started(self, node_id: str) -> None:
        self._set_state(node_id, "running", 0.0, 1.0)
        self._send("executing", {"node": node_id, "display_node": self._graph.get_display_node_id(node_id)})

    def progress(self, node_id: str, value: float, total: float, preview: Image.Image | None = None) -> None:
        """A node is `value` of `total` steps far, and its work looks like this."""
        self._set_state(node_id, "running", value, total)
        self._send("progress", {"value": value, "max": total, "node": node_id})
        if preview is not None and self._client is not None:
            self._events.send_preview(preview, {**self._identity(node_id), "prompt_id": self.prompt_id}, self._client)

    def text(self, node_id: str, text: str) -> None:
        """A node has a line to show."""
        self.texts[node_id] = text
        if self._client is not None:
            self._events.send_text(text, node_id, self.prompt_id, self._client)

    def shown(self, node_id: str, ui: dict[str, Any]) -> None:
        """A node has something to show, such as pictures."""
        identity = self._identity(node_id)
        self.outputs[node_id] = ui
        self.meta[node_id] = {
            "node_id": node_id,
            "display_node": identity["display_node_id"],
            "parent_node": identity["parent_node_id"],
            "real_node_id": identity["real_node_id"],
        }
        self._send("executed", {"node": node_id, "display_node": identity["display_node_id"], "output": ui})

    def node_finished(self, node_id: str) -> None:
        self.executed.append(node_id)
        total = self._states.get(node_id, {}).get("max", 1.0)
        self._set_state(node_id, "finished", total, total)

    def node_failed(self, node_id: str) -> None:
        state = self._states.get(node_id, {})
        self._set_state(node_id, "error", state.get("value", 0.0), state.get("max", 1.0))

    def _identity(self, node_id: str) -> dict[str, Any]:
        return {
            "node_id": node_id,
            "display_node_id": self._graph.get_display_node_id(node_id),
            "parent_node_id": self._graph.get_parent_node_id(node_id),
            "real_node_id": self._graph.get_real_node_id(node_id),
        }

    def _set_state(self, node_id: str, state: str, value: float, total: float) -> None:
        self._states[node_id] = {
            "value": value,
            "max": total,
            "state": state,
            "prompt_id": self.prompt_id,
            **self._identity(node_id),
        }
        if len(self._states) > STATES_KEPT:
            self._forget_a_finished_node()
        self._send("progress_state", {"nodes": dict(self._states)})

    def _forget_a_finished_node(self) -> None:
        oldest = next((name for name, node in self._states.items() if node["state"] == "finished"), None)
        self._states.pop(oldest, None)

    # The wire

    def _record(self, event: str, data: dict[str, Any], broadcast: bool = False) -> None:
        data = {"prompt_id": self.prompt_id, **data, "timestamp": int(time.time() * 1000)}
        self.messages.append((event, data))
        self._send(event, data, broadcast)

    def _send(self, event: str, data: dict[str, Any], broadcast: bool = False) -> None:
        if broadcast or self._client is not None:
            self._events.send(event, {"prompt_id": self.prompt_id, **data}, None if broadcast else self._client)
