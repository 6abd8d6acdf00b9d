"""The autoencoder against diffusers' AutoencoderKL."""

import pytest
import torch

from fluxcanvas.flux_runtime.model import vae

EXACT = 1e-5


@pytest.fixture(scope="module")
def pictures() -> torch.Tensor:
    return torch.rand(2, 48, 80, 3, generator=torch.Generator().manual_seed(4))


def distribution(theirs, pictures):
    return theirs.encode(pictures.permute(0, 3, 1, 2) * 2 - 1).latent_dist


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


def test_variances_out_of_all_reason_are_bounded_as_the_oracles_are(pair, pictures, monkeypatch):
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    _, flux = pair()
    moments = torch.cat([torch.ones(1, 16, 2, 2), torch.linspace(-90, 90, 64).reshape(1, 16, 2, 2)], dim=1)
    monkeypatch.setattr(flux.vae.model.encoder, "forward", lambda images: moments)
    theirs = DiagonalGaussianDistribution(moments).sample(torch.Generator().manual_seed(1))
    assert torch.equal(flux.vae.encode(pictures[:1], torch.Generator().manual_seed(1)), theirs)


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


@torch.no_grad()
def test_a_batch_is_taken_a_megapixel_at_a_time(pair, relative, pictures, monkeypatch):
    """Activations are the largest tensors of a run: many large pictures must not multiply them."""
    _, flux = pair()
    model, three = flux.vae.model, pictures[:1].expand(3, -1, -1, -1)
    latents, generator = torch.randn(3, 16, 6, 10, generator=torch.Generator().manual_seed(2)), torch.Generator()
    whole = flux.vae.encode(three, generator.manual_seed(1)), flux.vae.decode(latents)
    seen: list[int] = []
    for net in (model.encoder, model.decoder):
        monkeypatch.setattr(net, "forward", lambda x, plain=net.forward: seen.append(len(x)) or plain(x))
    monkeypatch.setattr(vae, "AT_ONCE", 2 * 48 * 80)
    parts = flux.vae.encode(three, generator.manual_seed(1)), flux.vae.decode(latents)
    assert seen == [2, 1, 2, 1]
    assert all(relative(part, one) < EXACT for part, one in zip(parts, whole, strict=True))
