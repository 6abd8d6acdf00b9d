"""Pictures: PIL images <-> IMAGE tensors (B, H, W, 3) in 0..1, and sizes the model can draw."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .errors import FluxError

log = logging.getLogger("fluxcanvas")
MAX_SIDE = 16384
ImageLike = Image.Image | Sequence[Image.Image] | np.ndarray | Tensor


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, H, W, 3) in 0..1 -> one RGB image each, rounded to 8 bits."""
    pixels = (images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def to_tensor(images: Image.Image | Sequence[Image.Image]) -> Tensor:
    """Pictures of one size and any mode, turned upright as EXIF says -> (B, H, W, 3) float32 in 0..1."""
    batch = [images] if isinstance(images, Image.Image) else list(images)
    return torch.stack([rgb(ImageOps.exif_transpose(image)) for image in batch])


def rgb(picture: Image.Image) -> Tensor:
    """(H, W, 3) float32 in 0..1 of a picture in any mode; transparency is dropped, not blended."""
    levels = deep_levels(picture)
    if levels is not None:
        return torch.from_numpy(np.repeat(levels[..., None], 3, axis=-1))
    if picture.mode == "P":  # a palette with transparency keeps the colours below it only through RGBA
        picture = picture.convert("RGBA")
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255)


def deep_levels(picture: Image.Image) -> np.ndarray | None:
    """(H, W) in 0..1 of a picture with more than 8 bits in one channel (16-bit, 32-bit integer, float), else None."""
    if picture.mode == "F":
        return np.clip(np.nan_to_num(np.asarray(picture, dtype=np.float32)), 0, 1)
    if picture.mode.startswith("I"):  # PIL's own conversion would clip it at 255
        return np.clip(np.asarray(picture).astype(np.float32) / 65535, 0, 1)
    return None


def drawable(width: int, height: int, multiple: int) -> tuple[int, int]:
    """Floor a size to what the model can draw, and say so; sizes of nothing, or beyond reason, are refused."""
    for name, side in (("width", width), ("height", height)):
        if not multiple <= side <= MAX_SIDE:
            raise FluxError(f"a {name} of {side} pixels cannot be drawn; use {multiple} to {MAX_SIDE}")
    fitted = width // multiple * multiple, height // multiple * multiple
    if fitted != (width, height):
        log.warning("%dx%d is not a multiple of %d; drawing %dx%d", width, height, multiple, *fitted)
    return fitted


def as_images(images: ImageLike, width: int | None = None, height: int | None = None) -> Tensor:
    """Pictures of any kind -> (B, H, W, 3) float32 in 0..1, at a size if one is given.

    PIL pictures are resized with Lanczos as the oracle does; arrays and tensors, (B, H, W, 3) or (B, 3, H, W) in 0..1
    or of 8 bits, with antialiased bicubic.
    """
    if isinstance(images, (np.ndarray, Tensor)):
        return _fitted(_channels_last(unit_range(images)), width, height)
    batch = [images] if isinstance(images, Image.Image) else list(images)
    plain = [to_pil(to_tensor(picture))[0] for picture in batch]
    size = width or plain[0].width, height or plain[0].height
    return to_tensor([picture.resize(size, Image.Resampling.LANCZOS) for picture in plain])


def by_size(images: ImageLike) -> list[Tensor]:
    """Pictures at their own sizes: a batch (B, H, W, 3) for each item of a list."""
    if not isinstance(images, (list, tuple)):
        return [as_images(images)]
    return [as_images(picture) for picture in images]


def upright(picture: Image.Image) -> Image.Image:
    """The picture turned as its EXIF says; more than 8 bits become 8, which PIL's own conversions would clip."""
    turned = ImageOps.exif_transpose(picture)
    return turned if deep_levels(turned) is None else to_pil(rgb(turned)[None])[0]


def unit_range(levels: np.ndarray | Tensor) -> Tensor:
    """float32 on the CPU; 8-bit levels are brought to 0..1."""
    levels = torch.tensor(levels) if isinstance(levels, np.ndarray) else levels.cpu()
    return levels.float() / 255 if levels.dtype == torch.uint8 else levels.float()


def _channels_last(images: Tensor) -> Tensor:
    images = images[None] if images.ndim == 3 else images
    if images.ndim == 4 and images.shape[-1] not in (3, 4) and images.shape[1] in (3, 4):
        images = images.permute(0, 2, 3, 1)
    if images.ndim != 4 or images.shape[-1] not in (3, 4):
        raise FluxError(f"a picture of shape {tuple(images.shape)} is none; give (batch, height, width, 3) in 0 to 1")
    return images[..., :3]


def _fitted(images: Tensor, width: int | None, height: int | None) -> Tensor:
    size = (height or images.shape[1], width or images.shape[2])
    if size == images.shape[1:3]:
        return images
    planes = F.interpolate(images.permute(0, 3, 1, 2), size=size, mode="bicubic", antialias=True)
    return planes.clamp(0, 1).permute(0, 2, 3, 1)
