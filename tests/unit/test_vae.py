"""The VAE's handle: where float16 is too narrow for its numbers, it computes in float32 and says so once."""

from __future__ import annotations

import copy
import logging

import pytest
import torch

from fluxcanvas.flux_runtime.model.vae import AutoEncoder, VaeParams
from fluxcanvas.flux_runtime.vae import Vae

PARAMS = VaeParams(channels=(8, 8, 8, 8), num_res_blocks=1, groups=2)


@pytest.fixture
def loud() -> AutoEncoder:
    """A VAE whose first numbers, before any norm, are beyond float16; what it makes of them is usual."""
    torch.manual_seed(0)
    model = AutoEncoder(PARAMS)
    with torch.no_grad():
        for layer in (model.encoder.conv_in, model.decoder.conv_in):
            layer.weight.mul_(300_000)
    return model


@pytest.fixture
def picture() -> torch.Tensor:
    return torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(1))


def test_what_overflows_in_float16_is_made_in_float32_and_told_once(loud, picture, caplog):
    half = Vae(copy.deepcopy(loud).half())
    exact = Vae(copy.deepcopy(half.model).float())
    pixels = picture.permute(0, 3, 1, 2).half() * 2 - 1
    assert not half.model.moments(pixels).isfinite().all(), "else this test shows nothing"
    with caplog.at_level(logging.WARNING, logger="fluxcanvas"):
        latents = half.encode(picture)
        drawn = half.decode(latents)
    expected = exact.encode(picture)
    assert latents.dtype == torch.float16 and (latents - expected).abs().max() < 0.002 * expected.abs().max()
    assert (drawn - exact.decode(latents.float())).abs().max() < 0.002
    assert sum("too large for float16" in message for message in caplog.messages) == 1


def test_a_sample_made_again_draws_its_noise_once(loud, picture):
    used, once = (torch.Generator().manual_seed(3) for _ in range(2))
    made = Vae(loud.half()).encode(picture, used)
    torch.randn(made.shape, generator=once, dtype=torch.float16)
    assert torch.equal(used.get_state(), once.get_state())


def test_the_preview_of_such_a_vae_is_of_sound_numbers(loud):
    weights, bias = Vae(loud.half()).preview_factors
    assert weights.isfinite().all() and bias.isfinite().all()


def test_numbers_that_fit_stay_in_float16(picture, caplog):
    torch.manual_seed(0)
    model = AutoEncoder(PARAMS)
    half = Vae(model.half())
    expected = half.model.encode((picture.permute(0, 3, 1, 2) * 2 - 1).half())
    assert torch.equal(half.encode(picture), expected) and not caplog.messages
