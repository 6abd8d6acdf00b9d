"""Reads what `fluxcanvas run` is given: a workflow in either format, or a picture that carries one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .convert import WorkflowError, is_prompt

PICTURES = (".png", ".webp", ".jpg", ".jpeg")


@dataclass(frozen=True)
class WorkflowFile:
    """A workflow in UI format, a prompt in API format, or both when the file has both."""

    workflow: dict[str, Any] | None
    prompt: dict[str, Any] | None


def read_workflow(path: Path) -> WorkflowFile:
    """Read a .json file or a picture with a workflow in it; WorkflowError says why it cannot be read."""
    if not path.is_file():
        raise WorkflowError(f"There is no workflow file {path}; give the path of a .json file or of a saved picture.")
    try:
        if path.suffix.lower() in PICTURES:
            return _from_picture(path)
        content = path.read_bytes()
    except OSError as error:
        raise WorkflowError(f"{path} cannot be read: {error.strerror or error}.") from error
    return recognise(_parse(content, str(path)), str(path))


def recognise(content: Any, name: str = "The workflow") -> WorkflowFile:
    """Tell which format parsed JSON is in; WorkflowError when it is neither."""
    if isinstance(content, Mapping):
        if "nodes" in content:
            return WorkflowFile(dict(content), None)
        if is_prompt(content):
            return WorkflowFile(None, dict(content))
        if is_prompt(content.get("prompt")):  # the body of a request to a server
            return WorkflowFile(None, dict(content["prompt"]))
    raise WorkflowError(
        f"{name} is no workflow: neither the canvas's format (with 'nodes') nor the API format (nodes "
        "by id, each with a class_type); save or export it again from the canvas."
    )


def _parse(content: bytes | str, name: str) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        where = f" (line {error.lineno})" if isinstance(error, json.JSONDecodeError) else ""
        raise WorkflowError(f"{name} is not valid JSON{where}; save or export the workflow again.") from error


def _from_picture(path: Path) -> WorkflowFile:
    """The texts `prompt` and `workflow` that SaveImage writes. The prompt is what made the picture, so it counts."""
    from PIL import Image

    try:
        with Image.open(path) as picture:
            picture.load()  # texts may follow the pixels
            texts = {key: picture.info.get(key) for key in ("prompt", "workflow")}
    except (OSError, ValueError, SyntaxError) as error:
        raise WorkflowError(f"{path} is no picture that can be read: {error}.") from error
    found = {key: _parse(text, f"The {key} in {path}") for key, text in texts.items() if isinstance(text, (str, bytes))}
    if not found:
        raise WorkflowError(f"{path} carries no workflow; only pictures saved by Save Image with their metadata do.")
    workflow = recognise(found["workflow"], f"The workflow in {path}").workflow if "workflow" in found else None
    prompt = recognise(found["prompt"], f"The prompt in {path}").prompt if "prompt" in found else None
    return WorkflowFile(workflow, prompt)
