"""What a run without the canvas shows on the terminal: a progress bar that stays on one line, or plain lines."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from PIL import Image

BAR = 24
SECONDS_BETWEEN_LINES = 5.0


class Terminal:
    """Events (`protocols.Events`) for a person at a terminal. Writes to `stream` alone, never to standard output."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._lock = threading.RLock()
        self._titles: dict[str, str] = {}
        self._node = ""
        self._since = 0.0
        self._told = 0.0
        self._open = False  # whether the bar stands on the current line
        self._finished = False  # whether the end of the node's progress has been told

    def begin(self, prompt: Mapping[str, Any]) -> None:
        """Learn the nodes' titles."""
        self._titles = {
            node_id: str((node.get("_meta") or {}).get("title") or node["class_type"])
            for node_id, node in prompt.items()
        }

    def title(self, node_id: str) -> str:
        """A node's title; of a node made while running, its id."""
        return self._titles.get(node_id, node_id)

    def send(self, type: str, data: dict[str, Any], client_id: str | None) -> None:
        """Show that a node begins, or how far it is."""
        if type == "executing" and data.get("node") is not None:
            self._start(data["node"])
        elif type == "progress":
            self._progress(data["node"], data["value"], data["max"])

    def send_preview(self, image: Image.Image, metadata: dict[str, Any], client_id: str | None) -> None:
        """A terminal shows no pictures."""

    def send_text(self, text: str, node_id: str, prompt_id: str, client_id: str | None) -> None:
        """Show a node's words, each line under its title."""
        for line in text.splitlines():
            self.line(f"{self.title(node_id)}: {line}")

    def line(self, text: str) -> None:
        """Write a line of its own."""
        with self._lock:
            self.close()
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def close(self) -> None:
        """End the line of the bar."""
        with self._lock:
            if self._open:
                self._stream.write("\n")
                self._stream.flush()
            self._open = False

    def _start(self, node_id: str) -> None:
        with self._lock:
            self.close()
            self._node, self._finished = node_id, False
            self._since = self._told = time.monotonic()
            if self._live:
                self._draw(f"{self.title(node_id)} ...")
            else:
                self.line(f"{self.title(node_id)} ...")

    def _progress(self, node_id: str, value: float, total: float) -> None:
        with self._lock:
            if node_id != self._node:
                self._start(node_id)
            now = time.monotonic()
            text = bar(self.title(node_id), value, total, now - self._since)
            if self._live:
                self._draw(text)
            elif (value >= total and not self._finished) or now - self._told >= SECONDS_BETWEEN_LINES:
                self._told, self._finished = now, value >= total
                self.line(text)

    def _draw(self, text: str) -> None:
        width = max(20, shutil.get_terminal_size().columns - 1)
        self._stream.write(f"\r\x1b[2K{text[:width]}")
        self._stream.flush()
        self._open = True


def bar(title: str, value: float, total: float, seconds: float) -> str:
    """`Sample  50% |############            | 4/8 [00:02<00:02]`."""
    fraction = min(max(value / total, 0.0), 1.0) if total > 0 else 0.0
    full = round(BAR * fraction)
    left = _clock(seconds / fraction - seconds) if fraction else "?"
    return f"{title} {fraction:4.0%} |{'#' * full}{' ' * (BAR - full)}| {value:g}/{total:g} [{_clock(seconds)}<{left}]"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes:02}:{rest:02}"
