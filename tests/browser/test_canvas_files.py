"""What is kept: workflows and settings, workflows inside pictures, uploads, the list of runs; and the file format."""

from __future__ import annotations

import base64
import json

import pytest
from PIL import Image, ImageOps

from fluxcanvas.demo import judge
from fluxcanvas.web.host.convert import convert

DROP = """([data, name, event]) => {
  const file = new File([Uint8Array.from(atob(data), letter => letter.charCodeAt(0))], name, { type: "image/png" });
  if (!event) return app.handleFile(file);
  const dataTransfer = new DataTransfer();
  dataTransfer.items.add(file);
  app.canvas.canvas.dispatchEvent(new DragEvent("drop", { dataTransfer, bubbles: true, cancelable: true }));
}"""


def content(graph):
    """What a workflow consists of, without how it is looked at."""
    keys = ("id", "type", "title", "pos", "size", "mode", "widgets_values")
    nodes = {str(node["id"]): [node.get(key) for key in keys] for node in graph["nodes"]}
    return nodes, sorted(link[1:] for link in graph["links"])


def settings(canvas):
    return canvas.page.evaluate("async () => (await app.api.fetchApi('/settings')).json()")


def test_a_saved_workflow_and_settings_survive_a_killed_server(new_canvas, server):
    first = new_canvas().open_template()
    first.put("Prompt", "prompt", "a yellow boat on the sea")
    first.put("Sample", "seed", 77)
    first.set("Comfy.Graph.CanvasInfo", False)
    first.command("Comfy.SaveWorkflow")
    name = first.page.get_by_role("dialog").get_by_role("textbox")
    name.fill("kept")
    name.press("Enter")
    first.until(lambda: (server.base / "user/default/workflows/kept.json").is_file())
    before = content(first.graph())
    first.page.wait_for_load_state("networkidle")
    assert any(url.endswith("/settings/Comfy.TutorialCompleted") for url in first.requests)
    first.profile.close()

    server.kill()
    server.start()

    second = new_canvas().open()
    second.page.get_by_role("dialog").wait_for()  # the greeting of a new profile
    second.page.keyboard.press("Escape")
    second.page.get_by_test_id("workflows-tab-button").click()
    second.page.get_by_test_id("tree-node-root/kept.json").click()
    second.wait("count => app.graph._nodes.length === count", len(before[0]))
    assert content(second.graph()) == before
    assert second.value("Prompt", "prompt") == "a yellow boat on the sea"
    kept = settings(second)
    assert kept["Comfy.Graph.CanvasInfo"] is False and "Comfy.TutorialCompleted" not in kept


@pytest.mark.parametrize("event", [True, False], ids=["dropped", "opened"])
def test_a_saved_picture_brings_its_workflow_back(new_canvas, server, event):
    drawn = new_canvas().open_template()
    prefix = f"carrier-{event}"
    drawn.put("Save Image", "filename_prefix", prefix)
    drawn.put("Sample", "control_after_generate", "fixed")
    drawn.put("Sample", "seed", 2**53 - 1)
    drawn.run()
    [file] = server.pictures(prefix)
    with Image.open(file) as picture:
        inside = json.loads(picture.text["workflow"])
        assert json.loads(picture.text["prompt"])[drawn.node("Sample")]["inputs"]["seed"] == 2**53 - 1
    count = len(inside["nodes"])

    other = new_canvas().open_template("negative-prompt")
    other.page.evaluate(DROP, [base64.b64encode(file.read_bytes()).decode(), file.name, event])
    other.wait("count => app.graph._nodes.length === count", count)
    assert content(other.graph()) == content(inside)
    assert other.value("Save Image", "filename_prefix") == prefix


def test_our_conversion_equals_the_canvas_s_own(canvas, shipped):
    canvas.open()
    definitions = canvas.page.evaluate("async () => (await app.api.fetchApi('/object_info')).json()")
    for name, workflow in shipped.items():
        canvas.load(workflow, name)
        theirs = canvas.page.evaluate("async () => (await app.graphToPrompt()).output")
        assert convert(workflow, definitions) == theirs, name


def test_an_uploaded_picture_is_changed(canvas, server, checkout, tmp_path):
    [source] = (checkout / "workflows/inputs").glob("*house.png")
    mirrored = tmp_path / "mirrored.png"
    with Image.open(source) as picture:
        ImageOps.mirror(picture).save(mirrored)
    canvas.open_template("image-to-image")
    canvas.put("Save Image", "filename_prefix", "changed")
    with canvas.page.expect_file_chooser() as chooser:
        canvas.page.evaluate("app.graph._nodes.find(n => n.type === 'LoadImage').widgets.find(w => w.type === 'button')"
                             ".callback()")  # fmt: skip
    chooser.value.set_files(mirrored)
    canvas.wait("app.graph._nodes.find(n => n.type === 'LoadImage').widgets[0].value === 'mirrored.png'")
    canvas.until(lambda: (server.base / "input/mirrored.png").is_file())
    assert (server.base / "input/mirrored.png").read_bytes() == mirrored.read_bytes()
    canvas.run()
    [file] = server.pictures("changed")
    with Image.open(file) as picture:
        assert judge.follows(picture.convert("RGB"), canvas.value("Prompt", "prompt")).reasons == ()


def test_panels_list_the_runs_and_the_log(canvas, server):
    canvas.open_template()
    canvas.put("Save Image", "filename_prefix", "listed")
    canvas.put("Load FLUX", "dtype", "bfloat16")  # so that the model is loaded, and the log told so
    canvas.run()
    [file] = server.pictures("listed")
    canvas.page.get_by_test_id("queue-overlay-toggle").click()
    canvas.page.get_by_test_id("job-assets-list").get_by_text(file.name).wait_for()
    canvas.page.get_by_test_id("assets-tab-button").click()
    canvas.page.locator(f"img[src*='{file.name}']").first.wait_for()
    canvas.command("Workspace.ToggleBottomPanelTab.logs-terminal")
    canvas.wait("document.querySelector('.xterm-rows')?.innerText.includes('tensors used')")
