"""padding_mask_crop and the Kontext sizes against diffusers: the same bytes, the same numbers."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFilter

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.mask_crop import crop_region, crop_to_mask, paste_back, resize_cover, resize_fill
from fluxcanvas.flux_runtime.sizes import PREFERRED, area_size, preferred_size


@pytest.fixture(scope="module")
def oracle():
    from diffusers.image_processor import VaeImageProcessor

    return VaeImageProcessor(vae_scale_factor=16)


def noise(width: int, height: int, seed: int, mode: str = "RGB") -> Image.Image:
    bands = {"RGB": 3, "RGBA": 4, "L": 1}[mode]
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, bands), dtype=np.uint8)
    return Image.fromarray(levels.squeeze(-1) if bands == 1 else levels)


def case(seed: int) -> tuple[Image.Image, Image.Image, int, int, int]:
    """A picture, a mask of a random kind (hard, soft, at the border, one pixel, everything), a size and a padding."""
    rng = random.Random(seed)
    width, height = rng.randint(20, 140), rng.randint(20, 140)
    mask = Image.new("L", (width, height))
    draw, kind = ImageDraw.Draw(mask), seed % 5
    left, top = rng.randint(0, width - 2), rng.randint(0, height - 2)
    right, bottom = rng.randint(left, width - 1), rng.randint(top, height - 1)
    if kind == 0:
        draw.point((left, top), 255)
    elif kind == 1:
        draw.rectangle((0, 0, width, height), 255)
    else:
        draw.ellipse((left, top, right, bottom), rng.randint(100, 255))
        draw.point((left, top), 200)
    if kind == 2:
        mask = mask.filter(ImageFilter.GaussianBlur(3))
    size = rng.randint(1, 10) * 16, rng.randint(1, 10) * 16
    return noise(width, height, seed), mask, *size, rng.choice((0, 1, 7, 32, 200))


@pytest.mark.parametrize("seed", range(60))
def test_crop_and_paste_are_diffusers_own(oracle, seed):
    image, mask, width, height, padding = case(seed)
    if mask.getbbox() is None:
        with pytest.raises(FluxError, match="nothing to crop"):
            crop_region(mask, width, height, padding)
        return
    box = oracle.get_crop_region(mask, width, height, pad=padding)
    crop = crop_to_mask(image, mask, width, height, padding)
    assert tuple(crop.box) == box
    for ours, source in ((crop.image, image), (crop.mask, mask)):
        theirs = oracle.resize(source.crop(box), height, width, resize_mode="fill")
        assert ours.convert("RGB").tobytes() == theirs.tobytes()
    drawn = noise(width, height, seed + 1000)
    assert paste_back(crop, drawn).tobytes() == oracle.apply_overlay(mask, image, drawn, box).tobytes()


def test_the_mask_is_what_the_mask_processor_makes(oracle):
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor(
        vae_scale_factor=16, do_normalize=False, do_binarize=True, do_convert_grayscale=True
    )  # fmt: skip
    for seed in range(2, 40, 5):
        image, mask, width, height, padding = case(seed)
        if mask.getbbox() is None:
            continue
        crop = crop_to_mask(image, mask, width, height, padding)
        theirs = processor.preprocess(mask, height, width, resize_mode="fill", crops_coords=tuple(crop.box))
        ours = (np.asarray(crop.mask, dtype=np.float32) / 255 >= 0.5).astype(np.float32)
        assert torch.equal(theirs[0, 0], torch.from_numpy(ours))


@pytest.mark.parametrize("mode", ["RGBA", "L"])
def test_other_modes_paste_alike(oracle, mode):
    image, mask, width, height, padding = case(3)
    image = noise(*image.size, 5, mode)
    crop, drawn = crop_to_mask(image, mask, width, height, padding), noise(width, height, 9)
    theirs = oracle.apply_overlay(mask, image, drawn, tuple(crop.box))
    assert paste_back(crop, drawn).tobytes() == theirs.tobytes()


@pytest.mark.parametrize(("size", "target"), [((37, 91), (64, 48)), ((91, 37), (48, 64)), ((50, 50), (32, 32))])
def test_fill_and_cover(oracle, size, target):
    picture = noise(*size, 1)
    width, height = target
    assert resize_fill(picture, *target).tobytes() == oracle.resize(picture, height, width, "fill").tobytes()
    assert resize_cover(picture, *target).tobytes() == oracle.resize(picture, height, width, "crop").tobytes()


def test_an_odd_height_has_no_black_row():
    # diffusers leaves the last row black where an odd height takes an even picture.
    filled = np.asarray(resize_fill(Image.new("RGB", (60, 20), "white"), 60, 33))
    assert filled.min() == 255
    assert np.asarray(resize_fill(Image.new("RGB", (20, 60), "white"), 33, 60)).min() == 255


def test_a_mask_of_another_size_is_stretched_and_told(caplog):
    image, mask = noise(64, 48, 1), Image.new("L", (32, 24), 255)
    crop = crop_to_mask(image, mask, 32, 32, 0)
    assert tuple(crop.box) == (0, 0, 64, 48) and "stretched" in caplog.text


def test_the_trained_sizes_are_diffusers_own():
    from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS as theirs

    assert list(PREFERRED) == theirs
    rng = random.Random(0)
    shapes = [(rng.randint(1, 4000), rng.randint(1, 4000)) for _ in range(500)]
    middles = [(a[0] * b[1] + b[0] * a[1], 2 * a[1] * b[1]) for a, b in itertools.pairwise(theirs)]
    for width, height in shapes + middles:
        _, *chosen = min((abs(width / height - w / h), w, h) for w, h in theirs)
        assert preferred_size(width, height) == tuple(chosen)


def test_the_area_is_diffusers_own():
    rng = random.Random(1)
    for _ in range(500):
        width, height, area = rng.randint(16, 4000), rng.randint(16, 4000), rng.choice((1024**2, 512**2, 777777))
        ratio = width / height
        theirs = round((area * ratio) ** 0.5) // 16 * 16, round((area / ratio) ** 0.5) // 16 * 16
        assert area_size(width, height, area) == theirs
    assert area_size(832, 1216) == (832, 1232) and area_size(672, 1568) == (656, 1552)
    assert area_size(1920, 1080) == (1360, 768) and area_size(1248, 832) == (1248, 832)
