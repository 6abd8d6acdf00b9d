"""Makes workflows/api/ and the thumbnails anew: python -m fluxcanvas.web.host.thumbnails [NAME ...]

A thumbnail is what the demo model draws. Workflows of published models keep theirs, which are drawings of what they do.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ...nodes.load import DEMO
from .convert import convert
from .examples import WORKFLOWS, provide_inputs
from .folders import Folders
from .node_info import object_info
from .run import Prepared, Runner
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


def needs_models(prompt: dict[str, Any]) -> bool:
    """Whether a workflow loads other models than the demo."""
    inputs = [node["inputs"] for node in prompt.values()]
    return any(given.get("source", DEMO) != DEMO or "transformer" in given for given in inputs)


def make(path: Path, runner: Runner) -> None:
    """Write the API format of one workflow, and its thumbnail if the demo model draws it."""
    source = read_workflow(path)
    prompt = convert(source.workflow, object_info(runner.packs.nodes, runner.packs.display_names))
    text = json.dumps(prompt, indent=2, ensure_ascii=False)
    (path.parent / "api" / path.name).write_text(text + "\n", encoding="utf-8")
    if not needs_models(prompt):
        _draw(runner.prepare(source), runner).save(path.with_suffix(".jpg"), quality=88)


def _draw(prepared: Prepared, runner: Runner) -> Image.Image:
    return thumbnail([Image.open(picture) for picture in runner.execute(prepared).pictures])


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
