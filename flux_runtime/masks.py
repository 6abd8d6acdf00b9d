"""Masks (B, H, W) in 0..1, 1 where to draw: from pictures of any mode, grown, blurred, fitted and combined."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from .errors import FluxError
from .image import ImageLike, deep_levels, unit_range, upright

log = logging.getLogger("fluxcanvas")

HALF = 0.5  # the level at which a mask becomes black or white
CHANNELS = ("luminance", "alpha", "red", "green", "blue")
COMBINE: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "union": torch.maximum,
    "intersect": torch.minimum,
    "subtract": lambda a, b: torch.minimum(a, 1 - b),
    "difference": lambda a, b: (a - b).abs(),
}


def mask_from_image(pictures: Image.Image | Sequence[Image.Image], channel: str = "luminance") -> Tensor:
    """PIL pictures of one size and any mode -> (B, H, W) float32.

    "luminance" reads how bright a picture is, and what is transparent counts as black; "alpha" is 1 where a picture is
    transparent (nothing is, in one without transparency). Pictures are turned upright as their EXIF says.
    """
    if channel not in CHANNELS:
        raise FluxError(f"a mask cannot be read from the channel {channel!r}; use {', '.join(CHANNELS)}")
    batch = [pictures] if isinstance(pictures, Image.Image) else list(pictures)
    planes = [_plane(ImageOps.exif_transpose(picture), channel) for picture in batch]
    if len({plane.shape for plane in planes}) != 1:
        raise FluxError("masks of one batch must have one size; fit them first, or use them one by one")
    return torch.from_numpy(np.stack(planes))


def _plane(picture: Image.Image, channel: str) -> np.ndarray:
    """(H, W) float32 in 0..1 of an upright picture."""
    levels = deep_levels(picture)
    if levels is not None:
        return np.zeros_like(levels) if channel == "alpha" else levels
    rgba = picture.convert("RGBA")
    alpha = _scaled(rgba.getchannel("A"))
    if channel == "alpha":
        return 1 - alpha
    if channel == "luminance":
        return _scaled(rgba.convert("L")) * alpha
    return _scaled(rgba.getchannel(channel[0].upper()))


def _scaled(plane: Image.Image) -> np.ndarray:
    return np.asarray(plane, dtype=np.float32) / 255


def mask_levels(masks: ImageLike, width: int, height: int) -> Tensor:
    """Masks of any kind -> (B, height, width) float32 in 0..1."""
    if isinstance(masks, (np.ndarray, Tensor)):
        return F.interpolate(as_mask(unit_range(masks))[:, None], size=(height, width))[:, 0]
    batch = [masks] if isinstance(masks, Image.Image) else list(masks)
    grey = [np.asarray(upright(m).convert("L").resize((width, height), Image.Resampling.LANCZOS)) for m in batch]
    return torch.from_numpy(np.stack(grey)).float() / 255


def binary_mask(masks: ImageLike, width: int, height: int) -> Tensor:
    """Masks of any kind -> (B, height, width), 1 where white (0.5 and above), else 0."""
    return (mask_levels(masks, width, height) >= HALF).float()


def as_mask(mask: Tensor) -> Tensor:
    """A mask as hosts hand it over, (H, W), (B, H, W) or (B, 1, H, W), as (B, H, W) float32 within 0..1."""
    if mask.ndim == 2:
        mask = mask[None]
    elif mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim != 3 or not mask.numel():
        raise FluxError(f"a mask must have the shape (batch, height, width); got {tuple(mask.shape)}")
    if mask.is_floating_point() and not mask.isfinite().all():
        raise FluxError("the mask holds values that are no numbers (NaN or infinite); make it anew")
    return mask.float().clamp(0, 1)


def check_mask(mask: Tensor, level: float = HALF, what: str = "the mask") -> Tensor:
    """The mask as (B, H, W), refused where one of the batch has no pixel of this level."""
    mask = as_mask(mask)
    brightest = mask.flatten(1).amax(1)
    empty = [index for index, top in enumerate(brightest.tolist()) if top < level or not top]
    if empty:
        which = what if len(mask) == 1 else f"{what} number {empty[0] + 1} of {len(mask)}"
        fault = "is black everywhere" if not brightest[empty[0]] else f"is nowhere brighter than {level:g}"
        raise FluxError(f"{which} {fault}, so there is nothing to draw: paint white what is to change, or invert it")
    return mask


def grow_mask(mask: Tensor, pixels: int) -> Tensor:
    """Make the white parts `pixels` wider on every side, square at the corners; negative numbers shrink them.

    What lies outside the picture does not count: a mask that touches the border still touches it when shrunk.
    """
    mask = as_mask(mask)
    if pixels < 0:
        return 1 - grow_mask(1 - mask, -pixels)
    if pixels == 0:
        return mask
    planes = mask[:, None]
    for axis in (2, 3):  # a square's maximum is that of its columns' maxima
        planes = _widest(planes, min(pixels, planes.shape[axis] - 1), axis)
    return planes[:, 0]


def _widest(planes: Tensor, reach: int, axis: int) -> Tensor:
    """The running maximum along one axis. Padded here, because max_pool2d pads by half its window at most."""
    rows, columns = (reach, 0) if axis == 2 else (0, reach)
    padded = F.pad(planes, (columns, columns, rows, rows))
    return F.max_pool2d(padded, (2 * rows + 1, 2 * columns + 1), stride=1)


def blur_mask(mask: Tensor, radius: float) -> Tensor:
    """Gaussian blur with a standard deviation of `radius` pixels; beyond the border the edge goes on."""
    mask = as_mask(mask)
    if radius < 0:
        raise FluxError(f"a mask cannot be blurred by {radius} pixels; use 0 or more")
    if radius == 0:
        return mask
    reach = math.ceil(3 * radius)
    bell = torch.exp(-0.5 * (torch.arange(-reach, reach + 1, dtype=torch.float32, device=mask.device) / radius) ** 2)
    bell = bell / bell.sum()
    planes = F.conv2d(_padded(mask[:, None], reach, 0), bell[None, None, :, None])
    planes = F.conv2d(_padded(planes, 0, reach), bell[None, None, None, :])
    return planes[:, 0].clamp(0, 1)


def _padded(planes: Tensor, rows: int, columns: int) -> Tensor:
    return F.pad(planes, (columns, columns, rows, rows), mode="replicate")


def feather_mask(mask: Tensor, pixels: int) -> Tensor:
    """1 on every white pixel, falling evenly to 0 within `pixels` around them; never beyond."""
    white = (as_mask(mask) > 0).float()
    reach = pixels // 2
    if reach <= 0:
        return white
    planes = grow_mask(white, reach)[:, None]
    planes = F.avg_pool2d(_padded(planes, reach, 0), (2 * reach + 1, 1), stride=1)
    planes = F.avg_pool2d(_padded(planes, 0, reach), (1, 2 * reach + 1), stride=1)
    return planes[:, 0]


def invert_mask(mask: Tensor) -> Tensor:
    return 1 - as_mask(mask)


def threshold_mask(mask: Tensor, level: float = HALF) -> Tensor:
    """1 where the mask has at least this level, else 0."""
    return (as_mask(mask) >= level).float()


def fit_mask(mask: Tensor, width: int, height: int, mode: str = "nearest") -> Tensor:
    """Stretch a mask to a size: "nearest" takes over levels (as diffusers does), "area" averages them."""
    if mode not in ("nearest", "area"):
        raise FluxError(f"a mask cannot be fitted by {mode!r}; use nearest or area")
    mask = as_mask(mask)
    if mask.shape[1:] == (height, width):
        return mask
    return F.interpolate(mask[:, None], size=(height, width), mode=mode)[:, 0]


def combine_masks(first: Tensor, second: Tensor, mode: str = "union") -> Tensor:
    """Two masks as one: "union", "intersect", "subtract" (the second from the first) or "difference".

    The second is fitted to the size of the first; a batch of one serves all of the other.
    """
    if mode not in COMBINE:
        raise FluxError(f"masks cannot be combined by {mode!r}; use {', '.join(COMBINE)}")
    first, second = as_mask(first), as_mask(second).to(first.device)
    if len(first) != len(second) and 1 not in (len(first), len(second)):
        raise FluxError(f"{len(first)} masks cannot be combined with {len(second)}; use as many, or one")
    return COMBINE[mode](first, mask_like(second, first.shape[2], first.shape[1]))


def mask_like(mask: Tensor, width: int, height: int) -> Tensor:
    """The mask at the size of the picture it belongs to, stretched where it has another, which is told."""
    mask = as_mask(mask)
    have = mask.shape[2], mask.shape[1]
    if have != (width, height):
        log.warning("the mask of %dx%d is stretched to %dx%d, the size of what it is used with", *have, width, height)
    return fit_mask(mask, width, height, "area" if have[0] > width else "nearest")
