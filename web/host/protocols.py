"""What the execution core asks of its surroundings."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from PIL import Image

Nodes = Mapping[str, type]  # node id, as in NODE_CLASS_MAPPINGS, to its class
Prompt = dict[str, dict[str, Any]]  # node id to {"class_type", "inputs"}: the API format


class Events(Protocol):
    """Where the news of an execution goes. Every method may be called from any thread."""

    def send(self, type: str, data: dict[str, Any], client_id: str | None) -> None:
        """Send one event; `client_id` None sends it to everybody."""

    def send_preview(self, image: Image.Image, metadata: dict[str, Any], client_id: str | None) -> None:
        """Send a picture of work in progress; the metadata names the node and the prompt."""

    def send_text(self, text: str, node_id: str, prompt_id: str, client_id: str | None) -> None:
        """Send a line of text to show on a node."""


class ModelFolders(Protocol):
    """Where model files are found."""

    def roots(self, category: str) -> list[Path]:
        """The folders of a category."""

    def list(self, category: str) -> list[str]:
        """The names of the models in them."""

    def resolve(self, category: str, name: str) -> Path:
        """The path of a name; a FluxError names the folders searched."""
