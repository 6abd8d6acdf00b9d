"""The pipelines of the diffusers Flux page as short functions, all through the one loop."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .conditioning import Conditioning
from .errors import FluxError
from .flux import Flux
from .generate import Watcher, sample
from .image import drawable, to_pil
from .layout import pack, unpack

log = logging.getLogger("fluxcanvas")

Output = Literal["pil", "numpy", "tensor", "latent"]
Pictures = list[Image.Image] | np.ndarray | Tensor
Generator = torch.Generator | Sequence[torch.Generator]


def text_to_image(
    flux: Flux,
    prompt: str | Sequence[str],
    *,
    prompt_2: str | Sequence[str] | None = None,
    negative_prompt: str | Sequence[str] | None = None,
    negative_prompt_2: str | Sequence[str] | None = None,
    true_cfg_scale: float = 1.0,
    height: int | None = None,
    width: int | None = None,
    steps: int | None = None,
    sigmas: Sequence[float] | None = None,
    guidance: float | None = None,
    max_sequence_length: int | None = None,
    images_per_prompt: int = 1,
    seed: int | None = None,
    generator: Generator | None = None,
    latents: Tensor | None = None,
    output: Output = "pil",
    watch: Watcher | None = None,
) -> Pictures:
    """Draw pictures of a prompt, or of several; steps, guidance, size and text length default to the model's own.

    Sides are floored to multiples of 16. The noise comes from `latents` (packed tokens or (B, 16, H/8, W/8)), from
    `generator` (one, or one a picture), or from `seed`; without any of them from a random seed, which is logged.
    """
    positive, negative = _conditionings(flux, prompt, prompt_2, negative_prompt, negative_prompt_2, max_sequence_length)
    batch = len(positive.prompts[0].tokens) * images_per_prompt
    shape = _latent_shape(flux, batch, width, height)
    noise = _noise(flux, shape, seed, generator, latents)
    drawn = sample(
        flux.model,
        positive,
        negative,
        latents=torch.zeros(shape),
        noise=noise,
        steps=_steps(flux, steps, sigmas),
        sigmas=sigmas,
        guidance=guidance,
        true_cfg_scale=true_cfg_scale,
        watch=watch,
    )
    return _pictures(flux, drawn, output)


def _conditionings(
    flux: Flux,
    prompt: str | Sequence[str],
    prompt_2: str | Sequence[str] | None,
    negative_prompt: str | Sequence[str] | None,
    negative_prompt_2: str | Sequence[str] | None,
    max_tokens: int | None,
) -> tuple[Conditioning, Conditioning | None]:
    if flux.text is None:
        raise FluxError("this checkpoint has no text encoders; load it with load_parts(clip=..., t5=...)")
    positive = Conditioning((flux.text.encode(prompt, prompt_2, max_tokens=max_tokens),))
    if negative_prompt is None:
        return positive, None
    return positive, Conditioning((flux.text.encode(negative_prompt, negative_prompt_2, max_tokens=max_tokens),))


def _latent_shape(flux: Flux, batch: int, width: int | None, height: int | None) -> tuple[int, int, int, int]:
    latent = flux.model.latent
    default = flux.vae.params.sample_size if flux.vae else 1024
    width, height = drawable(default if width is None else width, default if height is None else height, latent.multiple)
    return batch, latent.channels, height // latent.factor, width // latent.factor


def _steps(flux: Flux, steps: int | None, sigmas: Sequence[float] | None) -> int:
    if sigmas is not None:
        return len(sigmas)
    return flux.model.variant.steps if steps is None else steps


def _noise(
    flux: Flux,
    shape: tuple[int, int, int, int],
    seed: int | None,
    generator: Generator | None,
    latents: Tensor | None,
) -> Tensor:
    """Noise in the model's dtype; drawn on the generator's device."""
    if latents is not None:
        return _given_noise(latents, shape)
    if generator is None:
        generator = torch.Generator().manual_seed(_random_seed() if seed is None else seed)
    if isinstance(generator, torch.Generator):
        return _draw(shape, generator, flux.model.dtype)
    generators = list(generator)
    if len(generators) == 1:
        return _draw(shape, generators[0], flux.model.dtype)
    if len(generators) != shape[0]:
        raise FluxError(f"{len(generators)} generators cannot draw {shape[0]} pictures; give one, or one for each")
    return torch.cat([_draw((1, *shape[1:]), g, flux.model.dtype) for g in generators])


def _draw(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)


def _given_noise(latents: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    batch, channels, height, width = shape
    if tuple(latents.shape) == (batch, height * width // 4, channels * 4):
        return unpack(latents, height, width)
    if tuple(latents.shape) != shape:
        raise FluxError(f"latents of shape {tuple(latents.shape)} do not fit this picture; it needs {shape}, or them packed")
    return latents


def _random_seed() -> int:
    seed = torch.seed() % 2**32
    log.info("drawing with the random seed %d", seed)
    return seed


def _pictures(flux: Flux, raw: Tensor, output: Output) -> Pictures:
    """Raw latents as what was asked for: "latent" gives the packed model-space tokens (B, N, 64)."""
    if output == "latent":
        return pack(flux.model.latent.to_model(raw)).to(flux.model.dtype)
    if output not in ("pil", "numpy", "tensor"):
        raise FluxError(f"output {output!r} is unknown; use pil, numpy, tensor or latent")
    if flux.vae is None:
        raise FluxError('this checkpoint has no VAE to decode with; load one with load_parts(vae=...), or use output="latent"')
    images = flux.vae.decode(raw)
    if output == "pil":
        return to_pil(images)
    return images.numpy() if output == "numpy" else images.permute(0, 3, 1, 2)
