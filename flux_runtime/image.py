"""Pictures: PIL images <-> IMAGE tensors (B, H, W, 3) in 0..1, and sizes the model can draw."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import FluxError

log = logging.getLogger("fluxcanvas")
MAX_SIDE = 16384


def to_pil(images: Tensor) -> list[Image.Image]:
    """(B, H, W, 3) in 0..1 -> one RGB image each, rounded to 8 bits."""
    pixels = (images.float().clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return [Image.fromarray(picture) for picture in pixels]


def to_tensor(images: Image.Image | Sequence[Image.Image]) -> Tensor:
    """RGB images of one size -> (B, H, W, 3) float32 in 0..1."""
    batch = [images] if isinstance(images, Image.Image) else list(images)
    arrays = [np.asarray(image.convert("RGB"), dtype=np.float32) / 255 for image in batch]
    return torch.from_numpy(np.stack(arrays))


def drawable(width: int, height: int, multiple: int) -> tuple[int, int]:
    """Floor a size to what the model can draw, and say so; sizes of nothing, or beyond reason, are refused."""
    for name, side in (("width", width), ("height", height)):
        if not multiple <= side <= MAX_SIDE:
            raise FluxError(f"a {name} of {side} pixels cannot be drawn; use {multiple} to {MAX_SIDE}")
    fitted = width // multiple * multiple, height // multiple * multiple
    if fitted != (width, height):
        log.warning("%dx%d is not a multiple of %d; drawing %dx%d", width, height, multiple, *fitted)
    return fitted
