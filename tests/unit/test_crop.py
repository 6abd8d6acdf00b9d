"""Crop and stitch: what is cut out, that it goes back where it was, and that the rest keeps every bit."""

from __future__ import annotations

import random

import pytest
import torch

from fluxcanvas.flux_runtime.crop import crop_for_inpaint, pad_for_outpaint, stitch_back
from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.masks import grow_mask


def pictures(batch: int = 1, height: int = 90, width: int = 130, channels: int = 3) -> torch.Tensor:
    """Noise in 0..0.9, so that white is new."""
    return torch.rand(batch, height, width, channels, generator=torch.Generator().manual_seed(height + width)) * 0.9


def marked(top: int, bottom: int, left: int, right: int, height: int = 90, width: int = 130) -> torch.Tensor:
    mask = torch.zeros(1, height, width)
    mask[:, top:bottom, left:right] = 1
    return mask


def assert_untouched_outside(source: torch.Tensor, stitched: torch.Tensor, mask: torch.Tensor, blend: int) -> None:
    outside = (grow_mask((mask > 0).float(), blend) == 0).expand(len(stitched), -1, -1)
    expected = source.expand_as(stitched) if len(source) == 1 else source
    assert torch.equal(stitched[outside], expected[outside])


PLACES = {
    "middle": (30, 50, 40, 80), "corner": (0, 9, 0, 12), "far corner": (80, 90, 121, 130), "left edge": (40, 60, 0, 20),
    "all": (0, 90, 0, 130), "one pixel": (44, 45, 60, 61), "a row": (10, 11, 0, 130),
}  # fmt: skip
SIZES = {"own": (0, 0), "larger": (160, 160), "smaller": (32, 16), "wide": (256, 64), "one side": (0, 96)}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("size", SIZES)
def test_the_source_keeps_every_bit_outside(place, size):
    image, mask = pictures(), marked(*PLACES[place])
    crop, crop_mask, stitch = crop_for_inpaint(image, mask, width=SIZES[size][0], height=SIZES[size][1], blend=6)
    asked = SIZES[size]
    assert crop.shape[1:3] == crop_mask.shape[1:] and all(side % 16 == 0 for side in crop.shape[1:3])
    assert not asked[0] or crop.shape[2] == asked[0]
    assert not asked[1] or crop.shape[1] == asked[1]
    assert crop_mask.max() == 1
    stitched = stitch_back(stitch, torch.ones_like(crop))
    assert_untouched_outside(image, stitched, mask, 6)
    inside = mask > 0
    assert (stitched[inside] > 0.99).all()  # and the masked part is new


def test_pixels_at_their_own_scale_go_both_ways_unchanged():
    image, mask = pictures(), marked(30, 50, 40, 80)
    crop, crop_mask, stitch = crop_for_inpaint(image, mask, padding=8, blend=4)
    box = stitch.box
    assert crop.shape[1:3] == (48, 64)  # 36 and 56 wanted
    assert torch.equal(crop, image[:, box.top : box.bottom, box.left : box.right])
    assert torch.equal(crop_mask, mask[:, box.top : box.bottom, box.left : box.right])
    assert torch.equal(stitch_back(stitch, crop), image)
    new = stitch_back(stitch, torch.zeros_like(crop))
    assert (new[mask > 0] == 0).all()


def test_the_blend_fades():
    image, mask = torch.zeros(1, 90, 130, 3), marked(30, 50, 40, 80)
    *_, stitch = crop_for_inpaint(image, mask, blend=10)
    row = stitch_back(stitch, torch.ones(1, stitch.box.height, stitch.box.width, 3))[0, 40, :, 0]
    assert row[79] == 1 and row[90] == 0
    assert (row[79:90] >= row[80:91]).all() and ((row[80:89] > 0) & (row[80:89] < 1)).all()
    *_, hard = crop_for_inpaint(image, mask, blend=0)
    assert stitch_back(hard, torch.ones(1, hard.box.height, hard.box.width, 3)).unique().tolist() == [0, 1]


def test_a_blend_wider_than_the_padding_is_not_cut_off():
    image, mask = torch.zeros(1, 90, 130, 3), marked(40, 44, 60, 64)
    *_, stitch = crop_for_inpaint(image, mask, padding=0, blend=20)
    weight = stitch.weight[0]
    assert max(weight[0].max(), weight[-1].max(), weight[:, 0].max(), weight[:, -1].max()) < 0.1


def test_a_scaled_crop_is_the_same_part_of_the_picture():
    rows, columns = torch.meshgrid(torch.linspace(0, 1, 90), torch.linspace(0, 1, 130), indexing="ij")
    image, mask = torch.stack([rows, columns, rows * 0], -1)[None], marked(20, 45, 50, 90)
    for size in ((96, 96), (208, 160), (32, 48)):
        crop, _, stitch = crop_for_inpaint(image, mask, width=size[0], height=size[1], padding=10)
        assert (stitch_back(stitch, crop) - image).abs().max() < 0.02
        box = stitch.box
        assert abs(box.width / box.height - size[0] / size[1]) < 0.03


def test_a_box_larger_than_the_picture_overhangs_it():
    image, mask = pictures(height=40, width=120), marked(0, 40, 0, 120, 40, 120)
    crop, crop_mask, stitch = crop_for_inpaint(image, mask, width=64, height=64)
    assert (stitch.box.width, stitch.box.height) == (120, 120) and stitch.box.top == -40
    assert crop.shape == (1, 64, 64, 3) and crop_mask[0, 5].max() == 0 and crop_mask[0, 32].min() == 1
    whole = stitch_back(stitch, torch.zeros(1, 120, 120, 3))
    assert whole.shape == image.shape and whole.max() == 0


def test_padding_and_expansion():
    image, mask = pictures(), marked(40, 50, 60, 70)
    boxes = [
        crop_for_inpaint(image, mask, padding=p, expand=e, blend=0, multiple=1)[2].box
        for p, e in ((0, 1), (5, 1), (0, 3), (500, 1))
    ]
    assert [tuple(box) for box in boxes] == [(60, 40, 70, 50), (55, 35, 75, 55), (50, 30, 80, 60), (0, 0, 130, 90)]


def test_batches():
    mask = torch.cat([marked(10, 20, 10, 20), marked(60, 70, 100, 110)])
    image = pictures(2)
    crop, crop_mask, stitch = crop_for_inpaint(image, mask, blend=4)
    assert len(crop) == len(crop_mask) == 2 and stitch.box.left <= 10 and stitch.box.right >= 110
    stitched = stitch_back(stitch, torch.ones_like(crop))
    assert_untouched_outside(image, stitched, mask, 4)
    # one picture with two masks, and several drawn from each picture
    crop, _, stitch = crop_for_inpaint(image[:1], mask)
    assert len(crop) == 2 and stitch.source.shape[0] == 2
    crop, _, stitch = crop_for_inpaint(image, marked(10, 20, 10, 20))
    four = stitch_back(stitch, crop.repeat(2, 1, 1, 1))
    assert torch.equal(four, image.repeat(2, 1, 1, 1))


def test_random_masks_and_sizes():
    rng = random.Random(0)
    for _ in range(25):
        height, width = rng.randint(17, 120), rng.randint(17, 120)
        top, left = rng.randint(0, height - 1), rng.randint(0, width - 1)
        mask = marked(top, rng.randint(top + 1, height), left, rng.randint(left + 1, width), height, width)
        image, blend = pictures(height=height, width=width), rng.randint(0, 24)
        size = rng.choice([(0, 0), (rng.randint(1, 8) * 16, rng.randint(1, 8) * 16)])
        wider = dict(padding=rng.randint(0, 40), expand=rng.uniform(1, 2))
        crop, _, stitch = crop_for_inpaint(image, mask, width=size[0], height=size[1], blend=blend, **wider)
        stitched = stitch_back(stitch, torch.ones_like(crop))
        assert_untouched_outside(image, stitched, mask, blend)
        assert (stitched[mask > 0] > 0.99).all()


def test_the_source_and_its_alpha_survive():
    image = pictures(channels=4)
    before = image.clone()
    crop, _, stitch = crop_for_inpaint(image, marked(30, 50, 40, 80))
    stitched = stitch_back(stitch, torch.full_like(crop, float("nan")))
    assert torch.equal(image, before) and crop.shape[-1] == 3
    assert torch.equal(stitched[..., 3], image[..., 3])
    assert torch.equal(stitched[:, :10], image[:, :10])  # not a number, but only where it was stitched


def test_a_mask_of_another_size_is_fitted(caplog):
    crop, _, stitch = crop_for_inpaint(pictures(), marked(10, 20, 20, 30, 45, 65), padding=0, blend=0)
    assert tuple(stitch.box)[:2] <= (40, 20) and "stretched" in caplog.text and crop.shape[1] == 32


def test_crops_that_cannot_be():
    image, mask = pictures(), marked(30, 50, 40, 80)
    with pytest.raises(FluxError, match="black everywhere"):
        crop_for_inpaint(image, mask * 0)
    for wrong in (dict(width=100), dict(padding=-1), dict(expand=0.5), dict(blend=-1)):
        with pytest.raises(FluxError, match="multiples of 16"):
            crop_for_inpaint(image, mask, **wrong)
    with pytest.raises(FluxError, match="3 masks cannot be used with 2 pictures"):
        crop_for_inpaint(pictures(2), mask.expand(3, -1, -1))
    with pytest.raises(FluxError, match="shape"):
        crop_for_inpaint(image[0], mask)
    *_, stitch = crop_for_inpaint(pictures(2), mask)
    with pytest.raises(FluxError, match="stitched into 2 pictures"):
        stitch_back(stitch, torch.zeros(3, 32, 32, 3))
    with pytest.raises(FluxError, match="larger than"):
        crop_for_inpaint(image, marked(40, 41, 0, 130), height=16384, padding=0, blend=0)


@pytest.mark.parametrize("fill", ["edge", "grey"])
def test_outpainting(fill):
    image = pictures(2)
    padded, mask = pad_for_outpaint(image, 16, 8, 0, 4, feather=10, fill=fill)
    assert padded.shape == (2, 102, 146, 3) and mask.shape == (2, 102, 146)
    assert torch.equal(padded[:, 8:98, 16:], image)
    added = torch.ones(102, 146, dtype=torch.bool)
    added[8:98, 16:] = False
    assert (mask[:, added] == 1).all() and mask[0, 50, 60] == 0
    expected = image[:, :, :1].expand(-1, -1, 16, -1) if fill == "edge" else torch.full((2, 90, 16, 3), 0.5)
    assert torch.equal(padded[:, 8:98, :16], expected)
    falling = mask[0, 50, 16:27]
    assert (falling[:-1] > falling[1:]).all() and falling[0] > 0.9 and falling[10] == 0
    assert mask[0, 50, -1] == 0  # the right side did not grow


def test_outpainting_without_a_feather_and_refusals():
    image = pictures()
    _, mask = pad_for_outpaint(image, right=16, feather=0)
    assert mask.unique().tolist() == [0, 1] and mask[0, :, :130].max() == 0
    for wrong in (dict(), dict(left=-1, right=5), dict(left=5, feather=-1)):
        with pytest.raises(FluxError, match="at least one side"):
            pad_for_outpaint(image, **wrong)
    with pytest.raises(FluxError, match="edge, grey"):
        pad_for_outpaint(image, left=1, fill="mirror")
    with pytest.raises(FluxError, match="larger than"):
        pad_for_outpaint(image, left=17000)
