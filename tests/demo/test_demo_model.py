"""The shipped model, through the public runtime: it follows prompts, and it is small."""

import json
from pathlib import Path

import pytest

from fluxcanvas.demo import WEIGHTS, judge
from fluxcanvas.demo.evaluation import figures, held_out, judge_pictures
from fluxcanvas.flux_runtime import load_lora, text_to_image

SEED = "captions for the test of the model"
MEGABYTE = 1_000_000


def test_held_out_captions_are_followed(demo):
    captions = [told for _, told in held_out(24, SEED, main_words=True)]

    def draw(texts, seed):
        return text_to_image(demo, texts, width=128, height=128, steps=8, guidance=3.5, seed=seed)

    found = figures(judge_pictures(draw, captions, batch=12))
    assert found.all >= 50, found.line()
    assert found.shares["background"] >= 95, found.line()
    assert found.shares["there"] >= 65, found.line()


def test_another_prompt_is_another_picture(demo):
    prompts = ["a yellow sun on a blue background", "a red house in the snow"]
    images = text_to_image(demo, prompts, width=128, height=128, steps=8, guidance=3.5, seed=3)
    seen = judge.look(images)
    assert [one.background for one in seen] == ["plain", "snow"]
    assert not judge.follows(images[0], prompts[1]).ok and not judge.follows(images[1], prompts[0]).ok


def test_its_lora_draws_in_sepia(demo):
    """Of an old print all is brown: nowhere more blue than green, or more green than red."""
    prompts = ["a red house on a green meadow under a yellow sun", "a blue boat on the sea"]

    def brown(flux) -> float:
        images = text_to_image(flux, prompts, width=128, height=128, steps=8, seed=5, output="numpy")
        red, green, blue = images[..., 0], images[..., 1], images[..., 2]
        return ((red > green) & (green > blue)).mean()

    assert brown(demo.with_loras(load_lora("demo/sepia"))) > 0.9
    assert brown(demo) < 0.3


def test_the_package_is_small():
    files = [path for path in WEIGHTS.parent.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 25 * MEGABYTE
    assert (WEIGHTS.parent / "judge.safetensors").stat().st_size <= 1.5 * MEGABYTE
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".pkl", ".model")]


@pytest.mark.parametrize("config", sorted(WEIGHTS.rglob("*.json")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_its_configs_name_no_machine(config: Path):
    text = config.read_text(encoding="utf-8")
    json.loads(text)
    assert "_name_or_path" not in text and "local_files_only" not in text


def test_its_own_token_length_is_the_default(demo):
    wanted = json.loads((WEIGHTS / "tokenizer_2" / "tokenizer_config.json").read_text())["model_max_length"]
    assert demo.text.default_tokens == wanted <= 64
    assert demo.text.encode("a red house").tokens.shape[1] == wanted
