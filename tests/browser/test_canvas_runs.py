"""The Run button: progress, preview and picture; errors that say what to do; cancelling; Nodes 2.0."""

from __future__ import annotations

import io

import pytest
from PIL import Image, ImageChops, ImageStat

from fluxcanvas.demo import judge

PICTURE = "$$canvas-image-preview"  # the canvas's own widget for the picture on a node
GATED = "black-forest-labs/FLUX.1-schnell"  # cannot be had here: nothing may be downloaded in tests
# What Chromium and the canvas write to the console when the server refuses a prompt.
REFUSED = ("^answer: 400 .*/api/prompt$", "console: Failed to load resource.* 400 ", "console: PromptExecutionError")


def picture_on(canvas, title):
    """The picture on a node as it is on the screen: all that is coloured there, as the node itself is grey."""
    shot = Image.open(io.BytesIO(canvas.page.screenshot(clip=canvas.place(title, PICTURE)))).convert("RGB")
    saturation = shot.convert("HSV").getchannel("S")
    return shot.crop(saturation.point(lambda value: 255 * (value > 90)).getbbox())


def difference(one, other):
    """Mean difference of two pictures' channels, 0 to 255, at the size of the first."""
    return sum(ImageStat.Stat(ImageChops.difference(one, other.resize(one.size))).mean) / 3


def open_picture(path):
    with Image.open(path) as picture:
        return picture.convert("RGB")


def assert_runs(canvas, server, prefix):
    """The canvas makes a picture, whatever went wrong before."""
    canvas.put("Save Image", "filename_prefix", prefix)
    canvas.run()
    assert len(server.pictures(prefix)) == 1


def is_red(canvas, title):
    """Whether a node is marked as the one that is at fault."""
    return canvas.page.evaluate("title => app.graph._nodes.find(n => n.title === title).has_errors === true", title)


def test_run_shows_progress_preview_and_the_picture_that_was_asked_for(canvas, server):
    canvas.open_template()
    canvas.set("Comfy.Minimap.Visible", False)
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
    picture = open_picture(file)
    assert judge.follows(picture, canvas.value("Prompt", "prompt")).reasons == ()
    canvas.until(lambda: difference(picture_on(canvas, "Save Image"), picture) < 12)


def test_numbers_typed_out_of_range_are_put_into_it(canvas):
    canvas.open_template()
    typed = [("Sample", "steps", "5000"), ("Sample", "steps", "-3"), ("Empty Canvas", "width", "100000"),
             ("Empty Canvas", "width", "100")]  # fmt: skip
    values = []
    for title, widget, text in typed:
        canvas.type(title, widget, text)
        values.append(canvas.value(title, widget))
    assert values == [1000, 0, 8192, 96]


def test_a_value_out_of_range_is_named_and_mended(canvas, server):
    canvas.open_template()
    canvas.put("Sample", "steps", 5000)
    canvas.press_run()
    canvas.page.get_by_text("The value 5000 for Sample's steps is above the maximum 1000.").wait_for()
    assert is_red(canvas, "Sample") and not is_red(canvas, "Prompt")
    canvas.put("Sample", "steps", 4)
    assert_runs(canvas, server, "range")
    canvas.expect(*REFUSED)


def test_a_missing_connection_is_named_and_mended(canvas, server):
    canvas.open_template()
    canvas.page.evaluate("id => app.graph.getNodeById(id).disconnectInput('positive')", canvas.node("Sample"))
    canvas.press_run()
    canvas.page.get_by_text("Sample is missing a required input: positive").wait_for()
    assert is_red(canvas, "Sample")
    ends = [canvas.node("Prompt"), canvas.node("Sample")]
    canvas.page.evaluate("ids => { const [from, to] = ids.map(id => app.graph.getNodeById(id));"
                         "from.connect(0, to, 'positive') }", ends)  # fmt: skip
    assert_runs(canvas, server, "connection")
    canvas.expect(*REFUSED)


def test_what_a_node_refuses_is_told_in_its_own_words(canvas, server):
    canvas.open_template()
    canvas.put("Sample", "start", 0.9)
    canvas.put("Sample", "end", 0.2)
    canvas.press_run()
    toast = canvas.page.get_by_test_id("toast").filter(has_text="start (0.9) must lie before end (0.2)")
    toast.wait_for()  # one, though two inputs are refused
    assert is_red(canvas, "Sample")
    canvas.put("Sample", "start", 0)
    canvas.put("Sample", "end", 1)
    assert_runs(canvas, server, "refused")
    toast.wait_for(state="detached")
    canvas.expect(*REFUSED)


def test_an_error_during_a_run_is_told_in_its_own_words(canvas, server):
    canvas.open_template()
    canvas.put("Load FLUX", "source", GATED)
    canvas.press_run()
    error = canvas.wait_for("execution_error")
    assert GATED in error["exception_message"] and error["node_id"] == canvas.node("Load FLUX")
    toast = canvas.page.get_by_test_id("toast").filter(has_text=error["exception_message"])
    toast.wait_for()
    assert [job["status"] for job in canvas.jobs()[:1]] == ["failed"]
    canvas.put("Load FLUX", "source", "demo")
    assert_runs(canvas, server, "mended")
    toast.wait_for(state="detached")


# Adds a node to the graph and connects it as [from, to]; null stands for itself.
ADD = """([type, ends]) => {
  const added = LiteGraph.createNode(type);
  app.graph.add(added);
  const [from, to] = ends.map(title => app.graph._nodes.find(n => n.title === title) ?? added);
  from.connect(0, to, "model");
}"""
# What our extension keeps on a node: its text, whether all of it is seen, and whether the canvas's own line is gone.
KEPT = """find => {
  const node = eval(find), kept = node?.widgets?.find(w => w.name === "$$fluxcanvas-note")?.element;
  return kept?.clientHeight && {
    text: kept.textContent, whole: kept.scrollHeight <= kept.clientHeight + 1,
    once: !node.widgets.some(w => w.name === "$$node-text-preview"),
  };
}"""


def test_what_a_node_told_stays_on_it_whole_and_is_there_again_on_a_new_page(new_canvas):
    first = new_canvas().open_template()
    first.put("Sample", "control_after_generate", "fixed")
    first.page.evaluate(ADD, ["FluxCanvas_ModelReport", ["Load FLUX", None]])
    first.run()
    find = "app.graph._nodes.find(n => n.title === 'Model Report')"
    told = first.wait(KEPT, find)
    assert told["whole"] and told["once"] and "transformer:" in told["text"] and "FLUX.1 dev" in told["text"]

    second = new_canvas().open_template()
    second.load(first.graph(), "again")
    second.run()
    assert second.wait(KEPT, find) == told


def test_a_text_box_keeps_room_for_its_lines_above_what_its_node_told(canvas):
    canvas.open_template()
    canvas.page.evaluate(ADD, ["FluxCanvas_Quantize", ["Load FLUX", None]])
    canvas.page.evaluate(ADD, ["FluxCanvas_ModelReport", ["Quantize", None]])
    canvas.run()
    find = "app.graph._nodes.find(n => n.title === 'Quantize')"
    told = canvas.wait(KEPT, find)
    box = canvas.wait(f"{find}.widgets.find(w => w.name === 'keep').element.clientHeight")
    assert told["whole"] and "linear layers as fp8" in told["text"] and box >= 60


def test_a_node_in_a_subgraph_keeps_what_it_told(canvas):
    canvas.open_template("subgraph")
    canvas.run()
    inside = "app.graph._nodes.flatMap(n => n.subgraph?._nodes ?? []).flatMap(n => n.widgets ?? [])"
    canvas.wait(f"{inside}.some(w => w.name === '$$fluxcanvas-note' && w.element.textContent.includes('seed'))")


def test_an_empty_list_of_files_is_told_as_such(canvas):
    canvas.open_template()
    canvas.page.evaluate(ADD, ["FluxCanvas_LoadFluxParts", [None, "Sample"]])
    canvas.press_run()
    said = "No file to choose for transformer, clip, t5, vae"
    canvas.page.get_by_test_id("toast").filter(has_text=said).wait_for()
    canvas.expect(*REFUSED)


def further_steps(story, node):
    """How many steps a node did after the server had answered that it will stop."""
    answered = story.index({"type": "answer", "detail": "/api/interrupt"})
    steps = [
        (place, told["detail"]["nodes"][node]["value"])
        for place, told in enumerate(story)
        if told["type"] == "progress_state" and node in told["detail"]["nodes"]
    ]
    return steps[-1][1] - max(value for place, value in steps if place < answered)


def test_a_run_is_cancelled_within_a_step_and_the_next_one_works(canvas, server):
    canvas.open_template()
    canvas.put("Sample", "steps", 1000)
    canvas.press_run()
    canvas.wait_for("b_preview_with_metadata")
    canvas.page.get_by_role("button", name="Cancel current run").click()
    stopped = canvas.wait_for("execution_interrupted")
    sample = canvas.node("Sample")
    assert stopped["node_id"] == sample and not canvas.recorded("execution_error")
    assert further_steps(canvas.story(), sample) <= 3  # one, and what was on its way when the server answered
    job = canvas.jobs()[0]
    assert (job["id"], job["status"]) == (stopped["prompt_id"], "cancelled")
    canvas.put("Sample", "steps", 4)
    assert_runs(canvas, server, "after")


@pytest.fixture
def modern(canvas):
    """A canvas that draws its nodes as page elements (Nodes 2.0); the setting is put back."""
    canvas.open_template()
    canvas.set("Comfy.VueNodes.Enabled", True)
    canvas.wait("document.querySelectorAll('[data-node-id]').length === app.graph._nodes.length")
    yield canvas
    canvas.set("Comfy.VueNodes.Enabled", False)
    canvas.wait("!document.querySelector('[data-node-id]')")


def test_nodes_drawn_as_page_elements_show_preview_and_picture(modern, server):
    modern.put("Sample", "steps", 30)
    modern.put("Save Image", "filename_prefix", "modern")
    modern.press_run()
    seen = "id => [...document.querySelectorAll(`[data-node-id='${id}'] img`)].find(i => i.naturalWidth)?.src"
    assert modern.wait(seen, modern.node("Sample")).startswith("blob:")
    modern.wait_for("execution_success")
    [file] = server.pictures("modern")
    assert f"filename={file.name}" in modern.wait(seen, modern.node("Save Image"))
