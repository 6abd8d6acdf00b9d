"""ComfyUI as a host: its folders, device, memory, progress bar and interruption.

Its modules are imported where they are asked, and only what has kept its shape from 2023 on is used; the text line,
which older versions lack, goes to the log there.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .host import FOLDER_MARKS, WEIGHTS, find_model, list_models

if TYPE_CHECKING:
    import torch
    from PIL import Image

log = logging.getLogger("fluxcanvas")
PREVIEW_SIDE = 512


class ComfyHost:
    """Answers with what ComfyUI itself would do."""

    def progress(self, value: int, total: int, preview: Image.Image | None = None) -> None:
        from comfy.utils import ProgressBar

        shown = None if preview is None else ("JPEG", preview, PREVIEW_SIDE)
        ProgressBar(total).update_absolute(value, total, shown)

    def text(self, text: str) -> None:
        log.info(text)
        server, node = _server(), _running_node()
        if node and hasattr(server, "send_progress_text"):
            server.send_progress_text(text, node)

    def check_interrupt(self) -> None:
        _management().throw_exception_if_processing_interrupted()

    def folders(self, category: str) -> list[Path]:
        import folder_paths

        if category in folder_paths.folder_names_and_paths:
            return [Path(folder) for folder in folder_paths.get_folder_paths(category)]
        return [Path(folder_paths.models_dir) / category]

    def files(self, category: str) -> list[str]:
        import folder_paths

        if category in FOLDER_MARKS or category not in folder_paths.folder_names_and_paths:
            return list_models(self.folders(category), category)
        names = {name.replace("\\", "/") for name in folder_paths.get_filename_list(category)}
        packed = {name for name in list_models(self.folders(category), category) if name.endswith(".gguf")}
        return sorted(name for name in names | packed if name.endswith(WEIGHTS))  # ComfyUI itself lists no .gguf

    def resolve(self, category: str, name: str) -> Path:
        return find_model(self.folders(category), category, name)

    def device(self) -> torch.device:
        return _management().get_torch_device()

    def free_memory(self, bytes_needed: int) -> None:
        management = _management()
        management.free_memory(bytes_needed, management.get_torch_device())

    def interrupted(self, error: BaseException) -> bool:
        return isinstance(error, (_management().InterruptProcessingException, KeyboardInterrupt))


def _management() -> Any:
    from comfy import model_management

    return model_management


def _server() -> Any:
    """ComfyUI's running server, or None where its modules are used without one."""
    return getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)


def _running_node() -> str | None:
    """The id of the node being run, where this version tells it."""
    try:
        from comfy_execution.utils import get_executing_context
    except ImportError:
        return getattr(_server(), "last_node_id", None)
    context = get_executing_context()
    return context.node_id if context else None
