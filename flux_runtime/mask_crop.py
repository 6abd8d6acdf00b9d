"""diffusers' padding_mask_crop, number for number: draw the masked part of a picture large, and paste it back."""

from __future__ import annotations

import logging
from dataclasses import dataclass

from PIL import Image, ImageOps

from .crop import Box
from .errors import FluxError

log = logging.getLogger("fluxcanvas")


@dataclass(frozen=True)
class MaskCrop:
    """The masked part of a picture at the size to draw: `image` is RGB, `mask` L; with what is needed to paste back."""

    image: Image.Image
    mask: Image.Image
    box: Box
    source: Image.Image
    source_mask: Image.Image


def crop_region(mask: Image.Image, width: int, height: int, padding: int = 0) -> Box:
    """The box of all that is not black in a mask, padded, then made as wide to its height as width is to height.

    It stays inside the mask, at the price of its shape where the mask is too small for it.
    """
    found = mask.convert("L").getbbox()
    if found is None:
        raise FluxError("the mask is black everywhere, so there is nothing to crop to: paint white what is to change")
    left, right = max(found[0] - padding, 0), min(found[2] + padding, mask.width)
    top, bottom = max(found[1] - padding, 0), min(found[3] + padding, mask.height)
    ratio = width / height
    if (right - left) / (bottom - top) > ratio:
        top, bottom = _lengthen(top, bottom, (right - left) / ratio, mask.height)
    else:
        left, right = _lengthen(left, right, (bottom - top) * ratio, mask.width)
    return Box(left, top, right, bottom)


def _lengthen(low: int, high: int, wanted: float, limit: int) -> tuple[int, int]:
    """An interval made longer about its middle, pushed back into 0..limit, and cut where it is longer than that."""
    more = int(wanted - (high - low))  # an odd pixel goes to the far side
    length = high - low + more
    low = max(0, min(low - more // 2, limit - length))
    return low, min(low + length, limit)


def crop_to_mask(image: Image.Image, mask: Image.Image, width: int, height: int, padding: int = 32) -> MaskCrop:
    """Cut the masked part out of a picture and bring it to width x height; its edges go on where it is too short."""
    if mask.size != image.size:
        log.warning("the mask of %dx%d is stretched to the picture's %dx%d", *mask.size, *image.size)
        mask = mask.resize(image.size, Image.Resampling.NEAREST)
    box = crop_region(mask, width, height, padding)
    part, part_mask = (resize_fill(picture.crop(tuple(box)), width, height) for picture in (image, mask.convert("L")))
    return MaskCrop(part, part_mask.convert("L"), box, image, mask)


def paste_back(crop: MaskCrop, drawn: Image.Image) -> Image.Image:
    """Put what was drawn for a crop back into its picture, seen through the mask; RGB."""
    back = Image.new("RGBA", crop.source.size, (0, 0, 0, 255))
    back.paste(resize_cover(drawn.convert("RGB"), crop.box.width, crop.box.height), (crop.box.left, crop.box.top))
    # The picture lies on top, with a hole where the mask is white. Its colours are multiplied with the hole's alpha and
    # divided again ("RGBa" to "RGBA"): the roundings of that are diffusers', and decide about the last bit.
    front = Image.new("RGBa", crop.source.size)
    front.paste(crop.source.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(crop.source_mask.convert("L")))
    return Image.alpha_composite(back, front.convert("RGBA")).convert("RGB")


def resize_fill(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The whole picture within width x height, RGB; its outermost rows or columns go on over what is left."""
    inner = _covering(picture.convert("RGB"), width, height, inside=True)
    across, down = (width - inner.width + 1) // 2, (height - inner.height + 1) // 2
    place = width // 2 - inner.width // 2, height // 2 - inner.height // 2
    result = Image.new("RGB", (width, height))
    for x, y in ((0, 0), (inner.width, inner.height)):  # an edge is a box without area: PIL goes on from there
        if down:
            result.paste(inner.resize((width, down), box=(0, y, width, y)), (0, y and place[1] + y))
        elif across:
            result.paste(inner.resize((across, height), box=(x, 0, x, height)), (x and place[0] + x, 0))
    result.paste(inner, place)
    return result


def resize_cover(picture: Image.Image, width: int, height: int) -> Image.Image:
    """The picture over all of width x height, cut evenly where it is larger."""
    outer = _covering(picture, width, height, inside=False)
    left, top = outer.width // 2 - width // 2, outer.height // 2 - height // 2
    return outer.crop((left, top, left + width, top + height))


def _covering(picture: Image.Image, width: int, height: int, inside: bool) -> Image.Image:
    """Resize with the proportions kept (sides are floored), to lie inside of a size or to cover it."""
    wider = picture.width / picture.height > width / height
    if wider == inside:
        size = width, max(1, picture.height * width // picture.width)
    else:
        size = max(1, picture.width * height // picture.height), height
    return picture.resize(size, resample=Image.Resampling.LANCZOS)
