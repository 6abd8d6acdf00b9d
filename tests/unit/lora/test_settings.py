"""The settings that PEFT and diffusers write beside or into a LoRA: alpha and rank, for all layers or by pattern."""

import json

import pytest
import torch

from fluxcanvas.flux_runtime import FluxError


def pair(layer: str, out: int, into: int, rank: int = 2) -> dict[str, torch.Tensor]:
    return {f"{layer}.lora_A.weight": torch.randn(rank, into), f"{layer}.lora_B.weight": torch.randn(out, rank)}


PLAIN = {"lora_alpha": 8, "r": 2, "alpha_pattern": {}, "use_rslora": False}


@pytest.mark.parametrize(
    ("settings", "scales"),
    [
        (PLAIN, (4.0, 4.0)),
        ({**PLAIN, "use_rslora": True}, (8 / 2**0.5, 8 / 2**0.5)),
        ({**PLAIN, "alpha_pattern": {"x_embedder": 1}}, (0.5, 4.0)),
        ({**PLAIN, "alpha_pattern": {"^x_embedder": 1}, "use_rslora": True}, (1 / 2**0.5, 8 / 2**0.5)),
        ({**PLAIN, "lora_alpha": -8, "alpha_pattern": {"x_embedder": 1}}, (0.5, -4.0)),
        ({}, (1.0, 1.0)),
    ],
)
def test_alpha_from_settings(settings, scales, read, tmp_path):
    """In the metadata as diffusers writes them, with and without the component's name, or beside PEFT's own file."""
    names = {"x_embedder": (8, 4), "context_embedder": (8, 6)}

    def told(prefix, metadata=None, name="x.safetensors"):
        tensors = {}
        for layer, (out, into) in names.items():
            tensors |= pair(f"{prefix}{layer}", out, into)
        layers = read(tensors, metadata, name).layers["transformer"]
        return layers["img_in"][0].scale, layers["txt_in"][0].scale

    with_prefix = {f"transformer.{key}": value for key, value in settings.items()}
    assert told("transformer.", {"lora_adapter_metadata": json.dumps(with_prefix)}) == pytest.approx(scales)
    assert told("", {"lora_adapter_metadata": json.dumps(settings)}) == pytest.approx(scales)
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    assert told("base_model.model.", name="adapter_model.safetensors") == pytest.approx(scales)
    assert told("base_model.model.", name="other.safetensors") == (1.0, 1.0)  # the settings of another file


def test_own_alpha_counts_before_settings(read):
    tensors = pair("transformer.x_embedder", 8, 4) | {"transformer.x_embedder.alpha": torch.tensor(1.0)}
    lora = read(tensors, {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 8})})
    assert lora.layers["transformer"]["img_in"][0].alpha == 1.0


def test_settings_count_for_lokr_too(read):
    """The rank that alpha is divided by is the second matrix's, where both come in factors."""
    ranks = {"lokr_w1": 4, "lokr_w2": 9}
    tensors = {}
    for name, rank in ranks.items():
        tensors[f"x_embedder.{name}_a"], tensors[f"x_embedder.{name}_b"] = torch.randn(4, rank), torch.randn(rank, 2)
    lora = read(tensors, {"lora_adapter_metadata": json.dumps({"lora_alpha": 6, "use_rslora": True})})
    assert lora.patches[0].scale == pytest.approx(6 / 9**0.5) and lora.ranks == (9,)


@pytest.mark.parametrize(
    "metadata",
    ["{", "[]", "null", '{"transformer.lora_alpha": "8"}', '{"transformer.lora_alpha": true}', "[" * 100_000,
     '{"transformer.lora_alpha": 1, "transformer.r": -2}',
     '{"transformer.lora_alpha": 1, "transformer.rank_pattern": {"a": -2}}',
     '{"transformer.lora_alpha": NaN}', '{"transformer.lora_alpha": 0}', '{"transformer.lora_alpha": 1e999}',
     '{"transformer.lora_alpha": 1, "transformer.alpha_pattern": []}x',
     '{"transformer.lora_alpha": 1, "transformer.alpha_pattern": [1]}',
     '{"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"(a+)+$": 2}}',
     '{"transformer.lora_alpha": 1, "transformer.alpha_pattern": {"a": "b"}}'],
)  # fmt: skip
def test_bad_settings_are_refused(metadata, read, tmp_path):
    tensors = pair("transformer.x_embedder", 8, 4)
    with pytest.raises(FluxError, match=r"x\.safetensors.*(settings|metadata)"):
        read(tensors, {"lora_adapter_metadata": metadata})
