"""Renews docs/canvas.png, the picture in the README: `python -m pytest tests/browser/shoot.py`.

No test: its name keeps it out of the suite.
"""

from __future__ import annotations

from PIL import Image

from fluxcanvas.demo import judge

PROMPT = "a red hot air balloon over a white house at sunset"
SEED = 11


def test_shoot(canvas, server, checkout, tmp_path):
    canvas.open_template()
    for setting in ("Comfy.Minimap.Visible", "Comfy.Graph.CanvasInfo"):
        canvas.set(setting, False)
    for title, widget, value in (
        ("Prompt", "prompt", PROMPT),
        ("Empty Canvas", "batch_size", 4),
        ("Sample", "seed", SEED),
        ("Sample", "control_after_generate", "fixed"),
    ):
        canvas.put(title, widget, value)
    canvas.run()
    canvas.wait("id => app.graph.getNodeById(id).imgs?.every(image => image.naturalWidth)", canvas.node("Save Image"))
    for picture in server.pictures():
        with Image.open(picture) as drawn:
            print(picture.name, judge.follows(drawn.convert("RGB"), PROMPT))
    canvas.command("Comfy.Canvas.FitView")
    canvas.page.get_by_text("Job completed").wait_for(state="detached")
    canvas.page.mouse.move(700, 880)
    canvas.page.wait_for_timeout(1000)  # the view glides to its place
    shot = tmp_path / "canvas.png"
    canvas.page.screenshot(path=shot)
    with Image.open(shot) as seen:
        seen.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(checkout / "docs/canvas.png", optimize=True)
    assert (checkout / "docs/canvas.png").stat().st_size < 400_000
