"""The workflows that come along, and the pictures that they load."""

from __future__ import annotations

from pathlib import Path

from .files import write_atomic

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
STARTER = "text-to-image"


def provide_inputs(folder: Path) -> list[Path]:
    """Copy the shipped workflows' pictures into the input folder, each whole; what is there stays. The new ones."""
    written = []
    for source in sorted((WORKFLOWS / "inputs").glob("*.png")):
        target = folder / source.name
        if not target.exists():
            write_atomic(target, source.read_bytes())
            written.append(target)
    return written
