"""The canvas's settings, kept in one JSON file."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .files import write_atomic
from .replies import BadRequest

log = logging.getLogger("fluxcanvas")
# The release check is the one request that the canvas would send to the outside by itself.
DEFAULTS: Mapping[str, Any] = {"Comfy.Notification.ShowVersionUpdates": False}
# With this stored, the next new browser profile opens the frontend's built-in graph, whose nodes are not here.
NEVER_STORED = frozenset({"Comfy.TutorialCompleted"})
_LARGEST = 8 << 20


class Settings:
    """Setting id -> JSON value, written to the file at every change, whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stored = self._read()

    def _read(self) -> dict[str, Any]:
        """The stored settings; a file that is no JSON object is put aside, so that it can be looked at."""
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            return self._put_aside(str(error))
        return stored if isinstance(stored, dict) else self._put_aside("it is not a JSON object")

    def _put_aside(self, reason: str) -> dict[str, Any]:
        aside = self.path.with_suffix(".broken.json")
        log.warning("The settings in %s cannot be read (%s); they are kept as %s", self.path, reason, aside.name)
        try:
            os.replace(self.path, aside)
        except OSError as error:
            log.warning("%s could not be renamed: %s", self.path, error)
        return {}

    def all(self) -> dict[str, Any]:
        """Every setting, defaults included."""
        return {**DEFAULTS, **self._stored}

    def get(self, name: str) -> Any:
        """One setting, or None."""
        return self.all().get(name)

    def update(self, values: Mapping[str, Any]) -> None:
        """Change settings; FluxError when they cannot be written, and then nothing has changed."""
        changed = {**self._stored, **{name: value for name, value in values.items() if name not in NEVER_STORED}}
        if changed == self._stored:
            return
        data = json.dumps(changed, indent=2).encode()
        if len(data) > _LARGEST:
            raise BadRequest(f"The settings would take more than {_LARGEST >> 20} MiB; they are not stored.")
        write_atomic(self.path, data)
        self._stored = changed
