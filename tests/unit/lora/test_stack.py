"""Weights of a stack: for a whole LoRA, for its text part, and by block."""

from pathlib import Path

import pytest
import torch

from fluxcanvas.flux_runtime import FluxError
from fluxcanvas.flux_runtime.lora.formats import Lora
from fluxcanvas.flux_runtime.lora.patches import Full
from fluxcanvas.flux_runtime.lora.stack import LoraStack, parse_factors

LAYERS = ("double_blocks.0.img_mlp.2", "double_blocks.1.img_mlp.0", "single_blocks.0.linear1")
PATCHES = {name: (Full(diff=torch.ones(2, 2)),) for name in LAYERS}
LORA = Lora("test", Path("test.safetensors"), "test", {"transformer": PATCHES})


def test_weights_by_block_and_by_part():
    entry = LoraStack().plus(LORA, 0.5, text_weight=0.2, factors=parse_factors("double: 0.5; double.1: 0")).entries[0]
    assert entry.weight_on("transformer", "double_blocks.0.img_mlp.2") == 0.25
    assert entry.weight_on("transformer", "double_blocks.1.img_mlp.0") == 0
    assert entry.weight_on("transformer", "single_blocks.0.linear1") == 0.5
    assert entry.weight_on("clip", "encoder.layers.0.mlp.fc1") == 0.2
    ranged = parse_factors("double_blocks.0-1 = 0.5\nsingle_transformer_blocks.*.linear2: -1, img_mod: 2")
    assert [f.fits("double_blocks.1.img_mlp.0") for f in ranged] == [True, False, False]
    assert [f.fits("single_blocks.1.linear2") for f in ranged] == [False, True, False]
    assert [f.fits("double_blocks.12.img_mod.lin") for f in ranged] == [False, False, True]


@pytest.mark.parametrize("text", ["double_blocks", "double: x", ": 1", "a b: 1", "double: nan", "double: inf"])
def test_words_that_are_no_weights_are_refused(text):
    with pytest.raises(FluxError, match="is no weight for a block"):
        parse_factors(text)


def test_a_factor_that_fits_nothing_is_named():
    with pytest.raises(FluxError, match=r"'double_blocks.7' fits no layer of the LoRA test"):
        LoraStack().plus(LORA, factors=parse_factors("double_blocks.7: 0.5"))


@pytest.mark.parametrize("weight", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(FluxError, match="not a number"):
        LoraStack().plus(LORA, weight)
