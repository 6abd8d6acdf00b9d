"""Latents: an empty one to draw on, a picture into one, and one into a picture."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Annotated

from ..flux_runtime.errors import FluxError
from .edges import FLUX_VAE, IMAGE, LATENT
from .host import Host, current
from .schema import Output, node
from .widgets import Choice, Range

if TYPE_CHECKING:
    from torch import Tensor

    from ..flux_runtime.pictures import Picture

log = logging.getLogger("fluxcanvas")
CHANNELS, FACTOR, MULTIPLE = 16, 8, 16  # of every FLUX.1 VAE; a token is two latents wide
LARGEST = 8192
FIT = Choice(("crop", "pad", "stretch"))
FIT_HELP = "When the shape differs: crop cuts the edges off, pad extends them, stretch distorts."


@node("Empty Canvas", category="latent", aliases=("empty latent", "size", "resolution", "batch"))
def empty_canvas(
    width: Annotated[int, Range(16, LARGEST, 16), "Width of the picture in pixels, a multiple of 16."] = 1024,
    height: Annotated[int, Range(16, LARGEST, 16), "Height of the picture in pixels, a multiple of 16."] = 1024,
    batch_size: Annotated[int, Range(1, 64), "How many pictures to draw at once."] = 1,
) -> Annotated[LATENT, Output("latent"), "An empty latent of that size."]:
    """Sets the size and number of new pictures. FLUX draws best at about one megapixel."""
    import torch

    columns, rows = width // MULTIPLE * MULTIPLE, height // MULTIPLE * MULTIPLE
    if (columns, rows) != (width, height):
        current().text(f"{width}x{height} is not a multiple of {MULTIPLE}: the picture will be {columns}x{rows}")
    return {"samples": torch.zeros(batch_size, CHANNELS, rows // FACTOR, columns // FACTOR)}


@node("Decode", category="latent", aliases=("vae decode", "latent to image"))
def decode(
    vae: Annotated[FLUX_VAE, "The VAE, from Load FLUX."],
    latent: Annotated[LATENT, "The latent, from Sample."],
) -> Annotated[IMAGE, Output("image"), "The pictures."]:
    """Turns a drawn latent into pictures to look at and save."""
    import torch

    from ..flux_runtime.model.vae import in_parts

    host, parts, pictures = current(), in_parts(samples_of(latent), vae.params.factor), []
    for done, part in enumerate(parts, 1):
        host.check_interrupt()
        pictures.append(vae.decode(part))
        if len(parts) > 1:
            host.progress(done, len(parts))
    return torch.cat(pictures)


@node("Encode Image", category="latent", aliases=("vae encode", "image to latent", "img2img"))
def encode_image(
    vae: Annotated[FLUX_VAE, "The VAE, from Load FLUX."],
    image: Annotated[IMAGE, "The pictures to start from."],
    width: Annotated[int, Range(0, LARGEST, 16), "Width to bring them to. 0: their own, or as the height asks."] = 0,
    height: Annotated[int, Range(0, LARGEST, 16), "Height to bring them to. 0: their own, or as the width asks."] = 0,
    fit: Annotated[str, FIT, FIT_HELP] = "crop",
) -> Annotated[LATENT, Output("latent"), "The pictures as a latent, for Sample."]:
    """Turns pictures into a latent, so that Sample can change them. Sides become multiples of 16."""
    from ..flux_runtime.fit import fit as bring_to_size

    pictures = bring_to_size(rgb(image), width, height, fit, MULTIPLE)
    if pictures.shape[1:3] != image.shape[1:3]:
        have, now = (f"{i.shape[2]}x{i.shape[1]}" for i in (image, pictures))
        current().text(f"{have} became {now} ({fit})")
    return {"samples": vae.encode(pictures).float().cpu()}


def rgb(image: IMAGE) -> Tensor:
    """The pictures with three channels: alpha is left out, grey becomes colour."""
    if image.ndim != 4 or image.shape[-1] not in (1, 3, 4) or not image.numel():
        raise FluxError(f"a picture has the shape (batch, height, width, 3); this one has {tuple(image.shape)}")
    if not image.isfinite().all():
        raise FluxError("this picture holds numbers that are not finite; a node before it went wrong")
    return image.expand(*image.shape[:3], 3) if image.shape[-1] == 1 else image[..., :3]


def picture(image: IMAGE, vae: FLUX_VAE | None, fit: str) -> Picture:
    """Pictures to be fitted and encoded once the canvas is known; a VAE of another kind of model is refused."""
    from ..flux_runtime.pictures import Picture

    if vae and (vae.params.z_channels, vae.params.factor) != (CHANNELS, FACTOR):
        raise FluxError(
            f"this VAE makes latents of {vae.params.z_channels} channels and FLUX.1 reads {CHANNELS}: it belongs to "
            "another model; connect the vae of Load FLUX"
        )
    return Picture(rgb(image), vae, fit)


def samples_of(latent: LATENT) -> Tensor:
    """The tensor of a LATENT, checked: finite, (B, C, H/8, W/8)."""
    samples = latent.get("samples")
    if samples is None or samples.ndim != 4 or not samples.numel():
        raise FluxError("this latent holds no picture (batch, channels, height, width); connect Empty Canvas")
    if not samples.isfinite().all():
        raise FluxError("this latent holds numbers that are not finite; a node before it went wrong")
    return samples


def flux_samples(latent: LATENT, host: Host) -> Tensor:
    """The tensor of a LATENT with FLUX's 16 channels; an empty one made for another model is adapted, and told so."""
    samples = samples_of(latent)
    if samples.shape[1] == CHANNELS:
        return samples
    if samples.any():
        raise FluxError(
            f"this latent has {samples.shape[1]} channels, and FLUX.1 draws on {CHANNELS}: it comes from another "
            "model's VAE; connect Empty Canvas, or Encode Image with the FLUX VAE"
        )
    host.text(f"the empty latent has {samples.shape[1]} channels; drawing on an empty FLUX latent of the same size")
    return samples.new_zeros(samples.shape[0], CHANNELS, *samples.shape[2:])
