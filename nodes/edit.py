"""Changing pictures by words: Kontext, and the Fill model."""

from __future__ import annotations

from typing import Annotated

from .edges import FLUX_CONDITIONING, FLUX_VAE, IMAGE, LATENT, MASK
from .host import current
from .latent import CHANNELS, FACTOR, FIT, FIT_HELP, LARGEST, MULTIPLE, picture, rgb
from .schema import Output, node
from .widgets import Choice, Range


@node("Kontext Condition", category="edit", aliases=("reference latent", "kontext", "edit", "reference"))
def kontext_condition(
    conditioning: Annotated[FLUX_CONDITIONING, "The prompt: what to change. From Encode Prompt or another condition."],
    image: Annotated[IMAGE, "The picture to look at."],
    vae: Annotated[FLUX_VAE, "The VAE, from Load FLUX."],
    size: Annotated[
        str,
        Choice(("preferred", "source", "canvas")),
        "How large to look at it: the nearest size Kontext was trained on, its own, or that of the canvas.",
    ] = "preferred",
    method: Annotated[
        str,
        Choice(("index", "offset")),
        "How several are told apart: index gives each a layer of its own, offset lays them side by side.",
    ] = "index",
    strength: Annotated[float, Range(0.0, 10.0, 0.05), "How much attention this picture gets."] = 1.0,
    fit: Annotated[str, FIT, FIT_HELP] = "crop",
) -> Annotated[FLUX_CONDITIONING, Output("conditioning"), "The prompt with this picture; several may follow."]:
    """Gives Kontext a picture to edit or to take something from. The first of a chain is the first reference."""
    from ..flux_runtime.conditions import Reference

    source = picture(image, vae, fit)
    width, height = _reference_size(source.image, size)
    return conditioning.plus(Reference(source, width, height, strength=strength, method=method))


def _reference_size(image: IMAGE, size: str) -> tuple[int, int]:
    """(width, height) to encode a reference at; (0, 0) is the canvas's."""
    from ..flux_runtime.sizes import reference_size

    return (0, 0) if size == "canvas" else reference_size(size, image.shape[2], image.shape[1], MULTIPLE)


@node("Kontext Canvas", category="edit", aliases=("kontext image scale", "size", "empty latent"))
def kontext_canvas(
    size: Annotated[
        str,
        Choice(("preferred", "source", "exact", "area")),
        "preferred: the trained size nearest to the picture. source: the picture's. exact: as below. area: the shape "
        "below at a megapixel.",
    ] = "preferred",
    width: Annotated[int, Range(16, LARGEST, 16), "For exact and area, and for preferred without a picture."] = 1024,
    height: Annotated[int, Range(16, LARGEST, 16), "For exact and area, and for preferred without a picture."] = 1024,
    batch_size: Annotated[int, Range(1, 64), "How many pictures to draw at once."] = 1,
    image: Annotated[IMAGE | None, "The picture to edit, which preferred and source go by."] = None,
) -> Annotated[LATENT, Output("latent"), "An empty latent of the chosen size, for Sample."]:
    """Sets the size that Kontext draws at, and says which one it is and why."""
    import torch

    from ..flux_runtime.sizes import kontext_size

    source = None if image is None else (rgb(image).shape[2], image.shape[1])
    chosen = kontext_size(size, source, width, height, multiple=MULTIPLE)
    current().text(chosen.why)
    return {"samples": torch.zeros(batch_size, CHANNELS, chosen.height // FACTOR, chosen.width // FACTOR)}


@node("Fill Condition", category="edit", aliases=("inpaint model conditioning", "fill", "inpaint", "outpaint"))
def fill_condition(
    conditioning: Annotated[FLUX_CONDITIONING, "The prompt: what to fill in. From Encode Prompt."],
    image: Annotated[IMAGE, "The picture to fill, for example from Pad for Outpaint."],
    mask: Annotated[MASK, "White where to fill. Another size is stretched to the picture's."],
    vae: Annotated[FLUX_VAE, "The VAE, from Load FLUX."],
    fit: Annotated[str, FIT, FIT_HELP] = "crop",
) -> tuple[
    Annotated[FLUX_CONDITIONING, Output("conditioning"), "The prompt with the picture and its mask."],
    Annotated[LATENT, Output("latent"), "The picture as a latent of the right size, for Sample."],
]:
    """Gives the FLUX.1 Fill model a picture with a hole in it. Other models have no place for it."""
    from ..flux_runtime.conditions import FillImage
    from ..flux_runtime.fit import fit as bring_to_size
    from ..flux_runtime.pictures import masked_picture

    source = masked_picture(picture(image, vae, fit), mask)
    pixels = bring_to_size(source.picture.image, mode=fit, multiple=MULTIPLE)
    return conditioning.plus(FillImage(source, source.mask)), {"samples": vae.encode_once(pixels).float().cpu()}
