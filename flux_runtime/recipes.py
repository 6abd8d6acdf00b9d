"""The pipelines of the diffusers Flux page as short functions, all through the one loop.

Each draws its random numbers in the order of its diffusers counterpart, so that the same generator gives the same
picture. `prompt` is a text, several texts, or a `Conditioning` made before (by `redux_prior`, say). The options that
all share are those of `job.Common`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .adapters import Redux
from .conditioning import Conditioning, Prompt
from .conditions import FillImage
from .flux import Flux
from .image import ImageLike, by_size
from .job import Common, Pictures, Texts, begin
from .pictures import Encoded, grey_out
from .recipe_parts import (
    Nets,
    ReferenceMethod,
    ReferenceSize,
    SizeMode,
    begin_nets,
    control_condition,
    encoded_source,
    kontext_canvas,
    listed,
    masked_inputs,
    references,
    region_mask,
    side_nets,
)
from .redux import Combine, redux_prompts
from .sidenets import ControlNet

if TYPE_CHECKING:
    from typing_extensions import Unpack

Words = Texts | Conditioning


def text_to_image(flux: Flux, prompt: Words, **common: Unpack[Common]) -> Pictures:
    """Draw pictures of a prompt, or of several."""
    job = begin(flux, prompt, common)
    return job.draw(job.noise())


def image_to_image(
    flux: Flux, prompt: Words, *, image: ImageLike, strength: float = 0.6, **common: Unpack[Common]
) -> Pictures:
    """Redraw a picture; `strength` is the share of the steps that are drawn, 1 keeps nothing of it."""
    job = begin(flux, prompt, common)
    source = encoded_source(job, image)
    return job.draw(job.noise(), source=source, strength=strength)


def inpaint(
    flux: Flux,
    prompt: Words,
    *,
    image: ImageLike,
    mask: ImageLike,
    strength: float = 0.6,
    padding_mask_crop: int | None = None,
    **common: Unpack[Common],
) -> Pictures:
    """Redraw the white part of the mask; the rest is put back from the source at every step.

    With `padding_mask_crop` only the part around the mask is drawn, so many pixels wider, and pasted into the picture.
    """
    job = begin(flux, prompt, common)
    pixels, flags, finish = masked_inputs(job, image, mask, padding_mask_crop)
    source = job.encode(pixels)
    return finish(job.draw(job.noise(), source=source, strength=strength, mask=flags))


def fill(
    flux: Flux,
    prompt: Words,
    *,
    image: ImageLike,
    mask: ImageLike,
    strength: float = 1.0,
    padding_mask_crop: int | None = None,
    **common: Unpack[Common],
) -> Pictures:
    """Fill the white part of the mask with the fill model (384 channels): inside a picture, or around one.

    `padding_mask_crop` is that of `inpaint`.
    """
    job = begin(flux, prompt, common)
    pixels, flags, finish = masked_inputs(job, image, mask, padding_mask_crop)
    source = job.encode(pixels)
    noise = job.noise()
    masked = job.encode(grey_out(pixels, flags))
    condition = FillImage(Encoded(masked), lambda width, height: flags)
    return finish(job.draw(noise, (condition,), source=source, strength=strength))


def control(flux: Flux, prompt: Words, *, control_image: ImageLike, **common: Unpack[Common]) -> Pictures:
    """Draw after a control image with the Canny and Depth models (128 channels)."""
    job = begin(flux, prompt, common)
    condition = control_condition(job, control_image)
    return job.draw(job.noise(), (condition,))


def control_image_to_image(
    flux: Flux,
    prompt: Words,
    *,
    image: ImageLike,
    control_image: ImageLike,
    strength: float = 0.6,
    **common: Unpack[Common],
) -> Pictures:
    """Redraw a picture after a control image."""
    job = begin(flux, prompt, common)
    condition = control_condition(job, control_image)
    source = encoded_source(job, image)
    return job.draw(job.noise(), (condition,), source=source, strength=strength)


def control_inpaint(
    flux: Flux,
    prompt: Words,
    *,
    image: ImageLike,
    mask: ImageLike,
    control_image: ImageLike,
    strength: float = 0.6,
    padding_mask_crop: int | None = None,
    **common: Unpack[Common],
) -> Pictures:
    """Redraw the white part of the mask after a control image, which is that of the whole canvas."""
    job = begin(flux, prompt, common)
    pixels, flags, finish = masked_inputs(job, image, mask, padding_mask_crop)
    job.skip(len(pixels))  # the oracle encodes the masked picture first, and makes no use of it
    condition = control_condition(job, control_image)
    source = job.encode(pixels)
    return finish(job.draw(job.noise(), (condition,), source=source, strength=strength, mask=flags))


def controlnet(
    flux: Flux,
    prompt: Words,
    *,
    controlnet: ControlNet | Sequence[ControlNet],
    control_image: ImageLike | Sequence[ImageLike],
    **options: Unpack[Nets],
) -> Pictures:
    """Draw with one ControlNet or several; one net with several images runs once for each."""
    job, nets = begin_nets(flux, prompt, options)
    conditions = side_nets(job, controlnet, control_image, nets)
    return job.draw(job.noise(), conditions)


def controlnet_image_to_image(
    flux: Flux,
    prompt: Words,
    *,
    controlnet: ControlNet | Sequence[ControlNet],
    control_image: ImageLike | Sequence[ImageLike],
    image: ImageLike,
    strength: float = 0.6,
    **options: Unpack[Nets],
) -> Pictures:
    """Redraw a picture with ControlNets."""
    job, nets = begin_nets(flux, prompt, options)
    conditions = side_nets(job, controlnet, control_image, nets)
    source = encoded_source(job, image)
    return job.draw(job.noise(), conditions, source=source, strength=strength)


def controlnet_inpaint(
    flux: Flux,
    prompt: Words,
    *,
    controlnet: ControlNet | Sequence[ControlNet],
    control_image: ImageLike | Sequence[ImageLike],
    image: ImageLike,
    mask: ImageLike,
    strength: float = 0.6,
    padding_mask_crop: int | None = None,
    **options: Unpack[Nets],
) -> Pictures:
    """Redraw the white part of the mask with ControlNets."""
    job, nets = begin_nets(flux, prompt, options)
    pixels, flags, finish = masked_inputs(job, image, mask, padding_mask_crop)
    conditions = side_nets(job, controlnet, control_image, nets)
    source = job.encode(pixels)
    return finish(job.draw(job.noise(), conditions, source=source, strength=strength, mask=flags))


def kontext(
    flux: Flux,
    prompt: Words,
    *,
    image: ImageLike | None = None,
    reference: ImageLike | Sequence[ImageLike] | None = None,
    reference_size: ReferenceSize = "preferred",
    reference_strength: float | Sequence[float] = 1.0,
    reference_method: ReferenceMethod = "index",
    size: SizeMode = "exact",
    **common: Unpack[Common],
) -> Pictures:
    """Edit a picture by words; `reference` are further pictures to look at.

    `reference_strength` is the attention that they get, one for all or one for each, `image` first. Each has a position
    index of its own, or with the method "offset" a place beside the others.
    `size` says what is drawn: "exact" the width and height asked for, "source" the picture's own, "preferred" the
    nearest of the sizes that Kontext was trained on, "area" diffusers' rule (the asked aspect at a megapixel).
    """
    pictures = [*listed(image), *listed(reference)]
    job = begin(flux, prompt, common, kontext_canvas(flux, pictures[:1], size, common))
    looked_at = references(job, pictures, reference_size, reference_strength, reference_method)
    return job.draw(job.noise(), looked_at)


def kontext_inpaint(
    flux: Flux,
    prompt: Words,
    *,
    image: ImageLike,
    mask: ImageLike,
    reference: ImageLike | Sequence[ImageLike] | None = None,
    reference_size: ReferenceSize = "preferred",
    reference_strength: float | Sequence[float] = 1.0,
    reference_method: ReferenceMethod = "index",
    strength: float = 1.0,
    size: SizeMode = "preferred",
    padding_mask_crop: int | None = None,
    **common: Unpack[Common],
) -> Pictures:
    """Edit the white part of the mask; the model looks at `reference`, or at the picture itself without one."""
    job = begin(flux, prompt, common, kontext_canvas(flux, [image], size, common))
    pixels, flags, finish = masked_inputs(job, image, mask, padding_mask_crop)
    source = job.encode(pixels, sampled=False)
    pictures, sizes = listed(reference) or [pixels], reference_size if listed(reference) else (job.width, job.height)
    looked_at = references(job, pictures, sizes, reference_strength, reference_method)
    return finish(job.draw(job.noise(), looked_at, source=source, strength=strength, mask=flags))


def redux_prior(
    flux: Flux | None,
    prompt: Texts | None = None,
    *,
    adapter: Redux,
    image: ImageLike,
    prompt_2: Texts | None = None,
    scale: float | Sequence[float] = 1.0,
    pooled_scale: float | Sequence[float] = 1.0,
    combine: Combine = "sum",
    downsample: int = 1,
    text_strength: float = 1.0,
    image_strength: float = 1.0,
    region: ImageLike | None = None,
    max_sequence_length: int = 512,
    guidance: float | None = None,
) -> Conditioning:
    """Pictures, and words if any, as a conditioning for another recipe; without words the text is zeros.

    `region`, a mask of any size, says where on the canvas the pictures count.
    """
    weight = adapter.model.redux_down.weight
    if flux is None or flux.text is None or prompt is None:
        pooled = flux.model.params.vec_in_dim if flux else 768
        text = Prompt(weight.new_zeros(1, max_sequence_length, weight.shape[0]), weight.new_zeros(1, pooled))
    else:
        text = flux.text.encode(prompt, prompt_2, max_tokens=max_sequence_length)
    scales, pooled_scales = ([s] if isinstance(s, (int, float)) else list(s) for s in (scale, pooled_scale))
    prompts = redux_prompts(
        text,
        adapter,
        by_size(image),
        scales=scales,
        pooled_scales=pooled_scales,
        combine=combine,
        downsample=downsample,
        text_strength=text_strength,
        image_strength=image_strength,
        region=None if region is None else region_mask(region),
    )
    return Conditioning(prompts, guidance)
