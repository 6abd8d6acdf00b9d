"""Working on the part of a picture that a mask marks, and putting the result back; and room for painting outwards.

Any size, batches, and the source is untouched outside what is blended in. (mask_crop.py has diffusers' way of this.)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import FluxError
from .fit import fit
from .image import MAX_SIDE
from .masks import check_mask, feather_mask, mask_like

FILLS = ("edge", "grey")


@dataclass(frozen=True)
class Box:
    """A part of a picture, in pixels; right and bottom are the first ones outside. It may overhang the picture."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    def __iter__(self) -> Iterator[int]:
        return iter((self.left, self.top, self.right, self.bottom))


@dataclass(frozen=True)
class Stitch:
    """Where a crop came from: the pictures (B, H, W, C), the box cut out of them, and how much of it goes back.

    `weight` (B or 1, h, w) has the box's size: 1 where the new picture replaces the source, 0 where nothing changes.
    """

    source: Tensor
    box: Box
    weight: Tensor


def crop_for_inpaint(
    image: Tensor, mask: Tensor, *, padding: int = 32, expand: float = 1.0, width: int = 0, height: int = 0,
    multiple: int = 16, blend: int = 16,
) -> tuple[Tensor, Tensor, Stitch]:  # fmt: skip
    """Cut the masked part out of (B, H, W, C) pictures -> crop (B, h, w, 3), its mask (B, h, w), and the way back.

    One box serves the batch: that of every white pixel, `padding` pixels wider (at least `blend`) and `expand` times as
    large. It is brought to width x height; a side of 0 follows the other, and where both are 0 the pixels stay as they
    are and the box is widened to the multiple. A box larger than the picture overhangs it: the picture's edge goes on.
    `blend` is how many pixels around the mask fade from the new picture to the source.
    """
    image, mask = _paired(image, mask)
    if width % multiple or height % multiple or min(width, height, padding, blend) < 0 or expand < 1:
        raise FluxError(
            f"a crop of {width}x{height} with padding {padding}, blend {blend} and expand {expand:g} cannot be made: "
            f"sides must be multiples of {multiple}, padding and blend 0 or more, expand 1 or more"
        )
    have = image.shape[2], image.shape[1]
    wide, high = _context(mask, max(padding, blend), expand, have)
    wide, high, size = _shaped(wide, high, width, height, multiple, have)
    box = Box(wide[0], high[0], wide[1], high[1])
    if max(size) > MAX_SIDE:
        raise FluxError(f"a crop of {size[0]}x{size[1]} is larger than {MAX_SIDE} pixels; choose a smaller size")
    marked = _take(mask[..., None], box)[..., 0] * _inside(box, have).to(mask)
    stitch = Stitch(image, box, _take(feather_mask(mask, blend)[..., None], box)[..., 0])
    part = fit(_take(image[..., :3], box), *size, "stretch", multiple)
    # The largest of the pixels that fall together: what is marked must not be lost where a crop is made smaller.
    return part, F.adaptive_max_pool2d(marked[:, None], size[::-1])[:, 0], stitch


def _paired(image: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures and masks as two batches that fit: of one size, and as many masks as pictures or one."""
    if image.ndim != 4 or image.shape[-1] < 3:
        raise FluxError(f"pictures must have the shape (batch, height, width, 3); got {tuple(image.shape)}")
    mask = mask_like(check_mask(mask, level=0), image.shape[2], image.shape[1]).to(image.device)
    if len(image) == 1 and len(mask) > 1:
        image = image.expand(len(mask), -1, -1, -1)
    if len(mask) not in (1, len(image)):
        raise FluxError(f"{len(mask)} masks cannot be used with {len(image)} pictures; use one, or one for each")
    return image, check_mask(mask, level=0)


Span = tuple[int, int]


def _context(mask: Tensor, padding: int, expand: float, have: tuple[int, int]) -> tuple[Span, Span]:
    """The columns and the rows of all that is marked in the batch, padded and expanded as far as the picture goes."""
    marked = (mask > 0).any(0)
    spans = []
    for axis, limit in enumerate(have):
        found = marked.any(axis).nonzero().flatten().tolist()
        low, high = max(found[0] - padding, 0), min(found[-1] + 1 + padding, limit)
        spans.append(_around(low, high, min(limit, round((high - low) * expand)), limit))
    return spans[0], spans[1]


def _shaped(
    wide: Span, high: Span, width: int, height: int, multiple: int, have: tuple[int, int]
) -> tuple[Span, Span, tuple[int, int]]:
    """Widen a box to the shape of the crop; and the crop's size."""
    across, down = wide[1] - wide[0], high[1] - high[0]
    if not width and not height:
        across, down = (math.ceil(side / multiple) * multiple for side in (across, down))
        size = across, down
    else:
        size = (
            width or math.ceil(height * across / down / multiple) * multiple,
            height or math.ceil(width * down / across / multiple) * multiple,
        )
        ratio = size[0] / size[1]
        across, down = max(across, round(down * ratio)), max(down, round(across / ratio))
    return _around(*wide, across, have[0]), _around(*high, down, have[1]), size


def _around(low: int, high: int, length: int, limit: int) -> Span:
    """A span of this length about another one: within 0..limit where it fits there, else around all of it."""
    first, last = sorted((0, limit - length))
    start = min(max(low - (length - (high - low)) // 2, first), last)
    return start, start + length


def _take(planes: Tensor, box: Box) -> Tensor:
    """The part of (B, H, W, C) planes in a box; where it overhangs them, their edge goes on."""
    rows = torch.arange(box.top, box.bottom, device=planes.device).clamp(0, planes.shape[1] - 1)
    columns = torch.arange(box.left, box.right, device=planes.device).clamp(0, planes.shape[2] - 1)
    return planes[:, rows][:, :, columns]


def _inside(box: Box, have: tuple[int, int]) -> Tensor:
    """(h, w): which pixels of a box lie in the picture."""
    columns, rows = torch.arange(box.left, box.right), torch.arange(box.top, box.bottom)
    return ((rows >= 0) & (rows < have[1]))[:, None] & ((columns >= 0) & (columns < have[0]))


def stitch_back(stitch: Stitch, image: Tensor) -> Tensor:
    """Put a drawn crop of any size back -> (B, H, W, C), which is the source itself wherever the weight is 0.

    More crops than pictures were cut from repeat the pictures in turn.
    """
    if image.ndim != 4 or image.shape[-1] < 3 or len(image) % len(stitch.source):
        raise FluxError(
            f"a crop of shape {tuple(image.shape)} cannot be stitched into {len(stitch.source)} pictures; "
            "use the crop's own pictures, or several drawn from each"
        )
    times, box = len(image) // len(stitch.source), stitch.box
    result = stitch.source.repeat(times, 1, 1, 1)
    height, width = result.shape[1:3]
    new = fit(image[..., :3].to(result), box.width, box.height, "stretch", multiple=1)
    weight = stitch.weight.to(result).repeat(len(image) // len(stitch.weight), 1, 1)[..., None]
    left, top, right, bottom = max(box.left, 0), max(box.top, 0), min(box.right, width), min(box.bottom, height)
    shown = (slice(None), slice(top - box.top, bottom - box.top), slice(left - box.left, right - box.left))
    old, new, weight = result[:, top:bottom, left:right, :3], new[shown], weight[shown]
    # Chosen, and not only weighted: the source's bits stay even if what was drawn is not a number there.
    result[:, top:bottom, left:right, :3] = torch.where(weight > 0, old.lerp(new, weight), old)
    return result


def pad_for_outpaint(
    image: Tensor, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0, feather: int = 40, fill: str = "edge"
) -> tuple[Tensor, Tensor]:
    """Make (B, H, W, C) pictures larger -> them, and a mask (B, H', W') that is 1 on what was added.

    What was added repeats the edge, or is grey. Within the picture the mask falls from 1 to 0 over `feather` pixels
    from the sides that grew, so that what is drawn may run into it.
    """
    if fill not in FILLS:
        raise FluxError(f"a padded picture cannot be filled with {fill!r}; use {', '.join(FILLS)}")
    if min(left, top, right, bottom, feather) < 0 or not any((left, top, right, bottom)):
        raise FluxError(
            "outpainting needs room on at least one side: give left, top, right or bottom as 1 pixel or more"
        )
    batch, height, width = image.shape[:3]
    box = Box(-left, -top, width + right, height + bottom)
    if max(box.width, box.height) > MAX_SIDE:
        raise FluxError(f"a picture of {box.width}x{box.height} is larger than {MAX_SIDE} pixels; add less room")
    padded, inside = _take(image, box), _inside(box, (width, height)).to(image.device)
    if fill == "grey":
        padded[:, ~inside] = 0.5
    ramp = _ramp(width, left, right, feather)[None, :].maximum(_ramp(height, top, bottom, feather)[:, None])
    mask = torch.ones(box.height, box.width, device=image.device)
    mask[inside] = ramp.flatten().to(mask)
    return padded, mask.expand(batch, -1, -1).contiguous()


def _ramp(length: int, before: int, after: int, feather: int) -> Tensor:
    """(length,): falling evenly from 1 at the ends that grew to 0 at `feather` pixels from them."""
    place = torch.arange(length) + 0.5
    distance = torch.full((length,), math.inf)
    if before:
        distance = place
    if after:
        distance = distance.minimum(length - place)
    return (1 - distance / feather).clamp(min=0) if feather else torch.zeros(length)
