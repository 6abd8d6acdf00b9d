"""Every recipe that starts from a picture, against its diffusers pipeline: same weights, same generators."""

import numpy as np
import pytest
import torch
from PIL import Image

from fluxcanvas.flux_runtime import FluxError, recipes
from fluxcanvas.flux_runtime.conditions import Reference
from fluxcanvas.flux_runtime.image import as_images
from fluxcanvas.flux_runtime.pictures import Encoded

PROMPT, NEGATIVE = "a red house under a yellow moon", "blurry, dark"
EXACT = 1e-5  # relative, float32
SIZE = {"height": 64, "width": 96}
CASES = {"one": {}, "batch of two": {"images": 2}, "true cfg": {"cfg": True}}


def rng(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int, width: int = 80, height: int = 56) -> Image.Image:
    """A smooth random picture of another size than the canvas, so that fitting is tested too."""
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def ours(recipe, flux, *, steps=5, output="latent", **options):
    options = {"guidance": 3.5, "max_sequence_length": 24, "generator": rng(), **options}
    return recipe(flux, PROMPT, steps=steps, output=output, **options)


def several(case: str) -> tuple[dict, dict]:
    """The options of a case, in the oracle's words and in ours."""
    wanted = CASES[case]
    theirs, mine = {}, {}
    if wanted.get("images"):
        theirs["num_images_per_prompt"] = mine["images_per_prompt"] = wanted["images"]
    if wanted.get("cfg"):
        theirs["negative_prompt"] = mine["negative_prompt"] = NEGATIVE
        theirs["true_cfg_scale"] = mine["true_cfg_scale"] = 2.5
    return theirs, mine


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strength", [0.6, 1.0, 0.2])
def test_image_to_image(pair, relative, oracle, case, strength):
    pipe, flux = pair()
    theirs, mine = several(case)
    image = picture(1)
    expected = oracle(pipe, "FluxImg2ImgPipeline", image=image, strength=strength, **SIZE, **theirs)
    got = ours(recipes.image_to_image, flux, image=image, strength=strength, **SIZE, **mine)
    assert relative(got, expected) < EXACT


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("strength", [0.6, 1.0])
def test_inpaint(pair, relative, oracle, mask, case, strength):
    pipe, flux = pair()
    theirs, mine = several(case)
    image = picture(1)
    expected = oracle(pipe, "FluxInpaintPipeline", image=image, mask_image=mask, strength=strength, **SIZE, **theirs)
    got = ours(recipes.inpaint, flux, image=image, mask=mask, strength=strength, **SIZE, **mine)
    assert relative(got, expected) < EXACT


@pytest.mark.parametrize("case", ["one", "batch of two"])
@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_fill(pair, relative, oracle, shape_of, mask, case, strength):
    pipe, flux = pair(shape_of(in_channels=384))
    theirs, mine = several(case)
    image = picture(1)
    expected = oracle(pipe, "FluxFillPipeline", image=image, mask_image=mask, strength=strength, **SIZE, **theirs)
    got = ours(recipes.fill, flux, image=image, mask=mask, strength=strength, **SIZE, **mine)
    assert relative(got, expected) < EXACT


@pytest.mark.parametrize("case", ["one", "batch of two"])
def test_control(pair, relative, oracle, shape_of, case):
    pipe, flux = pair(shape_of(in_channels=128))
    theirs, mine = several(case)
    expected = oracle(pipe, "FluxControlPipeline", control_image=picture(2), **SIZE, **theirs)
    assert relative(ours(recipes.control, flux, control_image=picture(2), **SIZE, **mine), expected) < EXACT


@pytest.mark.parametrize("case", ["one", "batch of two"])
def test_control_image_to_image(pair, relative, oracle, shape_of, case):
    pipe, flux = pair(shape_of(in_channels=128))
    theirs, mine = several(case)
    options = {"image": picture(1), "control_image": picture(2), "strength": 0.6, **SIZE}
    expected = oracle(pipe, "FluxControlImg2ImgPipeline", **options, **theirs)
    assert relative(ours(recipes.control_image_to_image, flux, **options, **mine), expected) < EXACT


@pytest.mark.parametrize("case", ["one", "batch of two"])
def test_control_inpaint(pair, relative, oracle, shape_of, mask, case):
    pipe, flux = pair(shape_of(in_channels=128))
    theirs, mine = several(case)
    options = {"image": picture(1), "control_image": picture(2), "strength": 0.8, **SIZE}
    expected = oracle(pipe, "FluxControlInpaintPipeline", mask_image=mask, **options, **theirs)
    assert relative(ours(recipes.control_inpaint, flux, mask=mask, **options, **mine), expected) < EXACT


@pytest.mark.parametrize(
    ("case", "resize"), [(case, False) for case in CASES] + [("one", True)], ids=[*CASES, "at the preferred size"]
)
def test_kontext(pair, relative, oracle, case, resize):
    pipe, flux = pair()
    theirs, mine = several(case)
    expected = oracle(
        pipe, "FluxKontextPipeline", steps=2, image=picture(1), max_area=64 * 96, _auto_resize=resize, **SIZE, **theirs
    )
    size = "preferred" if resize else "source"
    got = ours(recipes.kontext, flux, steps=2, image=picture(1), reference_size=size, **SIZE, **mine)
    assert relative(got, expected) < EXACT


def test_a_reference_lies_where_kontext_has_it_unless_told_otherwise(pair):
    _, flux = pair()
    raw = flux.vae.encode(as_images(picture(1, 80, 48)))
    alone = ours(recipes.text_to_image, flux, conditions=[Reference(Encoded(raw), 80, 48)], **SIZE)
    assert torch.equal(alone, ours(recipes.kontext, flux, image=picture(1, 80, 48), reference_size="source", **SIZE))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("reference", [None, 5], ids=["text only", "with a reference"])
def test_kontext_inpaint(pair, relative, oracle, mask, case, reference):
    pipe, flux = pair()
    theirs, mine = several(case)
    other = picture(reference, 64, 96) if reference else None
    options = {"image": picture(1), "strength": 0.8}
    expected = oracle(
        pipe,
        "FluxKontextInpaintPipeline",
        mask_image=mask,
        image_reference=other,
        _auto_resize=False,
        **options,
        **theirs,
    )
    got = ours(
        recipes.kontext_inpaint,
        flux,
        mask=mask,
        reference=other,
        reference_size="source",
        size="source",
        **options,
        **mine,
    )
    assert relative(got, expected) < EXACT


@pytest.mark.parametrize("padding", [0, 12])
def test_inpaint_of_the_part_around_the_mask(pair, oracle, mask, padding):
    pipe, flux = pair()
    image, size = picture(1, 120, 90), {"height": 48, "width": 64}
    small = mask.resize((120, 90), Image.Resampling.NEAREST)
    options = {"image": image, "strength": 0.8, "padding_mask_crop": padding, **size}
    expected = oracle(pipe, "FluxInpaintPipeline", mask_image=small, output_type="pil", **options)[0]
    got = ours(recipes.inpaint, flux, mask=small, output="pil", **options)[0]
    assert got.size == expected.size == (120, 90)
    assert np.abs(np.asarray(got, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


def test_a_list_of_generators(pair, relative, oracle):
    pipe, flux = pair()
    options = {"image": picture(1), "strength": 0.6, **SIZE}
    expected = oracle(pipe, "FluxImg2ImgPipeline", num_images_per_prompt=2, generator=[rng(1), rng(2)], **options)
    got = ours(recipes.image_to_image, flux, images_per_prompt=2, generator=[rng(1), rng(2)], **options)
    assert relative(got, expected) < EXACT


AREA, OWN = {"max_area": 64 * 96, "_auto_resize": False}, {"reference_size": "source"}
HALF = {  # recipe: its pipeline, the model's channels, the options of the oracle alone and of ours alone
    "image_to_image": ("FluxImg2ImgPipeline", 64, {}, {}),
    "inpaint": ("FluxInpaintPipeline", 64, {}, {}),
    "fill": ("FluxFillPipeline", 384, {}, {}),
    "control": ("FluxControlPipeline", 128, {}, {}),
    "control_image_to_image": ("FluxControlImg2ImgPipeline", 128, {}, {}),
    "control_inpaint": ("FluxControlInpaintPipeline", 128, {}, {}),
    "kontext": ("FluxKontextPipeline", 64, AREA, OWN),
    "kontext_inpaint": ("FluxKontextInpaintPipeline", 64, {"_auto_resize": False}, {**OWN, "size": "source"}),
}


def inputs_of(name: str, mask: Image.Image) -> tuple[dict, dict, dict]:
    """The options of a recipe in `HALF`: those of both sides, the oracle's, ours."""
    _, _, theirs, mine = HALF[name]
    both = {} if name == "kontext_inpaint" else dict(SIZE)
    both |= {"control_image": picture(2)} if "control" in name else {}
    both |= {"image": picture(1)} if name != "control" else {}
    masked = name == "fill" or name.endswith("inpaint")
    return (both, {**theirs, "mask_image": mask}, {**mine, "mask": mask}) if masked else (both, theirs, mine)


@pytest.mark.parametrize("name", HALF)
def test_every_recipe_stops_after_the_step_in_which_it_is_told_to(pair, shape_of, mask, name):
    class Stop(Exception):
        pass

    def watch(step, latents, clean):
        assert latents.shape == clean.shape and latents.shape[1] == 16
        seen.append(step.index)
        if step.index == 1:
            raise Stop

    seen: list[int] = []
    _, flux = pair(shape_of(in_channels=HALF[name][1]))
    both, _, mine = inputs_of(name, mask)
    with pytest.raises(Stop):
        ours(getattr(recipes, name), flux, watch=watch, **both, **mine)
    assert seen == [0, 1]


@pytest.mark.parametrize("name", HALF)
def test_bfloat16_is_no_further_from_float32_than_the_oracle(pair, relative, oracle, shape_of, mask, name):
    pipeline, channels, _, _ = HALF[name]
    shape, (call, theirs, mine) = shape_of(in_channels=channels), inputs_of(name, mask)
    exact = oracle(pair(shape)[0], pipeline, **call, **theirs).float()
    pipe, flux = pair(shape, torch.bfloat16)
    allowed = relative(oracle(pipe, pipeline, **call, **theirs).float(), exact)
    assert relative(ours(getattr(recipes, name), flux, **call, **mine).float(), exact) <= 1.05 * allowed


def test_the_mask_decides_what_stays(pair, mask):
    _, flux = pair()
    everything = ours(recipes.inpaint, flux, image=picture(1), mask=Image.new("L", (8, 8), 255), strength=1.0, **SIZE)
    part = ours(recipes.inpaint, flux, image=picture(1), mask=mask, strength=1.0, **SIZE)
    assert not torch.equal(everything, part)


def test_an_empty_mask_is_refused(pair):
    _, flux = pair()
    with pytest.raises(FluxError, match="no white pixel"):
        ours(recipes.inpaint, flux, image=picture(1), mask=Image.new("L", (8, 8)), **SIZE)


def test_a_strength_without_a_step_is_refused(pair):
    _, flux = pair()
    with pytest.raises(FluxError, match="no step of 5"):
        ours(recipes.image_to_image, flux, image=picture(1), strength=0.0, **SIZE)


def test_a_model_without_its_control_image_says_what_is_missing(pair, shape_of):
    _, flux = pair(shape_of(in_channels=128))
    with pytest.raises(FluxError, match="control image"):
        ours(recipes.text_to_image, flux, **SIZE)


def test_a_control_image_for_a_plain_model_is_refused(pair):
    _, flux = pair()
    with pytest.raises(FluxError, match="a prompt alone"):
        ours(recipes.control, flux, control_image=picture(2), **SIZE)


def test_an_unknown_option_is_named(pair):
    _, flux = pair()
    with pytest.raises(TypeError, match="guidance_scale"):
        ours(recipes.text_to_image, flux, guidance_scale=3)
