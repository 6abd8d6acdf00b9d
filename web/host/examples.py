"""The workflows that come along, and the pictures that they load."""

from __future__ import annotations

import shutil
from pathlib import Path

WORKFLOWS = Path(__file__).resolve().parents[2] / "workflows"
STARTER = "text-to-image"


def provide_inputs(folder: Path) -> list[Path]:
    """Copy the pictures of the shipped workflows into the input folder; what is there already stays. The new ones."""
    written = []
    for source in sorted((WORKFLOWS / "inputs").glob("*.png")):
        target = folder / source.name
        if not target.exists():
            folder.mkdir(parents=True, exist_ok=True)
            written.append(Path(shutil.copyfile(source, target)))
    return written
