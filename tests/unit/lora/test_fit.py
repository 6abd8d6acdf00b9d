"""Whether a LoRA goes with a model is told before anything of the model is touched."""

from pathlib import Path

import pytest
import torch

from fluxcanvas.flux_runtime import FluxError
from fluxcanvas.flux_runtime.lora.fit import fit
from fluxcanvas.flux_runtime.lora.formats import Lora
from fluxcanvas.flux_runtime.lora.patches import LowRank, NormChange

KEY = "single_blocks.1.norm.key_norm.scale"


def layers(count: int) -> dict:
    low = LowRank(down=torch.ones(1, 64), up=torch.ones(64, 1))
    return {f"double_blocks.{index}.img_attn.proj": (low,) for index in range(count)}


def lora(changes: dict | None = None, part: str = "transformer", **more) -> Lora:
    return Lora("test", Path("test.safetensors"), "test", {part: layers(2) if changes is None else changes}, **more)


def test_what_matches_and_what_does_not_is_told(model_of):
    more = layers(2) | {"double_blocks.9.img_mlp.0": (LowRank(down=torch.ones(1, 64), up=torch.ones(256, 1)),)}
    report = fit(lora(more, unused=("odd.key",)), {"transformer": model_of("float32")})
    assert report.matched == {"transformer": 2} and report.absent == ("double_blocks.9.img_mlp.0",)
    assert "2 transformer layers" in report.text() and "1: odd.key" in report.text()


def test_a_single_layer_is_no_plural(model_of):
    one = {"double_blocks.0.img_attn.proj": (LowRank(down=torch.ones(1, 64), up=torch.ones(64, 1)),)}
    assert "test (test): 1 transformer layer" in fit(lora(one), {"transformer": model_of("float32")}).text().split("\n")


def test_another_models_sizes_are_refused(model_of):
    wide = {"double_blocks.0.img_mlp.0": (LowRank(down=torch.ones(1, 128), up=torch.ones(256, 1)),)}
    with pytest.raises(FluxError, match=r"made for another model: its layer double_blocks.0.img_mlp.0 is 256 x 128"):
        fit(lora(wide), {"transformer": model_of("float32")})


def test_a_lora_that_changes_nothing_is_refused(model_of):
    deep = {"double_blocks.9.img_mlp.0": (LowRank(down=torch.ones(1, 64), up=torch.ones(256, 1)),)}
    with pytest.raises(FluxError, match="changes nothing of this model"):
        fit(lora(deep), {"transformer": model_of("float32")})


def test_a_lora_for_text_encoders_that_are_not_given_is_refused(model_of):
    change = {"encoder.layers.0.mlp.fc1": (LowRank(down=torch.ones(1, 8), up=torch.ones(8, 1)),)}
    with pytest.raises(FluxError, match=r"changes nothing of this model; its CLIP part needs the text encoders"):
        fit(lora(change, "clip"), {"transformer": model_of("float32")})


def test_norms_of_another_size_are_refused(model_of):
    norms = {"transformer": {KEY: NormChange(diff=torch.ones(7))}}
    with pytest.raises(FluxError, match=rf"changes {KEY}, which this model has in another size"):
        fit(lora(norms=norms), {"transformer": model_of("float32")})


def test_norms_are_counted_and_those_the_model_lacks_are_told(model_of):
    far, some = "single_blocks.9.norm.key_norm.scale", NormChange(diff=torch.ones(32))
    change = lora({}, norms={"transformer": {KEY: some, far: some}, "clip": {"final_layer_norm.bias": some}})
    report = fit(change, {"transformer": model_of("float32")})
    assert report.absent == (far,) and report.without == ("clip",)
    assert report.text().startswith("test (test): 1 tensor of norms\n")
    with pytest.raises(FluxError, match="changes nothing of this model, which has none of its layers: 1: single"):
        fit(lora({}, norms={"transformer": {far: some}}), {"transformer": model_of("float32")})
