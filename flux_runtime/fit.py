"""Bringing pictures to a size the model can draw: crop, pad or stretch."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from .errors import FluxError

# How a side that nobody asked for becomes a multiple: cropped down, padded up, or stretched to the nearest.
ROUNDING = {"crop": math.floor, "pad": math.ceil, "stretch": round}


def fit(images: Tensor, width: int = 0, height: int = 0, mode: str = "crop", multiple: int = 16) -> Tensor:
    """(B, H, W, C) pictures in 0..1 -> the same, with sides of width x height, floored to the multiple.

    A width or height of 0 follows the other, or the picture itself. "crop" covers the size and cuts the edges off
    evenly, "pad" lies inside it and repeats its edges outwards, "stretch" distorts. Pixels are resampled only where the
    scale changes: a picture that only misses the multiple is cut or padded untouched.
    """
    if mode not in ROUNDING:
        raise FluxError(f"the fit mode {mode!r} is unknown; use {', '.join(ROUNDING)}")
    have = images.shape[2], images.shape[1]
    factors = [want / side for want, side in zip((width, height), have, strict=True) if want] or [1.0]
    factor = min(factors) if mode == "pad" else max(factors)
    scaled = [max(1, round(side * factor)) for side in have]
    target = _target(width, scaled[0], mode, multiple), _target(height, scaled[1], mode, multiple)
    bound = {"crop": max, "pad": min, "stretch": lambda _, want: want}[mode]
    return _centre(_resize(images, *map(bound, scaled, target)), *target)


def _target(asked: int, scaled: int, mode: str, multiple: int) -> int:
    rounding = math.floor if asked else ROUNDING[mode]
    return max(1, rounding((asked or scaled) / multiple)) * multiple


def _resize(images: Tensor, width: int, height: int) -> Tensor:
    if (height, width) == images.shape[1:3]:
        return images
    planes = images.permute(0, 3, 1, 2).float()
    return F.interpolate(planes, size=(height, width), mode="bicubic", antialias=True).clamp(0, 1).permute(0, 2, 3, 1)


def _centre(images: Tensor, width: int, height: int) -> Tensor:
    """Cut or extend evenly on both sides; an odd pixel goes to the right and the bottom."""
    extra_w, extra_h = width - images.shape[2], height - images.shape[1]
    left, top = extra_w // 2 if extra_w > 0 else -(-extra_w // 2), extra_h // 2 if extra_h > 0 else -(-extra_h // 2)
    sides = (left, extra_w - left, top, extra_h - top)
    if not any(sides):
        return images
    return F.pad(images.permute(0, 3, 1, 2), sides, mode="replicate").permute(0, 2, 3, 1)
