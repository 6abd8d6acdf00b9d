"""Makes workflows/api/ and the thumbnails anew: python -m fluxcanvas.web.host.thumbnails [NAME ...]"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from .examples import WORKFLOWS, provide_inputs
from .folders import Folders
from .run import Runner
from .workflow_file import read_workflow

SIDE = 256  # of each picture in a thumbnail, in pixels


def thumbnail(pictures: Sequence[Image.Image]) -> Image.Image:
    """The pictures side by side, four of them as a square."""
    columns = math.ceil(math.sqrt(len(pictures)))
    sheet = Image.new("RGB", (columns * SIDE, math.ceil(len(pictures) / columns) * SIDE))
    for index, picture in enumerate(pictures):
        fitted = picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.LANCZOS)
        sheet.paste(fitted, (index % columns * SIDE, index // columns * SIDE))
    return sheet


def make(path: Path, runner: Runner) -> None:
    """Write the API format and the thumbnail of one workflow."""
    prepared = runner.prepare(read_workflow(path))
    text = json.dumps(prepared.prompt, indent=2, ensure_ascii=False)
    (path.parent / "api" / path.name).write_text(text + "\n", encoding="utf-8")
    pictures = [Image.open(picture) for picture in runner.execute(prepared).pictures]
    thumbnail(pictures).save(path.with_suffix(".jpg"), quality=88)


def main(names: Sequence[str]) -> None:
    """Make those of these workflows, or of all."""
    (WORKFLOWS / "api").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as base:
        folders = Folders(Path(base))
        provide_inputs(folders.input)
        runner = Runner(folders, device="cpu")
        for path in sorted(WORKFLOWS.glob("*.json")):
            if not names or path.stem in names:
                make(path, runner)
                print(path.stem)
        folders.close()


if __name__ == "__main__":
    main(sys.argv[1:])
