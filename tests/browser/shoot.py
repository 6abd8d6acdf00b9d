"""Renews docs/canvas.png, the picture in the README: `python -m pytest tests/browser/shoot.py`.

No test: its name keeps it out of the suite.
"""

from __future__ import annotations

from PIL import Image

from fluxcanvas.demo import judge

PROMPT = "a blue boat on the sea under a yellow sun"
SEED = 3
# The nodes as large as fits beside the sidebar and below the bar at the top.
FIT = """() => {
  const boxes = app.graph._nodes.map(node => node.getBounding()), { ds } = app.canvas;
  const [left, top] = [0, 1].map(i => Math.min(...boxes.map(box => box[i])));
  const [right, bottom] = [0, 1].map(i => Math.max(...boxes.map(box => box[i] + box[i + 2])));
  ds.scale = Math.min(1360 / (right - left), 720 / (bottom - top));
  ds.offset[0] = (56 + 1444 / 2) / ds.scale - (left + right) / 2;
  ds.offset[1] = (80 + 800 / 2) / ds.scale - (top + bottom) / 2;
  app.canvas.setDirty(true, true);
}"""


def test_shoot(canvas, server, checkout):
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
    for file in server.pictures():
        with Image.open(file) as picture:
            assert judge.follows(picture.convert("RGB"), PROMPT).reasons == ()
    canvas.page.evaluate(FIT)
    canvas.page.mouse.move(700, 880)
    canvas.page.get_by_test_id("queue-notification-banner").wait_for(state="detached")
    target = checkout / "docs/canvas.png"
    canvas.page.screenshot(path=target)
    with Image.open(target) as seen:
        seen.convert("RGB").save(target, optimize=True)
    assert target.stat().st_size < 400_000
