"""The autoencoder against diffusers' AutoencoderKL."""

import pytest
import torch

EXACT = 1e-5


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(2, 48, 80, 3, generator=torch.Generator().manual_seed(4))


def distribution(vae, pictures):
    return vae.encode(pictures.permute(0, 3, 1, 2) * 2 - 1).latent_dist


@torch.no_grad()
def test_the_mean(pair, relative, pictures):
    pipe, flux = pair()
    assert relative(flux.vae.encode(pictures), distribution(pipe.vae, pictures).mode()) < EXACT


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_sample_draws_the_same_numbers(pair, relative, pictures, dtype):
    pipe, flux = pair(dtype=dtype)
    theirs = distribution(pipe.vae, pictures.to(dtype)).sample(torch.Generator().manual_seed(1))
    mine = flux.vae.encode(pictures, torch.Generator().manual_seed(1))
    assert relative(mine, theirs) < (EXACT if dtype == torch.float32 else 0.02)


@torch.no_grad()
def test_a_generator_for_each_picture(pair, relative, pictures):
    _, flux = pair()
    both = flux.vae.encode(pictures, [torch.Generator().manual_seed(s) for s in (1, 2)])
    second = flux.vae.encode(pictures[1:], torch.Generator().manual_seed(2))
    assert relative(both[1:], second) < EXACT


@torch.no_grad()
def test_decoding(pair, relative):
    pipe, flux = pair()
    latents = torch.randn(3, 16, 6, 10, generator=torch.Generator().manual_seed(2))
    theirs = (pipe.vae.decode(latents).sample / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
    assert relative(flux.vae.decode(latents), theirs) < EXACT


def test_the_latent_format_is_the_checkpoints(pair):
    pipe, flux = pair()
    latent = flux.model.latent
    assert (latent.scale, latent.shift) == (pipe.vae.config.scaling_factor, pipe.vae.config.shift_factor)
    assert latent.factor == 8
    assert latent.channels == 16


def test_several_pictures_are_decoded_one_after_the_other(pair, monkeypatch):
    """The decoder's activations are the largest tensors of a run: a batch must not multiply them."""
    _, flux = pair()
    seen, plain = [], flux.vae.model.decode
    monkeypatch.setattr(flux.vae.model, "decode", lambda latents: seen.append(len(latents)) or plain(latents))
    assert len(flux.vae.decode(torch.zeros(3, 16, 2, 2))) == 3
    assert seen == [1, 1, 1]
