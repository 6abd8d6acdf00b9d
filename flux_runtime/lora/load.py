"""A LoRA from a file, or from a repository of the hub."""

from __future__ import annotations

from pathlib import Path

from ..errors import FluxError
from ..weights.hub import Progress, fetch_model, split_source
from ..weights.sources import DEMO
from .formats import Lora, read_lora

DEMO_LORAS = {f"demo/{path.stem}": path for path in sorted((DEMO.parent / "loras").glob("*.safetensors"))}


def load_lora(source: str | Path, *, progress: Progress | None = None) -> Lora:
    """Read a LoRA from a .safetensors file, or from a repository: `owner/name`, or `owner/name/file.safetensors`.

    `demo/sepia` is the one that comes along, for the demo model. Its numbers stay in the mapped file until it is
    applied. Raises `FluxError` for what is no LoRA for FLUX.1.
    """
    text = str(source).strip()
    if text.startswith("demo/") and text not in DEMO_LORAS and not Path(text).exists():
        raise FluxError(f"there is no LoRA {text}; for the demo model there is {', '.join(DEMO_LORAS)}")
    path = DEMO_LORAS.get(text, Path(text).expanduser())
    if path.is_file():
        return read_lora(path)
    if path.is_dir():
        return read_lora(_only_file(path))
    named = None if isinstance(source, Path) else split_source(str(source))
    if named is None:
        raise FluxError(f"there is no LoRA file {source}, and it is no repository (owner/name); check the path")
    fetched = fetch_model(*named, progress)
    return read_lora(fetched if fetched.is_file() else _only_file(fetched), name=named[1] or named[0].split("/")[1])


def _only_file(folder: Path) -> Path:
    files = sorted(folder.glob("*.safetensors"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files[:8]) or "none"
        raise FluxError(f"{folder} should hold one LoRA and has {len(files)} .safetensors files ({names}); name one")
    return files[0]
