"""Picture files: checked opening, IMAGE and MASK tensors from any mode, names for saved files, PNG metadata."""

from __future__ import annotations

import functools
import io
import json
import logging
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from ...flux_runtime.errors import FluxError
from ...flux_runtime.image import deep_levels
from .files import contained, relative, told, write_atomic

log = logging.getLogger("fluxcanvas")
# What PIL may try on a file that came from outside: the ordinary formats, none of its exotic parsers.
_ORDINARY = ("PNG", "JPEG", "MPO", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
_KEYWORD = re.compile(r"[\x20-\x7e\xa1-\xff]{1,79}")  # what PNG allows
_BROKEN = (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError)


@functools.cache
def formats() -> tuple[str, ...]:
    """The ordinary formats that this Pillow can read."""
    Image.init()
    return tuple(name for name in _ORDINARY if name in Image.OPEN)


def open_picture(source: Path | bytes, name: str = "") -> Image.Image:
    """Open and fully decode a picture file or its bytes; FluxError naming it when it is none."""
    name = name or (source.name if isinstance(source, Path) else "the file")
    try:
        picture = Image.open(io.BytesIO(source) if isinstance(source, bytes) else source, formats=formats())
        picture.load()
    except FileNotFoundError:
        raise FluxError(
            f"The picture {name} does not exist in its folder; upload it again or choose another."
        ) from None
    except UnidentifiedImageError:
        raise FluxError(f"{name} is not a picture; PNG, JPEG, WebP, GIF, BMP, TIFF and AVIF can be read.") from None
    except _BROKEN as error:
        raise FluxError(f"The picture {name} is damaged or too large to read: {error}.") from error
    return picture


def frames(picture: Image.Image) -> list[Image.Image]:
    """The frames that have the first one's size, turned upright as EXIF says; of a camera's MPO the first alone."""
    found: list[Image.Image] = []
    for frame in ImageSequence.Iterator(picture):
        upright = ImageOps.exif_transpose(frame)
        if not found or upright.size == found[0].size:
            found.append(upright.copy())
        if picture.format == "MPO":
            break
    return found


def eight_bit(picture: Image.Image) -> Image.Image:
    """The picture with at most 8 bits a channel; PIL's own conversion of deeper ones clips them to white."""
    levels = deep_levels(picture)
    return picture if levels is None else Image.fromarray((levels * 255).round().astype(np.uint8))


def with_alpha(picture: Image.Image) -> Image.Image | None:
    """The picture as RGBA if it has any transparency (a channel, a palette entry, a key colour), else None."""
    if "A" in picture.getbands():
        return picture.convert("RGBA")
    return picture.convert("RGBA") if "transparency" in picture.info and deep_levels(picture) is None else None


def hole_mask(picture: Image.Image) -> Tensor:
    """(H, W) float32: 1 where the picture is transparent, 0 where it is opaque or has no transparency."""
    transparent = with_alpha(picture)
    if transparent is None:
        return torch.zeros(picture.height, picture.width)
    return channel_mask(transparent, "A", invert=True)


def channel_mask(picture: Image.Image, band: str, invert: bool = False) -> Tensor:
    """(H, W) float32 in 0..1: one band ("R", "G", "B" or "A") of a picture."""
    levels = deep_levels(picture)
    if levels is None:
        levels = np.asarray(picture.convert("RGBA").getchannel(band), dtype=np.float32) / 255
    return torch.from_numpy(1 - levels if invert else levels)


def to_picture(image: Tensor) -> Image.Image:
    """(H, W, C) in 0..1 with 1, 3 or 4 channels -> an 8-bit picture; NaN becomes black."""
    if image.ndim != 3 or image.shape[-1] not in (1, 3, 4):
        raise FluxError(f"An image of shape {tuple(image.shape)} cannot be saved; (height, width, 1, 3 or 4) can.")
    pixels = (image.detach().float().nan_to_num(0).clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy()
    return Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)


def png_info(prompt: Any, extra: Mapping[str, Any] | None) -> PngInfo:
    """PNG text with the prompt and what the canvas sends along (the workflow): what dragging the file back reads."""
    info = PngInfo()
    if prompt is not None:
        info.add_text("prompt", json.dumps(prompt))
    for key, value in (extra or {}).items():
        if not _KEYWORD.fullmatch(key):
            log.warning("%r is left out of the picture: PNG has no such name for a text", key[:80])
        else:
            info.add_text(key, json.dumps(value))
    return info


def save_png(picture: Image.Image, path: Path, info: PngInfo | None, compress_level: int) -> None:
    """Write a new PNG, whole or not at all; FluxError when the disk is full, Taken when there is such a file."""
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", pnginfo=info, compress_level=compress_level)
    write_atomic(path, buffer.getvalue(), overwrite=False)


def _fill_in(prefix: str, width: int, height: int) -> str:
    """Replace %width%, %height%, %year%, %month%, %day%, %hour%, %minute% and %second% in a file name prefix."""
    now = time.localtime()
    values = {"width": width, "height": height, "year": now.tm_year}
    values |= {
        name: f"{getattr(now, f'tm_{short}'):02}"
        for name, short in (("month", "mon"), ("day", "mday"), ("hour", "hour"), ("minute", "min"), ("second", "sec"))
    }
    for name, value in values.items():
        prefix = prefix.replace(f"%{name}%", str(value))
    return prefix


def next_name(root: Path, prefix: str, width: int, height: int) -> tuple[Path, str, str, int]:
    """(folder, its path below root, file prefix, first free number) for `prefix`, which may name sub-folders."""
    inner = relative(_fill_in(prefix, width, height)) or "image"
    below, _, stem = inner.rpartition("/")
    folder = contained(root, below)
    pattern = re.compile(re.escape(stem).replace("%batch_num%", r"\d+") + r"_(\d+)_\.[a-z]+", re.IGNORECASE)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = [int(match[1]) for path in folder.iterdir() if (match := pattern.fullmatch(path.name))]
    except OSError as error:
        raise told(error, folder / stem) from error
    return folder, below, stem, max(taken, default=0) + 1
