"""Masks, drawing inside them, and the ways to cut out, put back and enlarge."""

from __future__ import annotations

import math

import pytest
import torch

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.inpaint import Differential, renoise
from fluxcanvas.flux_runtime.sampling import Step

SIZE = 64


@pytest.fixture
def source(run, demo, picture):
    return run("EncodeImage", vae=demo.vae, image=picture(SIZE, SIZE))[0]


class TestInpaint:
    def test_hard_redraws_the_white_half_alone(self, run, draw, source, half):
        (masked,) = run("InpaintMask", latent=source, mask=half(SIZE, SIZE) * 0.6)
        out = draw(latent=masked)["samples"]
        assert set(masked["noise_mask"].unique().tolist()) == {0.0, 1.0} and "noise_mask" not in source
        assert torch.allclose(out[..., :4], source["samples"][..., :4], atol=1e-4)
        assert not torch.allclose(out[..., 4:], source["samples"][..., 4:], atol=0.1)

    def test_soft_changes_the_less_the_darker_the_mask_is(self, run, draw, source):
        mask = torch.ones(1, SIZE, SIZE)
        for column, level in enumerate((0.0, 0.35, 0.7, 1.0)):
            mask[:, :, 16 * column : 16 * (column + 1)] = level
        (masked,) = run("InpaintMask", latent=source, mask=mask, mode="soft")
        change = (
            (draw(latent=masked, steps=8)["samples"] - source["samples"]).abs().mean((0, 1, 2)).unflatten(0, (4, 2))
        )
        kept, faint, clear, free = change.mean(1).tolist()
        assert kept < 1e-4 < faint < clear < free
        blended = {name: value for name, value in masked.items() if name != "noise_mask_mode"}
        other = draw(latent=blended, steps=8)["samples"]
        assert not torch.allclose(draw(latent=masked, steps=8)["samples"], other, atol=0.01), "greys only blended"

    def test_a_white_soft_mask_is_no_mask(self, run, draw, source):
        (masked,) = run("InpaintMask", latent=source, mask=torch.ones(1, SIZE, SIZE), mode="soft")
        assert torch.equal(draw(latent=masked)["samples"], draw(latent=source)["samples"])

    def test_the_plan_frees_a_pixel_when_the_run_has_come_so_far(self):
        generator = torch.Generator().manual_seed(0)
        kept, noise, x = torch.randn(3, 1, 5, 2, generator=generator)
        mask = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])[None, :, None]
        constrain = Differential(kept, noise, mask)
        for index, freed in enumerate(([3, 4], [2, 3, 4], [1, 2, 3, 4], [1, 2, 3, 4])):
            step = Step(index, 4, 1 - index / 4, 0.75 - index / 4)
            out = constrain(x, step)
            held = renoise(kept, noise, step.sigma_next)
            expected = torch.where(torch.isin(torch.arange(5), torch.tensor(freed))[None, :, None], x, held)
            assert torch.equal(out, expected)

    def test_a_mask_of_another_shape_is_fitted_as_the_picture_was(self, run, demo, picture, half):
        for fit, white in (("crop", 0.5), ("stretch", 0.5), ("pad", 0.5)):
            (latent,) = run("EncodeImage", vae=demo.vae, image=picture(40, 90), width=64, height=64, fit=fit)
            (masked,) = run("InpaintMask", latent=latent, mask=half(40, 90), fit=fit)
            assert masked["noise_mask"].shape == (1, 1, 64, 64)
            assert masked["noise_mask"].mean().item() == pytest.approx(white, abs=0.02)
        corner = torch.zeros(1, 40, 90)
        corner[:, :, 80:] = 1
        with pytest.raises(FluxError, match="the mask, brought to the size of the latent, is black everywhere"):
            run("InpaintMask", latent=latent, mask=corner, fit="crop")
        assert run("InpaintMask", latent=latent, mask=corner, fit="stretch")[0]["noise_mask"].any()

    def test_masks_are_shared_out_among_the_pictures_or_refused(self, run, draw, half):
        latent = {"samples": torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(1))}
        masks = torch.cat([half(SIZE, SIZE), 1 - half(SIZE, SIZE)])
        (masked,) = run("InpaintMask", latent=latent, mask=masks)
        out = draw(latent=masked)["samples"]
        assert torch.allclose(out[2, :, :, :4], latent["samples"][2, :, :, :4], atol=1e-4)
        assert torch.allclose(out[3, :, :, 4:], latent["samples"][3, :, :, 4:], atol=1e-4)
        (masked,) = run("InpaintMask", latent=latent, mask=half(SIZE, SIZE, 3))
        with pytest.raises(FluxError, match="3 masks cannot be shared out among 4 pictures"):
            draw(latent=masked)

    @pytest.mark.parametrize(
        ("mask", "said"),
        [
            (torch.zeros(1, 8, 8), "the mask is black everywhere, so there is nothing to draw: paint white"),
            (torch.full((1, 8, 8), 0.2), "is nowhere brighter than 0.5"),
            (torch.full((1, 8, 8), math.nan), "no numbers"),
            (torch.ones(1, 3, 8, 8), "must have the shape"),
            (torch.ones(1, 0, 8), "must have the shape"),
        ],
    )
    def test_masks_that_are_none_are_refused(self, run, source, mask, said):
        with pytest.raises(FluxError, match=said):
            run("InpaintMask", latent=source, mask=mask)

    def test_a_soft_mask_may_be_dark(self, run, draw, source):
        (masked,) = run("InpaintMask", latent=source, mask=torch.full((1, SIZE, SIZE), 0.4), mode="soft")
        assert draw(latent=masked)["samples"].isfinite().all()


class TestEdit:
    def test_nothing_asked_changes_nothing(self, run, half):
        mask = half(10, 10) * 0.3
        assert torch.equal(run("MaskEdit", mask=mask)[0], mask)
        assert torch.equal(run("MaskEdit", mask=mask[0])[0], mask), "a mask of one picture may lack its batch"

    def test_the_order_is_invert_threshold_grow_blur(self, run):
        mask = torch.ones(1, 21, 21)
        mask[:, 10, 10] = 0.3
        (edited,) = run("MaskEdit", mask=mask, invert=True, threshold=0.5, grow=2)
        assert edited.sum() == 25 and edited[0, 8:13, 8:13].all()
        (soft,) = run("MaskEdit", mask=mask, invert=True, threshold=0.5, grow=2, blur=1.5)
        assert 0 < soft[0, 10, 6] < soft[0, 10, 8] < 1 and soft.sum() == pytest.approx(25, rel=0.02)
        assert mask[0, 10, 10] == pytest.approx(0.3), "the given mask stays"

    def test_two_masks_as_one(self, run, half):
        right, upper = half(8, 8), half(16, 16).transpose(1, 2)  # the second is stretched
        sums = {m: run("CombineMasks", first=right, second=upper, mode=m)[0].sum().item()
                for m in ("union", "intersect", "subtract", "difference")}  # fmt: skip
        assert sums == {"union": 48, "intersect": 16, "subtract": 16, "difference": 32}


class TestCropAndStitch:
    def spot(self, height=90, width=130):
        mask = torch.zeros(1, height, width)
        mask[:, 40:50, 60:80] = 1
        return mask

    @pytest.mark.parametrize("size", [{}, {"width": 64}, {"width": 96, "height": 64}])
    def test_outside_the_region_the_picture_is_the_source_byte_for_byte(self, run, draw, demo, picture, size):
        image = picture(90, 130)
        part, mask, stitch = run("CropForInpaint", image=image, mask=self.spot(), blend=8, **size)
        assert part.shape[1] % 16 == 0 and part.shape[2] % 16 == 0 and mask.shape == part.shape[:3]
        (latent,) = run("EncodeImage", vae=demo.vae, image=part)
        (masked,) = run("InpaintMask", latent=latent, mask=mask)
        (drawn,) = run("Decode", vae=demo.vae, latent=draw(latent=masked, steps=1))
        (whole,) = run("StitchBack", stitch=stitch, image=drawn)
        reach = torch.zeros(90, 130, dtype=torch.bool)
        reach[32:58, 52:88] = True
        assert torch.equal(whole[0, ~reach], image[0, ~reach])
        assert not torch.allclose(whole[0, 40:50, 60:80], image[0, 40:50, 60:80], atol=1e-2)

    def test_it_tells_what_it_cut_out(self, run, host, picture):
        run("CropForInpaint", image=picture(90, 130), mask=self.spot(), padding=6, blend=0, width=64)
        assert host.texts[-1].endswith("drawn at 64x48") and host.texts[-1].startswith("32x2")

    def test_a_black_mask_and_a_strange_crop_are_refused(self, run, picture):
        with pytest.raises(FluxError, match="black everywhere"):
            run("CropForInpaint", image=picture(32, 32), mask=torch.zeros(1, 32, 32))
        _, _, stitch = run("CropForInpaint", image=picture(90, 130, 2), mask=self.spot())
        with pytest.raises(FluxError, match="cannot be stitched into 2 pictures"):
            run("StitchBack", stitch=stitch, image=picture(32, 32, 3))
        with pytest.raises(FluxError, match=r"'stitch' got a Tensor .* connect it to Crop for Inpaint"):
            run("StitchBack", stitch=picture(8, 8), image=picture(8, 8))


class TestOutpaint:
    def test_room_is_made_and_filled(self, run, draw, demo, prompts, models, picture):
        image = picture(40, 50)
        padded, mask = run("PadForOutpaint", image=image, left=16, right=0, bottom=24, feather=0)
        assert padded.shape == (1, 64, 66, 3) and mask.shape == (1, 64, 66)
        assert torch.equal(padded[:, :40, 16:], image) and not mask[:, :40, 16:].any() and mask[:, 40:].all()
        filled, latent = run("FillCondition", conditioning=prompts[0], image=padded, mask=mask, vae=demo.vae)
        assert draw(model=models["fill"], positive=filled, latent=latent)["samples"].shape == (1, 16, 8, 8)

    def test_no_room_is_an_error(self, run, picture):
        with pytest.raises(FluxError, match="needs room on at least one side"):
            run("PadForOutpaint", image=picture(16, 16), right=0)
