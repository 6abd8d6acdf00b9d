"""The Run button: progress, preview and picture; errors that say what to do; cancelling; the canvas's two renderers."""

from __future__ import annotations

import io

from PIL import Image, ImageChops, ImageStat

from fluxcanvas.demo import judge


def picture_on(canvas, title):
    """The coloured part of a node as it is on the screen: the nodes themselves are nearly grey."""
    shot = Image.open(io.BytesIO(canvas.page.screenshot(clip=canvas.place(title)))).convert("HSV")
    return shot.convert("RGB").crop(shot.getchannel("S").point(lambda value: 255 * (value > 90)).getbbox())


def difference(one, other):
    """Mean difference of two pictures' channels, 0 to 255, at the size of the first."""
    return sum(ImageStat.Stat(ImageChops.difference(one, other.resize(one.size))).mean) / 3


def test_run_shows_progress_preview_and_the_picture_that_was_asked_for(canvas, server):
    canvas.open_template()
    canvas.put("Sample", "control_after_generate", "fixed")
    canvas.put("Save Image", "filename_prefix", "asked")
    canvas.put("Sample", "steps", 30)
    canvas.press_run()
    sample = canvas.node("Sample")
    preview = canvas.wait("id => app.graph.getNodeById(id).imgs?.[0]?.naturalWidth", sample)
    assert preview > 0 and not canvas.recorded("execution_success")

    canvas.wait_for("execution_success")
    states = [told["nodes"].get(sample) for told in canvas.recorded("progress_state")]
    steps = [state["value"] for state in states if state and state["max"] == 30]
    assert steps == sorted(steps) and set(steps) >= set(range(1, 31))
    assert {told["nodeId"] for told in canvas.recorded("b_preview_with_metadata")} == {sample}

    canvas.wait("id => app.graph.getNodeById(id).imgs?.[0]?.naturalWidth === 128", canvas.node("Save Image"))
    [file] = server.pictures("asked")
    with Image.open(file) as saved:
        picture = saved.convert("RGB")
    assert judge.follows(picture, canvas.value("Prompt", "prompt")).reasons == ()
    assert difference(picture_on(canvas, "Save Image"), picture) < 12
