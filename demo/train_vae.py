"""Stage "vae": an autoencoder of FLUX's kind (factor 8, 16 channels) from rendered scenes.

The KL term is strong on purpose: the decoder learns to forgive noisy latents, so the flow need not be exact. With one
group the norms keep absolute colour.
"""

import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..flux_runtime.model.vae import AutoEncoder, VaeParams
from .drawing import render
from .scenes import TRAINING, sample_scene
from .train_latents import Encode, to_tensor
from .train_tools import Course, Muon, Plan, moved

TINY = VaeParams(channels=(16, 32, 64, 64), num_res_blocks=1, groups=1, scale=1.0, shift=0.0, sample_size=128)
KL, CROP, LATENTS_PER_CROP = 3e-3, 64, 1024
SIZES, BATCH = (96, 128, 128, 160, 256, 256), 4


def new_vae(params: VaeParams, seed: int) -> AutoEncoder:
    """Random weights; residual branches start at zero."""
    torch.manual_seed(seed)
    model = AutoEncoder(params).to(memory_format=torch.channels_last)
    for name, parameter in model.named_parameters():
        if ".conv2." in name or ".proj_out." in name:
            nn.init.zeros_(parameter)
    return model


def crops(rng: random.Random, count: int) -> Tensor:
    """(count, 3, 64, 64) pieces of scenes drawn at several sizes, mostly of their things."""
    found = []
    for _ in range(count):
        scene, size = sample_scene(rng, TRAINING), rng.choice(SIZES)
        x0, y0, x1, y1 = rng.choice(scene.things).box if rng.random() < 0.8 else (0, 0, 1, 1)
        left, top = (
            int(min(max(rng.uniform(low, high) * size - CROP / 2, 0), size - CROP))
            for low, high in ((x0, x1), (y0, y1))
        )
        piece = render(scene, size).crop((left, top, left + CROP, top + CROP))
        found.append(torch.frombuffer(bytearray(piece.tobytes()), dtype=torch.uint8).reshape(CROP, CROP, 3))
    pixels = torch.stack(found).permute(0, 3, 1, 2).float() / 127.5 - 1
    return pixels.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Crops:
    """Pictures (B, 3, 64, 64) and the noise for their latents (B, 16, 8, 8)."""

    pictures: Tensor
    noise: Tensor


def some_crops(rng: random.Random, generator: torch.Generator, count: int = BATCH) -> Crops:
    """The batch of a step."""
    return Crops(crops(rng, count), torch.randn(count, 16, CROP // 8, CROP // 8, generator=generator))


def vae_loss(model: AutoEncoder, pictures: Tensor, noise: Tensor) -> Tensor:
    """Distance in pixels and in edges, and the KL divergence of the latents."""
    mean, log_variance = model.encoder(pictures).chunk(2, dim=1)
    log_variance = log_variance.clamp(-30, 20)
    off = model.decode(mean + (0.5 * log_variance).exp() * noise) - pictures
    edges = off.diff(dim=-1).abs().mean() + off.diff(dim=-2).abs().mean()
    kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).flatten(1).sum(1).mean()
    return off.abs().mean() + off.square().mean() + 0.5 * edges + KL * kl / LATENTS_PER_CROP


def train_vae(
    model: AutoEncoder, plan: Plan, folder: Path, device: torch.device, until: int | None = None
) -> AutoEncoder:
    """Train on `plan.steps` batches of crops, then set scale and shift so that latents have mean 0 and deviation 1."""
    model.to(device)

    def loss_of(batch: Crops) -> Tensor:
        batch = moved(batch, device)
        return vae_loss(model, batch.pictures, batch.noise)

    optimiser = Muon(
        model.named_parameters(),
        0.02,
        2e-3,
        lambda name: name not in ("encoder.conv_in.weight", "decoder.conv_out.weight"),
    )
    Course(plan, model, optimiser, folder).run(some_crops, loss_of, lambda vae, _: fidelity(vae), until)
    model.params = normalised(model)
    return model


def held_pictures(count: int = 24) -> Tensor:
    """Scenes that training never sees, as (count, 3, 128, 128)."""
    rng = random.Random("held-out pictures")
    return to_tensor([sample_scene(rng) for _ in range(count)], 128)


@torch.no_grad()
def normalised(model: AutoEncoder) -> VaeParams:
    """The parameters with scale and shift measured on unseen scenes."""
    latents = model.encode(held_pictures().to(next(model.parameters()).device))
    return replace(model.params, scale=1 / latents.std().item(), shift=latents.mean().item())


@torch.no_grad()
def fidelity(model: AutoEncoder) -> str:
    """PSNR on unseen scenes, in dB: as they are, and with 30 % noise on the latents."""
    pictures = held_pictures().to(next(model.parameters()).device)
    latents = model.encode(pictures)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1)).to(latents.device)
    plain, noisy = (_psnr(model.decode(z), pictures) for z in (latents, latents + 0.3 * latents.std() * noise))
    return f"psnr {plain:.2f} dB, with noise on the latents {noisy:.2f} dB"


def _psnr(found: Tensor, wanted: Tensor) -> float:
    error = ((found.clamp(-1, 1) - wanted) / 2).square().mean((1, 2, 3))
    return (-10 * error.log10()).mean().item()


def encoder_of(model: AutoEncoder, device: torch.device) -> Encode:
    """Pictures -> latents as the transformer works on them."""
    model = model.to(device).eval()

    @torch.no_grad()
    def encode(pictures: Tensor) -> Tensor:
        return (model.encode(pictures.to(device)) - model.params.shift) * model.params.scale

    return encode
