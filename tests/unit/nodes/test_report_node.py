"""Model Report, and the report of the runtime behind it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.lora.formats import Lora
from fluxcanvas.flux_runtime.lora.patches import LowRank, NormChange
from fluxcanvas.flux_runtime.lora.stack import Factor, LoraStack
from fluxcanvas.flux_runtime.model_report import model_report
from fluxcanvas.nodes import NODE_CLASS_MAPPINGS


def lora(name: str, **layers: tuple[str, ...]) -> Lora:
    """A LoRA that names these layers of each part, whatever their sizes."""
    patch = LowRank(down=torch.zeros(1, 1), up=torch.zeros(1, 1))
    return Lora(name, None, "kohya", {part: dict.fromkeys(names, (patch,)) for part, names in layers.items()})


def test_the_node_shows_the_report_and_gives_it_as_text(demo, run, host):
    (told,) = run("ModelReport", model=demo.model, text=demo.text, vae=demo.vae)
    assert host.texts == [told] and told == model_report(demo.model, demo.text, demo.vae)
    assert NODE_CLASS_MAPPINGS["FluxCanvas_ModelReport"].OUTPUT_NODE
    with pytest.raises(FluxError, match="nothing to report on: connect a model"):
        run("ModelReport")


def test_a_report_counts_every_number_and_byte_of_every_part(demo):
    lines = model_report(demo.model, demo.text, demo.vae).splitlines()
    assert lines[0] == (
        "FLUX.1 dev: 2 double and 4 single blocks of width 192, reads 64 channels; recommended: 28 steps, guidance 3.5"
    )
    heads = [line for line in lines if "parameters" in line]
    assert heads == [
        "transformer: 5.24 M parameters, 21 MB on cpu, computes in float32",
        "CLIP: 374 k parameters, 1.49 MB on cpu, computes in float32",
        "T5: 517 k parameters, 2.07 MB on cpu, computes in float32",
        "VAE: 999 k parameters, 4 MB on cpu, computes in float32",
    ]
    assert sum(p.numel() for p in demo.transformer.parameters()) == pytest.approx(5.24e6, rel=1e-3)
    assert lines[2:4] == ["  42 linear layers as float32, 20.9 MB", "  other tensors, 89.9 kB"]


def test_packed_layers_are_told_by_their_scheme(demo, run):
    small, text = run("Quantize", scheme="fp8", t5_scheme="fp8", model=demo.model, text=demo.text)
    told = model_report(small, text)
    assert "transformer: 5.24 M parameters, 6.38 MB on cpu, computes in float32" in told
    assert "  32 linear layers as fp8, 4.87 MB\n  10 linear layers as float32, 1.43 MB\n" in told
    assert "  21 linear layers as fp8, 492 kB" in told


def test_loras_are_told_with_weights_and_what_they_match(demo):
    both = lora("both", transformer=("img_in", "double_blocks.0.img_attn.qkv"), clip=("encoder.layers.0.mlp.fc1",))
    far = lora("far", transformer=("single_blocks.0.linear1", "single_blocks.30.linear1"))
    stack = LoraStack().plus(both, 0.5, 0.25).plus(far, -1.0, factors=[Factor("single_blocks", 0.3)])
    told = model_report(
        replace(demo.model, loras=stack, lora_mode="beside"), replace(demo.text, loras=stack)
    ).splitlines()
    assert "  LoRA both (kohya) at 0.5: 2 of its 2 layers" in told
    assert "  LoRA far (kohya) at -1, single_blocks: 0.3: 1 of its 2 layers" in told
    assert "    not in this model: 1: single_blocks.30.linear1" in told
    assert "  LoRAs are applied: beside" in told
    clip, t5 = (next(i for i, line in enumerate(told) if line.startswith(part)) for part in ("CLIP", "T5"))
    assert "  LoRA both (kohya) at 0.25: 1 of its 1 layers" in told[clip:t5]
    assert not [line for line in told[t5:] if "LoRA" in line]


def test_a_widened_input_and_changed_norms_are_told(demo):
    norm = "double_blocks.0.img_attn.norm.query_norm.scale"
    wide = replace(
        lora("canny", transformer=("img_in",)),
        in_channels=128,
        norms={"transformer": {norm: NormChange(torch.ones(1))}},
    )
    told = model_report(replace(demo.model, loras=LoraStack().plus(wide)))
    assert "reads 64 channels, 128 with its LoRAs" in told
    assert "LoRA canny (kohya) at 1: 1 of its 1 layers, 1 tensor of norms" in told


def test_a_part_alone_is_reported_alone(demo, models):
    assert model_report(vae=demo.vae).startswith("VAE: ") and model_report(text=demo.text).startswith("CLIP: ")
    assert model_report(models["fill"]).startswith("FLUX.1 fill: ") and "reads 384 channels" in model_report(
        models["fill"]
    )
