"""The last lines of the log, for the canvas's Logs panel."""

from __future__ import annotations

import collections
import datetime
import logging
import threading
from collections.abc import Callable
from typing import Any

Send = Callable[[str, dict[str, Any], str], None]


class LogBuffer(logging.Handler):
    """Keeps the last lines and sends new ones to the clients that asked for them."""

    def __init__(self, send: Send, lines: int = 300) -> None:
        """`send(type, data, client_id)` is how a line reaches a client."""
        super().__init__(logging.INFO)
        self._send = send
        self._entries: collections.deque[dict[str, str]] = collections.deque(maxlen=lines)
        self._subscribers: set[str] = set()
        self._sending = threading.local()

    def emit(self, record: logging.LogRecord) -> None:
        time = datetime.datetime.fromtimestamp(record.created).isoformat(timespec="milliseconds")
        try:
            entry = {"t": time, "m": self.format(record) + "\n"}
        except Exception:  # whoever logs a malformed line, in any library, must not fail by it
            return self.handleError(record)
        self._entries.append(entry)
        if getattr(self._sending, "now", False):
            return
        self._sending.now = True  # what sending itself logs is kept but not sent, or it would never end
        try:
            for client_id in tuple(self._subscribers):
                self._send("logs", {"entries": [entry]}, client_id)
        finally:
            self._sending.now = False

    def entries(self) -> list[dict[str, str]]:
        """The kept lines, oldest first: {"t": time, "m": text}."""
        return list(self._entries)

    def subscribe(self, client_id: str, enabled: bool) -> None:
        """Start or stop sending new lines to a client."""
        if enabled:
            self._subscribers.add(client_id)
        else:
            self._subscribers.discard(client_id)
