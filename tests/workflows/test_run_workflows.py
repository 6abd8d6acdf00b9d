"""Every shipped workflow runs for real on the demo model, and its pictures show what its prompts say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from fluxcanvas.demo import judge
from fluxcanvas.web.host.convert import convert
from fluxcanvas.web.host.examples import STARTER, WORKFLOWS, provide_inputs
from fluxcanvas.web.host.folders import Folders
from fluxcanvas.web.host.node_info import object_info
from fluxcanvas.web.host.run import Runner
from fluxcanvas.web.host.workflow_file import read_workflow

NAMES = sorted(path.stem for path in WORKFLOWS.glob("*.json"))
# What each saved picture is to show, by the prefix of its name. A picture is judged against what its prompts state.
SHOWS = {
    "text-to-image": {"fluxcanvas": ["a purple hot air balloon over a white house at sunset"]},
    "negative-prompt": {"fluxcanvas-negative": ["a yellow moon over a white house"]},
    "image-to-image": {"fluxcanvas-changed": ["a red house at sunset under a yellow sun"]},
    "batch": {"fluxcanvas-batch": ["a blue boat on the sea under a yellow sun"] * 4},
    "draw-twice": {
        "fluxcanvas-first": ["a red house on a green meadow"],
        "fluxcanvas-second": ["a red house in the snow"],
    },
    "subgraph": {
        "fluxcanvas-day": ["a white house on a green meadow under a yellow sun"],
        "fluxcanvas-night": ["a white house at night under a yellow moon"],
    },
}


@dataclass
class Bench:
    """A runner with the demo model and the definitions of its nodes."""

    runner: Runner
    definitions: dict

    def pictures(self, name: str, *settings: str) -> dict[str, list[Image.Image]]:
        """Run a shipped workflow; its pictures by the prefix of their names."""
        prepared = self.runner.prepare(read_workflow(WORKFLOWS / f"{name}.json"), settings)
        found: dict[str, list[Image.Image]] = {}
        for path in self.runner.execute(prepared).pictures:
            with Image.open(path) as picture:
                found.setdefault(path.name.partition("_")[0], []).append(picture.convert("RGB"))
        return found


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folders = Folders(tmp_path_factory.mktemp("base"))
    provide_inputs(folders.input)
    runner = Runner(folders, device="cpu")
    yield Bench(runner, object_info(runner.packs.nodes, runner.packs.display_names))
    folders.close()
    torch.set_num_threads(threads)


def test_every_workflow_is_judged():
    assert sorted(SHOWS) == NAMES and STARTER in NAMES


@pytest.mark.parametrize("name", NAMES)
def test_pictures_show_what_the_prompts_say(bench, name):
    pictures = bench.pictures(name)
    assert {prefix: len(found) for prefix, found in pictures.items()} == {
        key: len(texts) for key, texts in SHOWS[name].items()
    }
    for prefix, prompts in SHOWS[name].items():
        for picture, prompt in zip(pictures[prefix], prompts, strict=True):
            assert judge.follows(picture, prompt).reasons == (), f"{prefix}: {prompt}"


@pytest.mark.parametrize("name", NAMES)
def test_the_prompts_stand_in_the_file(name):
    text = (WORKFLOWS / f"{name}.json").read_text()
    assert all(json.dumps(prompt) in text for prompts in SHOWS[name].values() for prompt in prompts)


@pytest.mark.parametrize("name", NAMES)
def test_the_api_format_beside_it_is_the_same(bench, name):
    saved = json.loads((WORKFLOWS / f"{name}.json").read_text())
    assert convert(saved, bench.definitions) == json.loads((WORKFLOWS / "api" / f"{name}.json").read_text())


def test_there_is_an_api_file_and_a_thumbnail_for_each():
    assert sorted(path.stem for path in (WORKFLOWS / "api").iterdir()) == NAMES
    for path in WORKFLOWS.glob("*.jpg"):
        with Image.open(path) as picture:
            assert min(picture.size) >= 256
    assert sorted(path.stem for path in WORKFLOWS.glob("*.jpg")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_a_stranger_reads_what_it_is_for(name):
    saved = json.loads((WORKFLOWS / f"{name}.json").read_text())
    notes = [node for node in saved["nodes"] if node["type"] == "MarkdownNote"]
    assert len(notes) == 1 and 60 < len(notes[0]["widgets_values"][0]) < 500


@pytest.mark.parametrize("name", NAMES)
def test_no_node_covers_another(name):
    saved = json.loads((WORKFLOWS / f"{name}.json").read_text())
    for graph in (saved, *saved.get("definitions", {}).get("subgraphs", ())):
        boxes = [(*node["pos"], *node["size"], node["id"]) for node in graph["nodes"]]
        for left, top, width, height, key in boxes:
            for x, y, w, h, other in boxes:
                assert key >= other or left + width <= x or x + w <= left or top + height <= y - 30 or y + h <= top - 30


def test_the_negative_prompt_counts(bench):
    with_it = bench.pictures("negative-prompt")["fluxcanvas-negative"][0]
    without = bench.pictures("negative-prompt", "Sample.true_cfg_scale=1")["fluxcanvas-negative"][0]
    assert judge.look([with_it])[0].background != "night"
    assert judge.look([without])[0].background == "night"


def test_the_range_decides_how_much_of_a_picture_stays(bench):
    given = Image.open(WORKFLOWS / "inputs" / "fluxcanvas-house.png").convert("RGB").resize((128, 128))
    distances = [
        _distance(given, bench.pictures("image-to-image", f"Sample.start={start}")["fluxcanvas-changed"][0])
        for start in (0.1, 0.4, 0.7)
    ]
    assert distances == sorted(distances, reverse=True) and distances[0] > 3 * distances[-1]


def _distance(one: Image.Image, other: Image.Image) -> float:
    levels = [torch.tensor(list(picture.tobytes()), dtype=torch.float32) for picture in (one, other)]
    return (levels[0] - levels[1]).abs().mean().item()


def test_a_saved_picture_makes_itself_again(bench):
    prepared = bench.runner.prepare(read_workflow(WORKFLOWS / "subgraph.json"))
    first = bench.runner.execute(prepared).pictures
    names = ["Day.filename_prefix=day-again", "Night.filename_prefix=night-again"]
    again = bench.runner.execute(bench.runner.prepare(read_workflow(first[0]), names)).pictures
    assert [_bytes(path) for path in first] == [_bytes(path) for path in again]
    assert [path.name.partition("_")[0] for path in again] == ["day-again", "night-again"]


def _bytes(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.tobytes()
