"""Masks: read from pictures of any mode, grown, blurred, fitted, combined, and refused when they mark nothing."""

from __future__ import annotations

import io
import logging

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.masks import (
    as_mask,
    binary_mask,
    blur_mask,
    check_mask,
    combine_masks,
    feather_mask,
    fit_mask,
    grow_mask,
    invert_mask,
    mask_from_image,
    mask_like,
    threshold_mask,
)

LEVELS = np.array([[0, 64, 128], [192, 254, 255]], dtype=np.uint8)
GREY = Image.fromarray(LEVELS)
EXPECTED = torch.from_numpy(LEVELS.astype(np.float32) / 255)


def dot(height: int = 21, width: int = 31, row: int = 10, column: int = 15) -> torch.Tensor:
    mask = torch.zeros(1, height, width)
    mask[0, row, column] = 1
    return mask


def deep() -> Image.Image:
    """A 16-bit grey picture as a PNG file gives it back."""
    file = io.BytesIO()
    Image.fromarray(LEVELS.astype(np.uint16) * 257).save(file, "PNG")
    return Image.open(io.BytesIO(file.getvalue()))


def rotated() -> Image.Image:
    """Stored turned by 90 degrees, with the EXIF entry that says so."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    GREY.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    return Image.open(io.BytesIO(file.getvalue()))


@pytest.mark.parametrize(
    "picture",
    [
        GREY, GREY.convert("RGB"), GREY.convert("RGBA"), GREY.convert("LA"), GREY.convert("P"), GREY.convert("I"),
        deep(), rotated(), Image.fromarray(LEVELS.astype(np.float32) / 255),
    ],
    ids=["L", "RGB", "RGBA", "LA", "P", "I", "16 bit", "EXIF", "F"],
)  # fmt: skip
def test_the_same_levels_from_any_mode(picture):
    if picture.mode == "I" and picture.getextrema()[1] == 255:  # converted, not read: its levels are those of 8 bits
        picture = Image.fromarray(np.asarray(picture) * 257)
    mask = mask_from_image(picture)
    assert mask.shape == (1, 2, 3) and mask.dtype == torch.float32
    assert torch.allclose(mask[0], EXPECTED, atol=1e-6)


def test_one_bit_and_colours():
    assert mask_from_image(Image.new("1", (4, 4), 1)).min() == 1
    red = Image.new("RGB", (4, 4), (255, 0, 51))
    assert mask_from_image(red, "red").min() == 1 and mask_from_image(red, "green").max() == 0
    assert torch.allclose(mask_from_image(red, "blue"), torch.tensor(0.2))


def test_transparency():
    picture = Image.merge("LA", (Image.new("L", (3, 2), 255), GREY))  # white, more or less visible
    assert torch.allclose(mask_from_image(picture)[0], EXPECTED)  # what is not seen is not marked
    assert torch.allclose(mask_from_image(picture, "alpha")[0], 1 - EXPECTED)
    assert mask_from_image(GREY, "alpha").max() == 0 and mask_from_image(deep(), "alpha").max() == 0


def test_batches_and_refusals():
    assert mask_from_image([GREY, GREY]).shape == (2, 2, 3)
    with pytest.raises(FluxError, match="one size"):
        mask_from_image([GREY, GREY.resize((5, 5))])
    with pytest.raises(FluxError, match="luminance, alpha"):
        mask_from_image(GREY, "hue")


def test_shapes_of_hosts():
    mask = torch.rand(2, 4, 5)
    for given in (mask, mask[:, None]):
        assert torch.equal(as_mask(given), mask)
    assert as_mask(mask[0]).shape == (1, 4, 5) and as_mask(mask * 3).max() <= 1
    for wrong in (torch.rand(2, 3, 4, 5), torch.rand(3), torch.rand(0, 4, 4)):
        with pytest.raises(FluxError, match="shape"):
            as_mask(wrong)
    with pytest.raises(FluxError, match="NaN"):
        as_mask(torch.full((1, 2, 2), float("nan")))


def test_a_mask_that_marks_nothing_is_refused():
    with pytest.raises(FluxError, match=r"black everywhere.*invert"):
        check_mask(torch.zeros(1, 4, 4))
    with pytest.raises(FluxError, match=r"nowhere brighter than 0\.5"):
        check_mask(torch.full((1, 4, 4), 0.3))
    with pytest.raises(FluxError, match="number 2 of 3"):
        check_mask(torch.stack([torch.ones(4, 4), torch.zeros(4, 4), torch.ones(4, 4)]))
    with pytest.raises(FluxError, match="black"):
        check_mask(torch.zeros(1, 4, 4), level=0)
    assert check_mask(torch.full((4, 4), 0.3), level=0).shape == (1, 4, 4)


def test_growing_and_shrinking():
    grown = grow_mask(dot(), 3)
    assert grown.sum() == 49 and grown[0, 7:14, 12:19].min() == 1
    assert torch.equal(grow_mask(grown, -3), dot()) and grow_mask(grown, -4).max() == 0
    assert torch.equal(grow_mask(grown, 0), grown)
    assert grow_mask(dot(), 500).min() == 1  # larger than the picture
    soft = grow_mask(dot() * 0.4, 1)
    assert soft.max() == torch.tensor(0.4) and soft.count_nonzero() == 9


def test_shrinking_leaves_the_border():
    mask = torch.zeros(1, 10, 10)
    mask[:, :, :5] = 1
    assert grow_mask(mask, -2)[0, :, 0].min() == 1 and grow_mask(mask, -2).sum() == 30
    assert grow_mask(torch.ones(1, 6, 6), -20).min() == 1


@pytest.mark.parametrize("radius", [0.5, 2, 4.5])
def test_the_blur_is_gaussian(radius):
    mask = torch.zeros(1, 64, 64)
    mask[:, 20:44, 24:50] = 1
    picture = Image.fromarray((mask[0] * 255).byte().numpy()).filter(ImageFilter.GaussianBlur(radius))
    blurred = blur_mask(mask, radius)
    assert (blurred[0] - torch.from_numpy(np.asarray(picture) / 255)).abs().max() < 0.03  # PIL's is made of boxes
    assert blurred.sum() == pytest.approx(mask.sum().item(), rel=1e-4)
    assert torch.allclose(blur_mask(torch.ones(1, 8, 8), radius), torch.ones(1, 8, 8))  # the edge goes on


def test_blur_by_nothing_and_less():
    assert torch.equal(blur_mask(dot(), 0), dot())
    with pytest.raises(FluxError, match="0 or more"):
        blur_mask(dot(), -1)


def test_the_feather_is_whole_inside_and_nothing_beyond():
    mask = torch.zeros(1, 40, 40)
    mask[:, 15:25, 15:25] = 0.2
    feathered = feather_mask(mask, 8)
    assert (feathered[mask > 0] == 1).all()
    reach = grow_mask((mask > 0).float(), 8)
    assert (feathered[reach == 0] == 0).all() and 0 < feathered[0, 20, 30] < 1
    falling = feathered[0, 20, 24:34]
    assert (falling[:-1] >= falling[1:]).all()
    assert torch.equal(feather_mask(mask, 0), (mask > 0).float())


def test_inverting_and_thresholds():
    mask = torch.tensor([[[0.0, 0.49, 0.5, 1.0]]])
    assert torch.equal(threshold_mask(mask), torch.tensor([[[0.0, 0.0, 1.0, 1.0]]]))
    assert torch.equal(threshold_mask(mask, 0.4), torch.tensor([[[0.0, 1.0, 1.0, 1.0]]]))
    assert torch.equal(invert_mask(mask), 1 - mask)


def test_fitting():
    mask = torch.tensor([[[1.0, 0.0], [0.0, 0.0]]])
    assert fit_mask(mask, 4, 2).tolist() == [[[1, 1, 0, 0], [0, 0, 0, 0]]]
    assert fit_mask(mask, 1, 1, "area").item() == 0.25 and fit_mask(mask, 1, 1).item() == 1
    with pytest.raises(FluxError, match="nearest or area"):
        fit_mask(mask, 4, 4, "cubic")


def test_a_mask_of_another_size_is_told(caplog):
    with caplog.at_level(logging.WARNING, "fluxcanvas"):
        assert mask_like(dot(), 62, 42).shape == (1, 42, 62)
        assert "31x21" in caplog.text and "62x42" in caplog.text
        caplog.clear()
        assert torch.equal(mask_like(dot(), 31, 21), dot()) and not caplog.text


@pytest.mark.parametrize(
    ("mode", "expected"), [("union", [0, 1, 1, 1]), ("intersect", [0, 0, 0, 1]), ("subtract", [0, 1, 0, 0]),
                           ("difference", [0, 1, 1, 0])],
)  # fmt: skip
def test_combining(mode, expected):
    first, second = torch.tensor([[[0.0, 1, 0, 1]]]), torch.tensor([[[0.0, 0, 1, 1]]])
    assert combine_masks(first, second, mode).flatten().tolist() == expected


def test_combining_batches_and_sizes():
    one, three = torch.zeros(1, 8, 8), torch.ones(3, 4, 4)
    assert combine_masks(one, three).shape == (3, 8, 8)
    with pytest.raises(FluxError, match="2 masks"):
        combine_masks(torch.ones(2, 4, 4), three)
    with pytest.raises(FluxError, match="union"):
        combine_masks(one, three, "xor")


@pytest.mark.parametrize(
    "mask", [deep(), LEVELS, torch.from_numpy(LEVELS)[None, None]], ids=["16 bit", "array", "tensor"]
)
def test_a_binary_mask_is_cut_at_half_of_any_depth(mask):
    assert torch.equal(binary_mask(mask, 3, 2), (EXPECTED >= 0.5).float()[None])


def test_a_binary_mask_is_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 3  # upside down
    file = io.BytesIO()
    GREY.save(file, "PNG", exif=exif)
    turned = binary_mask(Image.open(file), 3, 2)
    assert torch.equal(turned, (EXPECTED.flip(0, 1) >= 0.5).float()[None])
