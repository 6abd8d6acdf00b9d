import math

import pytest
import torch

from fluxcanvas.flux_runtime.conditioning import Prompt
from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.layout import Layout, Placed
from fluxcanvas.flux_runtime.regions import attention_bias, region_tokens

LAYOUT = Layout(text=(2, 3), height=4, width=4, references=(Placed(2, 2),))  # 2 + 3 text, 4 canvas, 1 reference


def prompt(length: int, region=None, strength: float = 1.0) -> Prompt:
    return Prompt(torch.zeros(1, length, 8), torch.zeros(1, 8), region, strength)


def left_half() -> torch.Tensor:
    mask = torch.zeros(8, 8)
    mask[:, :4] = 1
    return mask


def test_without_regions_and_strengths_there_is_no_bias():
    assert attention_bias(LAYOUT, [prompt(2), prompt(3)], [1.0]) is None


def test_a_regional_prompt_is_seen_inside_its_region_only():
    bias = attention_bias(LAYOUT, [prompt(2, left_half()), prompt(3)], [1.0])[0, 0]
    canvas, first = slice(5, 9), slice(0, 2)
    inside, outside = [0, 2], [1, 3]  # canvas tokens by column
    assert (bias[canvas][inside][:, first] == 0).all()
    assert (bias[canvas][outside][:, first] == -math.inf).all()
    assert (bias[first, canvas][:, outside] == -math.inf).all()
    assert (bias[canvas, slice(2, 5)] == 0).all(), "a prompt without a region is seen everywhere"
    assert (bias[9] == 0).all(), "a reference sees everything"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bias_is_made_in_the_types_of_the_model_and_rounded_once(dtype):
    prompts = [prompt(2, left_half() * 0.3, 0.7), prompt(3, strength=0.25)]
    whole, half = (attention_bias(LAYOUT, prompts, [2.0], dtype=kind) for kind in (torch.float32, dtype))
    assert torch.equal(half, whole.to(dtype))
    assert half.stride(2) % 8 == 0, "CUDA's attention copies a bias of other rows in every call"


def test_two_regional_prompts_do_not_see_each_other():
    bias = attention_bias(LAYOUT, [prompt(2, left_half()), prompt(3, 1 - left_half())], [1.0])[0, 0]
    assert (bias[0:2, 2:5] == -math.inf).all()
    assert (bias[2:5, 0:2] == -math.inf).all()
    assert (bias[0:2, 0:2] == 0).all()


def test_every_token_sees_something():
    bias = attention_bias(LAYOUT, [prompt(2, left_half()), prompt(3, 1 - left_half())], [0.0])[0, 0]
    assert (bias > -math.inf).any(dim=1).all()


def test_a_strength_multiplies_the_attention_of_others():
    bias = attention_bias(LAYOUT, [prompt(2), prompt(3, strength=0.25)], [2.0])[0, 0]
    assert bias[6, 3].item() == pytest.approx(math.log(0.25))
    assert bias[3, 3] == 0, "its own tokens see each other as before"
    assert bias[6, 9].item() == pytest.approx(math.log(2.0))
    assert bias[9, 9] == 0


def test_a_soft_mask_is_a_soft_weight():
    assert region_tokens(torch.full((8, 8), 0.5), LAYOUT).tolist() == [0.5] * 4


def test_an_empty_region_is_refused():
    with pytest.raises(FluxError, match="no white pixel"):
        region_tokens(torch.zeros(8, 8), LAYOUT)


def test_a_negative_strength_is_refused():
    with pytest.raises(FluxError, match="strength of -1"):
        attention_bias(LAYOUT, [prompt(2, strength=-1.0), prompt(3)], [1.0])
