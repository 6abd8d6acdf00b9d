"""The loaders: what they offer, what they find, and when they must run again."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.variants import VARIANTS
from fluxcanvas.nodes import NODE_CLASS_MAPPINGS

BARE = "small/diffusion_pytorch_model.safetensors"


def test_interruption_stops_a_load(host, run):
    host.stop_at = 2
    with pytest.raises(host.Stopped):
        run("LoadFlux", source="demo")
    assert len(host.steps) == 1


def link_files(source: Path, target: Path) -> None:
    """The same tree of folders, with links for files."""
    shutil.copytree(source, target, copy_function=os.symlink)


@pytest.fixture
def library(tmp_path, demo, checkout) -> Path:
    """A models folder laid out like ComfyUI's, with the demo model whole and in parts."""
    weights, models = checkout / "demo" / "weights", tmp_path / "models"
    parts = {
        "diffusion_models/small": "transformer",
        "text_encoders/clip": "text_encoder",
        "text_encoders/t5": "text_encoder_2",
        "vae/small": "vae",
        "diffusers/storybook": ".",
        "tokenizers/clip": "tokenizer",
        "tokenizers/t5": "tokenizer_2",
        "tokenizers/storybook/tokenizer": "tokenizer",
        "tokenizers/storybook/tokenizer_2": "tokenizer_2",
    }
    for name, part in parts.items():
        link_files(weights / part, models / name)
    (models / "diffusion_models" / "old.ckpt").write_bytes(b"pickle")
    return models


def choices(node: str, name: str) -> list[str]:
    return NODE_CLASS_MAPPINGS[f"FluxCanvas_{node}"].INPUT_TYPES()["required"][name][0]


def test_sources_are_the_demo_then_what_is_there_then_what_can_be_downloaded(library):
    found = ["storybook", BARE]
    assert choices("LoadFlux", "source") == ["demo", *found, *(variant.repo_id for variant in VARIANTS.values())]
    assert choices("LoadFluxParts", "transformer") == [BARE]
    assert choices("LoadFluxParts", "t5") == ["clip/model.safetensors", "t5/model.safetensors"]
    assert choices("LoadFluxParts", "tokenizers") == ["auto", "storybook"]


def test_without_model_folders_there_is_the_demo_and_downloads():
    assert choices("LoadFlux", "source")[0] == "demo" and choices("LoadFluxParts", "vae") == []


def test_a_folder_from_the_library_loads_and_draws_as_the_demo_does(library, draw, run):
    model, _, _ = run("LoadFlux", source="storybook")
    assert torch.equal(draw(model=model)["samples"], draw()["samples"])


@pytest.mark.parametrize("tokenizers", ["auto", "storybook"])
def test_parts_chosen_one_by_one_draw(library, host, draw, tokenizers, run):
    parts = {"transformer": BARE, "clip": "clip/model.safetensors", "t5": "t5/model.safetensors", "vae": BARE}
    model, text, vae = run("LoadFluxParts", **parts, variant="krea", tokenizers=tokenizers)
    assert model.variant.name == "krea" and "FLUX.1 krea" in host.texts[-1]
    (positive,) = run("EncodePrompt", text=text, prompt="a red house at night", max_tokens=32)
    drawn = draw(model=model, positive=positive)
    assert run("Decode", vae=vae, latent=drawn)[0].isfinite().all()


@pytest.mark.parametrize("node", ["LoadFlux", "LoadFluxParts"])
def test_auto_finds_the_tokenizers_that_fit_in_folders_of_their_own(library, run, shared, node):
    for name in ("clip", "t5"):
        shutil.rmtree(library / "tokenizers" / name)
    shutil.rmtree(library / "diffusers")
    for name, part in {"clip": "tokenizer", "t5": "tokenizer_2"}.items():
        link_files(shared / "tokenizers" / name, library / "tokenizers" / "another" / part)
    parts = {"transformer": BARE, "clip": "clip/model.safetensors", "t5": "t5/model.safetensors", "vae": BARE}
    _, text, _ = run(node, **({"source": BARE} if node == "LoadFlux" else parts))
    assert (len(text.clip_tokenizer), len(text.t5_tokenizer)) == (770, 191)


def test_a_bare_transformer_finds_its_partners_in_the_folders(library, run):
    model, text, vae = run("LoadFlux", source=BARE, dtype="bfloat16")
    assert model.dtype == torch.bfloat16 and text is not None and vae is not None
    before = NODE_CLASS_MAPPINGS["FluxCanvas_LoadFlux"].IS_CHANGED(source=BARE)
    (library / "vae" / "another.safetensors").write_bytes(b"")
    assert before != NODE_CLASS_MAPPINGS["FluxCanvas_LoadFlux"].IS_CHANGED(source=BARE)


def test_a_downloadable_name_that_lies_in_the_folders_is_taken_from_there(library, checkout, host, run):
    local = library / "diffusers" / "black-forest-labs" / "FLUX.1-dev"
    link_files(checkout / "demo" / "weights", local)
    assert choices("LoadFlux", "source").count("black-forest-labs/FLUX.1-dev") == 1
    run("LoadFlux", source="black-forest-labs/FLUX.1-dev")
    assert str(local) in host.texts[-1]


def test_a_source_that_is_not_there_names_the_folders(run):
    for name in ("gone.safetensors", "../../etc/passwd", "/etc/passwd", ""):
        with pytest.raises(FluxError, match=r"is not in .*diffusion_models.*put it there"):
            run("LoadFlux", source=name)


def test_the_fingerprint_follows_the_files(library):
    changed = NODE_CLASS_MAPPINGS["FluxCanvas_LoadFlux"].IS_CHANGED
    assert changed(source="demo", dtype="auto") == changed(source="demo", dtype="float32")
    file = library / "checkpoints" / "own.safetensors"
    file.parent.mkdir()
    file.write_bytes(b"one")
    before = changed(source="own.safetensors", dtype="auto")
    assert before == changed(source="own.safetensors", dtype="auto")
    os.utime(file, ns=(1, 1))
    touched = changed(source="own.safetensors", dtype="auto")
    file.write_bytes(b"longer")
    os.utime(file, ns=(1, 1))
    assert len({before, touched, changed(source="own.safetensors", dtype="auto")}) == 3
