"""What a node may ask of the program that runs it, and which program that is.

Three programs run nodes: ComfyUI (`comfy_host.py`), the embedded host, which registers its own answers with `use`, and
plain Python, where `LocalHost` answers.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ..flux_runtime.errors import FluxError

if TYPE_CHECKING:
    import torch
    from PIL import Image

log = logging.getLogger("fluxcanvas")
WEIGHTS = (".safetensors", ".sft", ".gguf")
FOLDER_MARKS = {  # categories that are listed as folders, not files: the file by which a folder is known
    "diffusers": "model_index.json",
    "tokenizers": "tokenizer_config.json",
    "depth": "config.json",
    "integrity": "config.json",
}
DEEPEST = 3  # levels below a models folder at which a model may lie


class Host(Protocol):
    """The questions. Every one may be asked from the thread that runs the node."""

    def progress(self, value: int, total: int, preview: Image.Image | None = None) -> None:
        """Show how far the running node is, with a picture of the work so far."""

    def text(self, text: str) -> None:
        """Show a line of text on the running node."""

    def check_interrupt(self) -> None:
        """Raise the host's own exception when the user asked to stop."""

    def folders(self, category: str) -> list[Path]:
        """The folders of a category of models, such as "diffusion_models"; they need not exist."""

    def files(self, category: str) -> list[str]:
        """What lies in those folders: sorted names, "/" between, of weight files (or, for some categories, folders)."""

    def resolve(self, category: str, name: str) -> Path:
        """The path of one of `files(category)`; a `FluxError` names the folders searched."""

    def device(self) -> torch.device:
        """Where to compute."""

    def free_memory(self, bytes_needed: int) -> None:
        """Make room on that device, at other models' expense."""

    def interrupted(self, error: BaseException) -> bool:
        """Whether an exception is the host's way to stop a node."""


class LocalHost:
    """Plain Python: text goes to the log, models lie below `models`, a folder laid out like ComfyUI's."""

    def __init__(self, models: Path | None = None) -> None:
        self.models = models

    def progress(self, value: int, total: int, preview: Image.Image | None = None) -> None:
        log.debug("step %d of %d", value, total)

    def text(self, text: str) -> None:
        log.info(text)

    def check_interrupt(self) -> None:
        """Nobody can interrupt but by Ctrl+C, which needs no help."""

    def folders(self, category: str) -> list[Path]:
        return [self.models / category] if self.models else []

    def files(self, category: str) -> list[str]:
        return list_models(self.folders(category), category)

    def resolve(self, category: str, name: str) -> Path:
        return find_model(self.folders(category), category, name)

    def device(self) -> torch.device:
        import torch

        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")

    def free_memory(self, bytes_needed: int) -> None:
        """There are no models but the caller's."""

    def interrupted(self, error: BaseException) -> bool:
        return isinstance(error, KeyboardInterrupt)


_registered: list[Host] = []


def use(host: Host) -> None:
    """Let `host` answer from now on."""
    _registered[:] = [host]


def current() -> Host:
    """The registered host, else ComfyUI when this is its process, else plain Python."""
    if not _registered:
        use(_comfy() or LocalHost())
    return _registered[0]


def _comfy() -> Host | None:
    """ComfyUI imports these two before it loads a pack."""
    if "folder_paths" not in sys.modules or "comfy.model_management" not in sys.modules:
        return None
    from .comfy_host import ComfyHost

    return ComfyHost()


def list_models(folders: Iterable[Path], category: str) -> list[str]:
    """The names of the models in these folders, as `Host.files` gives them."""
    mark = FOLDER_MARKS.get(category)
    names = set()
    for folder in folders:
        for path in walk(folder):
            found = path.parent if path.name == mark else path if not mark and path.suffix in WEIGHTS else folder
            if found != folder:
                names.add(found.relative_to(folder).as_posix())
    return sorted(names)


def walk(folder: Path, depth: int = DEEPEST) -> Iterator[Path]:
    """The files in a folder and some levels below it, in order; links to folders are followed."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:  # absent or unreadable: it holds nothing for us
        return
    for entry in entries:
        if entry.is_file():
            yield entry
        elif depth and entry.is_dir() and not entry.name.startswith("."):
            yield from walk(entry, depth - 1)


def find_model(folders: Sequence[Path], category: str, name: str) -> Path:
    """The path of a listed name. It cannot lead out of the folders; links inside them are followed."""
    within = Path(name)
    if name and not within.is_absolute() and ".." not in within.parts:
        for folder in folders:
            if (folder / within).exists():
                return folder / within
    searched = " or ".join(str(folder) for folder in folders) or "no folder at all"
    raise FluxError(f"the model {name!r} is not in {searched} ({category}); put it there, or choose another")
