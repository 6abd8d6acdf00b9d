"""Every shipped workflow runs for real, on the demo model or on stand-ins, and shows what its prompts say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from fluxcanvas.demo import judge
from fluxcanvas.web.host.convert import convert
from fluxcanvas.web.host.examples import STARTER, WORKFLOWS
from fluxcanvas.web.host.workflow_file import read_workflow

NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
PIPELINES = (
    "text-to-image", "image-to-image", "inpaint", "fill", "outpaint", "control-canny", "control-depth",
    "control-image-to-image", "control-inpaint", "controlnet", "controlnet-image-to-image", "controlnet-inpaint",
    "redux", "kontext", "kontext-inpaint", "ip-adapter",
)  # fmt: skip
# What each saved picture is to show, by the prefix of its name: judged by what its prompt states, if given.
SHOWS = {
    "text-to-image": {"fluxcanvas": ["a purple hot air balloon over a white house at sunset"]},
    "negative-prompt": {"fluxcanvas-negative": ["a yellow moon over a white house"]},
    "image-to-image": {"fluxcanvas-changed": ["a red house at sunset under a yellow sun"]},
    "batch": {"fluxcanvas-batch": ["a blue boat on the sea under a yellow sun"] * 4},
    "draw-twice": {"fluxcanvas-twice": ["a red house in the snow"]},
    "subgraph": {
        "fluxcanvas-day": ["a white house on a green meadow under a yellow sun"],
        "fluxcanvas-night": ["a white house at night under a yellow moon"],
    },
    "inpaint": {"fluxcanvas-inpaint": ["a green tree on a meadow under a yellow sun"]},
    "dev": {"fluxcanvas-dev": ["a white house in the snow under a blue hot air balloon"]},
    "fill": {"fluxcanvas-fill": ["a green tree on a green meadow under a yellow sun"]},
    "control-canny": {"fluxcanvas-control-canny": ["a white house at sunset under a yellow sun"]},
    "control-depth": {"fluxcanvas-control-depth": ["a white house at sunset under a yellow sun"]},
    "control-inpaint": {"fluxcanvas-control-inpaint": ["a blue house on a green meadow under a yellow sun"]},
    "controlnet": {"fluxcanvas-controlnet": ["a red boat on the sea under a yellow sun"]},
    "controlnet-inpaint": {"fluxcanvas-controlnet-inpaint": ["a blue house on a green meadow under a yellow sun"]},
    "lora": {"fluxcanvas-lora": ["a white house in the snow under a blue hot air balloon"]},
    "lora-demo": {
        "fluxcanvas-plain": ["a purple hot air balloon over a white house at sunset"],
        "fluxcanvas-sepia": [""],  # of these colours the judge knows nothing
    },
    "lora-stack": {"fluxcanvas-lora-stack": ["a red boat on the sea under a yellow sun"]},
    "turbo-fill": {"fluxcanvas-turbo-fill": ["a green tree on a green meadow under a yellow sun"]},
    "eight-bits": {"fluxcanvas-eight-bits": ["a white house at night under a yellow moon"]},
    "quanto-float8": {"fluxcanvas-quanto-float8": ["a red house in the snow"]},
    "gguf": {"fluxcanvas-gguf": ["a blue boat on the sea under a yellow sun"]},
    "quantize": {"fluxcanvas-quantize": ["a red boat on the sea under a yellow sun"]},
}
# The width and height of what is not 128x128.
SIZES = {"outpaint": (192, 128), "soft-inpaint": (256, 256)}
# What tells in some lines of text on itself what it did, and how many pixels longer that makes it.
TELLING = {
    "LoadFlux": 60, "LoadFluxParts": 60, "LoadControlNet": 60, "LoadAdapter": 60, "Sample": 60, "DepthMap": 60,
    "CropForInpaint": 60, "KontextCanvas": 60, "EncodeImage": 60, "SaveModel": 60, "LoadLora": 90, "LoraStack": 120,
    "ApplyLora": 90, "Quantize": 200, "ModelReport": 340,
}  # fmt: skip
TITLE = 30


def read(name: str) -> dict:
    return json.loads((WORKFLOWS / f"{name}.json").read_text())


def graphs(saved: dict) -> list[dict]:
    """The workflow and the subgraphs in it."""
    return [saved, *saved.get("definitions", {}).get("subgraphs", ())]


def test_there_is_one_for_each_pipeline_and_some_for_combinations():
    assert set(PIPELINES) <= set(NAMES) and STARTER in NAMES and set(SHOWS) <= set(NAMES)
    kinds = [
        {node["type"] for node in read(name)["nodes"]}
        for name in ("fill-controlnet-redux-ip-adapter", "kontext-controlnet")
    ]
    wanted = ({"FillCondition", "ControlNet", "ReduxPrior", "IPAdapter"}, {"KontextCondition", "ControlNet"})
    for have, want in zip(kinds, wanted, strict=True):
        assert {f"FluxCanvas_{kind}" for kind in want} <= have


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_and_saves_its_pictures(bench, name):
    pictures = bench.pictures(name)
    expected = {prefix: len(texts) for prefix, texts in SHOWS.get(name, {f"fluxcanvas-{name}": [""]}).items()}
    assert {prefix: len(found) for prefix, found in pictures.items()} == expected
    for found in pictures.values():
        assert [picture.size for picture in found] == [SIZES.get(name, (128, 128))] * len(found)
        assert all(min(low for low, _ in p.getextrema()) < 200 and _deviation(p) > 5 for p in found), "an empty picture"


@pytest.mark.parametrize("name", sorted(SHOWS))
def test_pictures_show_what_the_prompts_say(bench, name):
    for prefix, prompts in SHOWS[name].items():
        for picture, prompt in zip(bench.pictures(name)[prefix], prompts, strict=True):
            assert not prompt or judge.follows(picture, prompt).reasons == (), f"{prefix}: {prompt}"


def _deviation(picture: Image.Image) -> float:
    """Of its grey levels."""
    return torch.tensor(list(picture.convert("L").tobytes()), dtype=torch.float32).std().item()


@pytest.mark.parametrize("name", sorted(SHOWS))
def test_the_prompts_stand_in_the_file(name):
    text = (WORKFLOWS / f"{name}.json").read_text()
    assert all(json.dumps(prompt) in text for prompts in SHOWS[name].values() for prompt in prompts)


@pytest.mark.parametrize("name", NAMES)
def test_the_api_format_beside_it_is_the_same(bench, name):
    assert convert(read(name), bench.definitions) == json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())


def test_there_is_an_api_file_and_a_thumbnail_for_each():
    assert sorted(path.stem for path in (WORKFLOWS / "api").iterdir()) == NAMES
    for path in WORKFLOWS.glob("*.jpg"):
        with Image.open(path) as picture:
            assert min(picture.size) >= 256
    assert sorted(path.stem for path in WORKFLOWS.glob("*.jpg")) == NAMES


def test_the_pictures_they_load_come_along_and_are_small():
    loaded = {
        node["widgets_values"][0]
        for name in NAMES
        for node in read(name)["nodes"]
        if node["type"].startswith("LoadImage")
    }
    assert loaded == {path.name for path in (WORKFLOWS / "inputs").iterdir()}
    assert all(path.stat().st_size < 60_000 for path in (WORKFLOWS / "inputs").iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_a_stranger_reads_what_it_is_for(name):
    notes = [node for node in read(name)["nodes"] if node["type"] == "MarkdownNote"]
    assert len(notes) == 1 and 60 < len(notes[0]["widgets_values"][0]) < 500


@pytest.mark.parametrize("name", NAMES)
def test_no_node_covers_another_not_even_with_text_on_it(name):
    for graph in graphs(read(name)):
        boxes = [_box(node) for node in graph["nodes"]]
        for index, (left, top, right, bottom) in enumerate(boxes):
            for x0, y0, x1, y1 in boxes[:index]:
                assert right <= x0 or x1 <= left or bottom <= y0 or y1 <= top


def _box(node: dict) -> tuple[float, float, float, float]:
    """Left, top, right, bottom, with the title above and room for what it tells below."""
    (left, top), (width, height) = node["pos"], node["size"]
    told = TELLING.get(node["type"].removeprefix("FluxCanvas_"), 0)
    return left, top - TITLE, left + width, top + height + told


def test_the_negative_prompt_counts(bench):
    with_it = bench.picture("negative-prompt")
    without = bench.picture("negative-prompt", "Sample.true_cfg_scale=1")
    assert judge.look([with_it])[0].background != "night"
    assert judge.look([without])[0].background == "night"


def test_the_range_decides_how_much_of_a_picture_stays(bench, distance):
    given = Image.open(WORKFLOWS / "inputs" / "fluxcanvas-house.png").convert("RGB").resize((128, 128))
    distances = [distance(given, bench.picture("image-to-image", f"Sample.start={start}")) for start in (0.1, 0.4, 0.7)]
    assert distances == sorted(distances, reverse=True) and distances[0] > 3 * distances[-1]


def test_a_saved_picture_makes_itself_again(bench):
    first = bench.run("subgraph").pictures
    names = ["Day.filename_prefix=day-again", "Night.filename_prefix=night-again"]
    again = bench.runner.execute(bench.runner.prepare(read_workflow(first[0]), names)).pictures
    assert [_bytes(path) for path in first] == [_bytes(path) for path in again]
    assert [path.name.partition("_")[0] for path in again] == ["day-again", "night-again"]


def _bytes(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()
