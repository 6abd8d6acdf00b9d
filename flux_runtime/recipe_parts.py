"""The pieces that several recipes are made of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
from PIL import Image
from torch import Tensor

from .conditioning import Conditioning
from .conditions import ControlImage, Negative, Reference, SideNetCondition
from .errors import FluxError
from .flux import Flux
from .image import ImageLike, as_images, unit_range, upright
from .job import Common, Job, Pictures, Texts, begin
from .mask_crop import crop_to_mask, paste_back
from .masks import binary_mask, check_mask, mask_from_image, mask_levels
from .pictures import Encoded
from .sidenets import ControlNet
from .sizes import kontext_size, reference_size

log = logging.getLogger("fluxcanvas")

SizeMode = Literal["exact", "source", "preferred", "area"]
ReferenceSize = Literal["preferred", "source"]
ReferenceMethod = Literal["index", "offset"]


class Nets(Common, total=False):
    """The options of the ControlNet recipes: one of each, or lists of equal length.

    `controlnet_start` and `controlnet_end` are fractions of the run; `control_mode` is the type for a union net;
    `controlnet_negative` says what the nets do in the negative pass of true CFG.
    """

    controlnet_scale: float | Sequence[float]
    controlnet_start: float | Sequence[float]
    controlnet_end: float | Sequence[float]
    controlnet_curve: Sequence[float]
    control_mode: int | Sequence[int | None] | None
    controlnet_negative: Negative


def listed(value: Any) -> list:
    """None, one thing or several -> a list."""
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def encoded_source(job: Job, image: ImageLike, *, sampled: bool = True) -> Tensor:
    return job.encode(as_images(image, job.width, job.height), sampled=sampled)


def masked_inputs(
    job: Job, image: ImageLike, mask: ImageLike, padding: int | None
) -> tuple[Tensor, Tensor, Callable[[Pictures], Pictures]]:
    """Pixels and mask at the canvas's size, and what to do with the drawn pictures.

    With a `padding` the canvas is the part of the picture around the mask, so many pixels wider on each side, and what
    was drawn is pasted back into the whole.
    """
    if padding is None:
        return as_images(image, job.width, job.height), fitted_mask(job, mask), lambda drawn: drawn
    if (
        not isinstance(image, Image.Image)
        or not isinstance(mask, Image.Image)
        or job.options.get("output", "pil") != "pil"
    ):
        raise FluxError('padding_mask_crop works on one PIL picture and mask, and draws with output="pil"')
    crop = crop_to_mask(upright(image), upright(mask), job.width, job.height, padding)

    def finish(drawn: Pictures) -> Pictures:
        return [paste_back(crop, picture) for picture in drawn]

    return as_images(crop.image), fitted_mask(job, crop.mask), finish


def fitted_mask(job: Job, mask: ImageLike) -> Tensor:
    """(B or 1, H, W) at the canvas's size, of 0 and 1 alone unless `soft_mask` is asked for; never all black."""
    read = mask_levels if job.options.get("soft_mask") else binary_mask
    flags = read(mask, job.width, job.height)
    if not flags.any():
        raise FluxError("the mask has no white pixel, so nothing would be drawn; paint white what is to be redrawn")
    return flags


def region_mask(mask: ImageLike) -> Tensor:
    """(H, W) of one mask of any kind; greys count in part."""
    pixels = isinstance(mask, (np.ndarray, Tensor))
    flags = check_mask(unit_range(mask) if pixels else mask_from_image(mask), level=0, what="the region's mask")
    if len(flags) != 1:
        raise FluxError(f"a region is one mask, and {len(flags)} were given; give one")
    return flags[0]


def control_condition(job: Job, image: ImageLike) -> ControlImage:
    return ControlImage(Encoded(job.encode_batch(as_images(image, job.width, job.height))))


def begin_nets(flux: Flux, prompt: Texts | Conditioning, options: Nets) -> tuple[Job, Nets]:
    """Separate the options of the nets from those that all recipes share."""
    own = set(Nets.__annotations__) - set(Common.__annotations__)
    nets = {name: value for name, value in options.items() if name in own}
    return begin(flux, prompt, {name: value for name, value in options.items() if name not in own}), nets


def side_nets(job: Job, nets: ControlNet | Sequence[ControlNet], images: Any, options: Nets) -> list[SideNetCondition]:
    """One condition for each image, encoded in their order; a single net with several images serves them all."""
    every, pictures = listed(nets), listed(images)
    every = every * len(pictures) if len(every) == 1 else every
    if len(every) != len(pictures) or not every:
        raise FluxError(f"{len(pictures)} control images were given for {len(every)} ControlNets; give one for each")
    names = ("controlnet_scale", "controlnet_start", "controlnet_end", "control_mode")
    defaults = (1.0, 0.0, 1.0, None)
    columns = [_column(options.get(n, d), len(every), n, "ControlNets") for n, d in zip(names, defaults, strict=True)]
    curve, negative = tuple(options.get("controlnet_curve", ())), options.get("controlnet_negative", "reuse")
    return [
        SideNetCondition(net, _hint(job, net, picture), scale, start, end, curve, mode, negative)
        for net, picture, scale, start, end, mode in zip(every, pictures, *columns, strict=True)
    ]


def _column(value: Any, count: int, name: str, what: str) -> list:
    """A value for each of so many things."""
    if not isinstance(value, (list, tuple)):
        return [value] * count
    if len(value) != count:
        raise FluxError(f"{name} has {len(value)} values for {count} {what}; give one, or one for each")
    return list(value)


def _hint(job: Job, net: ControlNet, picture: ImageLike) -> Encoded:
    pixels = as_images(picture, job.width, job.height)
    if net.model.reads_latents:
        return Encoded(job.encode_batch(pixels))
    return Encoded(image=job.for_each(pixels))


def kontext_canvas(
    flux: Flux, pictures: Sequence[ImageLike], size: SizeMode, options: Common
) -> tuple[int, int] | None:
    """What Kontext draws, as (width, height); None leaves it to the width and height asked for."""
    if size == "exact" or (not pictures and size != "area"):
        return None
    source = _size_of(pictures[0], "source", flux.model.latent.multiple) if pictures else None
    chosen = kontext_size(size, source, options.get("width") or 0, options.get("height") or 0)
    log.info(chosen.why)
    return chosen.width, chosen.height


def references(
    job: Job,
    pictures: Sequence[ImageLike],
    size: ReferenceSize | tuple[int, int],
    strength: float | Sequence[float],
    method: ReferenceMethod,
) -> list[Reference]:
    """Pictures for Kontext to look at, encoded at the preferred size nearest to their shape, their own, or a given one.

    They are told apart by the index of their positions, or by an offset of it.
    """
    strengths = _column(strength, len(pictures), "reference_strength", "pictures")
    made = []
    for number, (picture, weight) in enumerate(zip(pictures, strengths, strict=True), 1):
        width, height = size if isinstance(size, tuple) else _size_of(picture, size, job.flux.model.latent.multiple)
        raw = job.encode(as_images(picture, width, height), sampled=False)
        place = {"index": number} if method == "index" else {"method": method}
        made.append(Reference(Encoded(raw), width, height, strength=weight, **place))
    return made


def _size_of(picture: ImageLike, mode: str, multiple: int) -> tuple[int, int]:
    images = as_images(picture)
    return reference_size(mode, images.shape[2], images.shape[1], multiple)
