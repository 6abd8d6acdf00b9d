"""Masks, and drawing in a part of a picture only."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from ..flux_runtime.errors import FluxError
from .edges import FLUX_STITCH, IMAGE, LATENT, MASK
from .host import current
from .latent import FACTOR, FIT, FIT_HELP, LARGEST, MULTIPLE, rgb, samples_of
from .schema import Output, node
from .widgets import Choice, Flag, Range

if TYPE_CHECKING:
    from torch import Tensor


@node("Inpaint Mask", category="mask", aliases=("set latent noise mask", "inpaint", "differential", "soft inpainting"))
def inpaint_mask(
    latent: Annotated[LATENT, "The picture to change, from Encode Image."],
    mask: Annotated[MASK, "White where to draw anew."],
    mode: Annotated[
        str,
        Choice(("hard", "soft")),
        "hard: what is brighter than half is redrawn, the rest kept. soft: the darker the grey, the less is changed.",
    ] = "hard",
    fit: Annotated[str, FIT, FIT_HELP + " Choose what Encode Image has."] = "crop",
) -> Annotated[LATENT, Output("latent"), "The picture with its mask, for Sample."]:
    """Has Sample redraw the white part of a picture and keep the rest. Works with every model."""
    from ..flux_runtime.fit import fit as bring_to_size
    from ..flux_runtime.masks import HALF, check_mask, threshold_mask

    level = HALF if mode == "hard" else 0.0
    height, width = (side * FACTOR for side in samples_of(latent).shape[2:])
    flags = bring_to_size(check_mask(mask, level)[..., None], width, height, fit, FACTOR)[..., 0]
    flags = check_mask(flags, level, "the mask, brought to the size of the latent,")
    flags = threshold_mask(flags) if mode == "hard" else flags
    return {**latent, "noise_mask": flags[:, None], "noise_mask_mode": mode}


@node("Mask Edit", category="mask", aliases=("grow mask", "blur mask", "feather", "invert mask", "threshold"))
def mask_edit(
    mask: Annotated[MASK, "The mask, for example from Load Image."],
    invert: Annotated[bool, Flag(), "Swap black and white, first of all."] = False,
    threshold: Annotated[
        float, Range(0.0, 1.0, 0.01), "Then make what is at least this bright white and the rest black. 0: leave greys."
    ] = 0.0,
    grow: Annotated[int, Range(-512, 512), "Then widen the white part by so many pixels; below 0 narrows it."] = 0,
    blur: Annotated[float, Range(0.0, 256.0, 0.5), "Last, soften the edges over about so many pixels."] = 0.0,
) -> Annotated[MASK, Output("mask"), "The changed mask."]:
    """Inverts a mask, makes it black and white, grows or shrinks it and blurs it, in this order."""
    from ..flux_runtime import masks

    edited = masks.invert_mask(mask) if invert else masks.as_mask(mask)
    edited = masks.threshold_mask(edited, threshold) if threshold else edited
    return masks.blur_mask(masks.grow_mask(edited, grow), blur)


@node("Combine Masks", category="mask", aliases=("mask composite", "add masks", "subtract"))
def combine_masks(
    first: Annotated[MASK, "A mask."],
    second: Annotated[MASK, "Another; stretched to the size of the first."],
    mode: Annotated[
        str,
        Choice(("union", "intersect", "subtract", "difference")),
        "union: white in either. intersect: in both. subtract: in the first alone. difference: in one of them.",
    ] = "union",
) -> Annotated[MASK, Output("mask"), "One mask of both."]:
    """Makes one mask of two."""
    from ..flux_runtime.masks import combine_masks as combined

    return combined(first, second, mode)


@node("Crop for Inpaint", category="mask", aliases=("inpaint crop", "crop and stitch", "only masked", "detailer"))
def crop_for_inpaint(
    image: Annotated[IMAGE, "The whole picture."],
    mask: Annotated[MASK, "White where to draw anew."],
    padding: Annotated[int, Range(0, 1024), "How many pixels around the white part to take along."] = 32,
    expand: Annotated[
        float, Range(1.0, 10.0, 0.1), "How many times as large to make what is cut out after that."
    ] = 1.0,
    width: Annotated[
        int, Range(0, LARGEST, MULTIPLE), "Width to draw the part at. 0: its own, or as the height asks."
    ] = 0,
    height: Annotated[int, Range(0, LARGEST, MULTIPLE), "Height to draw it at. 0: its own, or as the width asks."] = 0,
    blend: Annotated[int, Range(0, 512), "Over how many pixels around the white part old and new are blended."] = 16,
) -> tuple[
    Annotated[IMAGE, Output("image"), "The part to draw in, for Encode Image or Fill Condition."],
    Annotated[MASK, Output("mask"), "Its mask."],
    Annotated[FLUX_STITCH, Output("stitch"), "Where it came from, for Stitch Back."],
]:
    """Cuts out the part of a picture around a mask, so that small things are drawn large. Stitch Back puts it back."""
    from ..flux_runtime.crop import crop_for_inpaint as crop

    sides = {"width": width // MULTIPLE * MULTIPLE, "height": height // MULTIPLE * MULTIPLE}
    part, flags, stitch = crop(rgb(image), mask, padding=padding, expand=expand, blend=blend, **sides)
    box = stitch.box
    current().text(
        f"{box.width}x{box.height} pixels from ({box.left}, {box.top}), drawn at {part.shape[2]}x{part.shape[1]}"
    )
    return part, flags, stitch


@node("Stitch Back", category="mask", aliases=("inpaint stitch", "crop and stitch", "paste"))
def stitch_back(
    stitch: Annotated[FLUX_STITCH, "Where the part came from, from Crop for Inpaint."],
    image: Annotated[IMAGE, "The drawn part, from Decode."],
) -> Annotated[IMAGE, Output("image"), "The whole picture; outside the mask and its blend it is the old one exactly."]:
    """Puts a part that was drawn anew back into its picture."""
    from ..flux_runtime.crop import stitch_back as put_back

    return put_back(stitch, rgb(image))


ROOM = Range(0, LARGEST, MULTIPLE)


@node("Pad for Outpaint", category="mask", aliases=("outpaint", "extend", "uncrop", "enlarge canvas"))
def pad_for_outpaint(
    image: Annotated[IMAGE, "The picture to go on from."],
    left: Annotated[int, ROOM, "How many pixels to add on the left."] = 0,
    top: Annotated[int, ROOM, "How many to add at the top."] = 0,
    right: Annotated[int, ROOM, "How many to add on the right."] = 256,
    bottom: Annotated[int, ROOM, "How many to add at the bottom."] = 0,
    feather: Annotated[int, Range(0, 1024), "Over how many pixels what is drawn may run into the picture."] = 40,
    fill: Annotated[
        str, Choice(("edge", "grey")), "What lies under the new part: the picture's edge repeated, or grey."
    ] = "edge",
) -> tuple[
    Annotated[IMAGE, Output("image"), "The larger picture."],
    Annotated[MASK, Output("mask"), "White where there is something to draw."],
]:
    """Makes room around a picture, and a mask for it, so that it can be drawn on outwards."""
    from ..flux_runtime.crop import pad_for_outpaint as pad

    return pad(rgb(image), left, top, right, bottom, feather, fill)


def region_of(mask: MASK) -> Tensor:
    """(H, W) of a MASK: a region holds for every picture of the batch, so there is one."""
    from ..flux_runtime.masks import check_mask

    flags = check_mask(mask, level=0)
    if len(flags) != 1:
        raise FluxError(f"a region is one mask, and {len(flags)} were given; connect a batch of one")
    return flags[0]
