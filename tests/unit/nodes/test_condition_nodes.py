"""The condition nodes, each at work on tiny models, and the errors that send a user to the right one."""

from __future__ import annotations

import math

import pytest
import torch

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.nodes import NODE_CLASS_MAPPINGS

SIZE = 64


@pytest.fixture
def words(prompts):
    return prompts[0]


@pytest.fixture
def add(run, demo, nets, adapters, picture):
    """`add("ControlNet", conditioning, **inputs)`: a condition with a picture of an odd size, on what was given."""
    own = {
        "ControlNet": {"controlnet": nets["latents"], "vae": demo.vae},
        "ControlImage": {"vae": demo.vae},
        "KontextCondition": {"vae": demo.vae, "size": "source"},
        "ReduxPrior": {"adapter": adapters["redux"]},
        "IPAdapter": {"adapter": adapters["ip"]},
    }

    def call(name, conditioning, **inputs):
        given = {"image": picture(70, 90, seed=len(name))} | own[name] | inputs
        return run(name, conditioning=conditioning, **given)[0]

    return call


def drawn(draw, **settings):
    samples = draw(**settings)["samples"]
    assert samples.isfinite().all()
    return samples


@pytest.mark.parametrize("name", ["ControlNet", "KontextCondition", "ReduxPrior", "IPAdapter"])
def test_each_condition_changes_the_picture_and_copies_what_it_is_given(draw, add, words, name):
    before = words.prompts, words.conditions
    conditioned = add(name, words)
    assert conditioned is not words and (words.prompts, words.conditions) == before
    assert not torch.allclose(drawn(draw, positive=conditioned), drawn(draw), atol=1e-3)


def test_the_canny_model_draws_with_its_control_image_and_no_other_does(draw, add, words, models):
    controlled = add("ControlImage", words)
    drawn(draw, model=models["canny"], positive=controlled)
    with pytest.raises(FluxError, match=r"canny model draws from a control image \(Control Image\)"):
        draw(model=models["canny"])
    with pytest.raises(FluxError, match="dev"):
        draw(positive=controlled)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("name", ["ControlNet", "ControlImage", "KontextCondition"])
@pytest.mark.parametrize("shape", [(33, 97), (200, 17), (64, 64)])
def test_pictures_of_any_shape_are_fitted(draw, add, words, models, picture, name, fit, shape):
    options = {"size": "canvas"} if name == "KontextCondition" else {}
    conditioned = add(name, words, image=picture(*shape), fit=fit, **options)
    latent = {"samples": torch.zeros(1, 16, 6, 10)}
    kind = "canny" if name == "ControlImage" else "dev"
    assert drawn(draw, model=models[kind], positive=conditioned, latent=latent, steps=1).shape == (1, 16, 6, 10)


def test_fit_modes_differ(draw, add, words, picture):
    wide = picture(32, 128, seed=4)
    results = [drawn(draw, positive=add("ControlNet", words, image=wide, fit=f)) for f in ("crop", "pad", "stretch")]
    assert not any(torch.allclose(results[i], results[i - 1], atol=1e-4) for i in range(3))


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_pictures_are_taken(draw, add, words, picture, channels):
    image = picture(40, 40)
    image = image[..., :1] if channels == 1 else torch.cat([image, torch.rand(1, 40, 40, 1)], dim=-1)
    rgb = image.expand(-1, -1, -1, 3) if channels == 1 else image[..., :3]
    for name in ("ControlNet", "KontextCondition", "ReduxPrior", "IPAdapter"):
        ours, plain = (drawn(draw, positive=add(name, words, image=i), steps=1) for i in (image, rgb))
        assert torch.equal(ours, plain), name


@pytest.mark.parametrize("bad", [torch.zeros(8, 8, 3), torch.full((1, 8, 8, 3), math.nan), torch.zeros(0, 8, 8, 3)])
def test_what_is_no_picture_is_refused_at_the_node(add, words, bad):
    for name in ("ControlNet", "ControlImage", "KontextCondition", "ReduxPrior", "IPAdapter"):
        with pytest.raises(FluxError, match="picture"):
            add(name, words, image=bad)


def test_a_batch_of_pictures_is_shared_out_or_refused_with_a_sentence(draw, add, words, models, picture):
    two, three = {"samples": torch.zeros(2, 16, 8, 8)}, {"samples": torch.zeros(3, 16, 8, 8)}
    for name in ("ControlNet", "KontextCondition", "ControlImage"):
        model = models["canny" if name == "ControlImage" else "dev"]
        conditioned = add(name, words, image=picture(64, 64, 2))
        drawn(draw, model=model, positive=conditioned, latent=two, steps=1)
        with pytest.raises(FluxError, match="cannot be shared out among a batch of 3"):
            draw(model=model, positive=conditioned, latent=three, steps=1)


class TestControlNet:
    def test_scale_and_range_and_curve(self, draw, add, words):
        full = drawn(draw, positive=add("ControlNet", words, scale=1.0))
        assert torch.equal(drawn(draw, positive=add("ControlNet", words, scale=0.0)), drawn(draw))
        assert torch.equal(drawn(draw, positive=add("ControlNet", words, scale=1.0, curve=" 1,1 ; 1 ")), full)
        assert torch.equal(drawn(draw, positive=add("ControlNet", words, scale=1.0, curve="0")), drawn(draw))
        early = drawn(draw, positive=add("ControlNet", words, scale=1.0, end=0.34))
        assert torch.equal(early, drawn(draw, positive=add("ControlNet", words, scale=1.0, curve="1, 0, 0")))
        assert not torch.equal(early, full)

    @pytest.mark.parametrize("curve", ["1, half", "nan", "1, inf", "1 - 0"])
    def test_a_curve_that_is_none_is_refused(self, add, words, curve):
        with pytest.raises(FluxError, match=r"the curve is .* write numbers with commas"):
            add("ControlNet", words, curve=curve)

    def test_the_negative_pass_has_three_ways(self, draw, add, prompts):
        results = [
            drawn(draw, positive=add("ControlNet", prompts[0], negative=n), negative=prompts[1], true_cfg_scale=2.0)
            for n in ("reuse", "none", "again")
        ]
        assert not any(torch.allclose(results[i], results[i - 1], atol=1e-5) for i in range(3))

    def test_a_union_net_needs_a_mode_that_it_has(self, host, draw, add, words, nets):
        modes = [drawn(draw, positive=add("ControlNet", words, controlnet=nets["union"], mode=m), steps=1)
                 for m in ("canny", "depth")]  # fmt: skip
        assert not torch.allclose(*modes, atol=1e-5)
        with pytest.raises(FluxError, match=r"tiny union is a union ControlNet: choose .* canny, tile, depth"):
            add("ControlNet", words, controlnet=nets["union"])
        with pytest.raises(FluxError, match="needs a mode from 0 to 4"):
            add("ControlNet", words, controlnet=nets["union"], mode="gray")
        plain = add("ControlNet", words, mode="depth")
        assert "no union ControlNet: the mode has no effect" in host.texts[-1] and plain.conditions[0].mode is None

    def test_nets_that_read_pixels_need_no_vae_and_others_say_so(self, draw, add, words, nets):
        drawn(draw, positive=add("ControlNet", words, controlnet=nets["xlabs"], vae=None))
        with pytest.raises(FluxError, match="tiny latents reads encoded pictures: connect the vae of Load FLUX"):
            add("ControlNet", words, vae=None)

    def test_a_backward_range_fails_validation(self):
        for name in ("ControlNet", "IPAdapter"):
            judge = NODE_CLASS_MAPPINGS[f"FluxCanvas_{name}"].VALIDATE_INPUTS
            assert judge(start=0.2, end=0.8) is True and judge(start=None, end=0.8) is True
            assert "must lie before end (0.4)" in judge(start=0.6, end=0.4)
            assert "must be from 0 to 1" in judge(start=math.nan, end=1.0)


class TestImagePrompts:
    def test_several_pictures_are_joined_averaged_or_summed(self, draw, add, words, picture):
        two = picture(50, 50, 2)
        made = {c: add("ReduxPrior", words, image=two, combine=c) for c in ("join", "average", "sum")}
        assert [len(m.prompts[1].tokens[0]) for m in made.values()] == [18, 9, 9]
        assert made["join"].prompts[0] == made["average"].prompts[0] == words.prompts[0]
        assert torch.allclose(made["sum"].prompts[0].tokens, 2 * words.prompts[0].tokens)
        assert torch.allclose(made["sum"].prompts[1].tokens, 2 * made["average"].prompts[1].tokens, atol=1e-5)
        for one in made.values():
            drawn(draw, positive=one, steps=1)

    def test_strengths_multiply_and_spare_other_pictures(self, add, words):
        once = add("ReduxPrior", words, text_strength=0.5, image_strength=2.0)
        twice = add("ReduxPrior", once, text_strength=0.5, image_strength=3.0)
        assert [p.strength for p in twice.prompts] == [0.25, 2.0, 3.0]

    def test_a_strength_of_zero_hides_the_picture(self, draw, add, words):
        hidden = drawn(draw, positive=add("ReduxPrior", words, image_strength=0.0))
        assert torch.allclose(hidden, drawn(draw), atol=1e-4)

    def test_downsampling_and_a_region(self, draw, add, words, half):
        conditioned = add("ReduxPrior", words, downsample=3, region=half(20, 30))
        assert conditioned.prompts[1].tokens.shape[1] == 1 and conditioned.prompts[1].region.shape == (20, 30)
        drawn(draw, positive=conditioned)
        with pytest.raises(FluxError, match="cannot be thinned out by 9; use 1 to 3"):
            add("ReduxPrior", words, downsample=9)
        with pytest.raises(FluxError, match="the mask is black everywhere"):
            add("ReduxPrior", words, region=torch.zeros(1, 8, 8))
        with pytest.raises(FluxError, match="a region is one mask, and 2 were given"):
            add("ReduxPrior", words, region=half(8, 8, 2))

    def test_scales_of_blocks(self, draw, add, words):
        same = drawn(draw, positive=add("IPAdapter", words, scale=0.8, block_scales="1, 1"))
        assert torch.equal(same, drawn(draw, positive=add("IPAdapter", words, scale=0.8)))
        assert torch.equal(drawn(draw, positive=add("IPAdapter", words, block_scales="0 0")), drawn(draw))
        with pytest.raises(FluxError, match="3 scales were given for the 2 double blocks"):
            draw(positive=add("IPAdapter", words, block_scales="1, 1, 1"))

    def test_the_negative_prompt_sees_black_or_its_own_picture(self, draw, add, prompts, picture):
        cfg = {"negative": prompts[1], "true_cfg_scale": 2.0}
        black = drawn(draw, positive=add("IPAdapter", prompts[0]), **cfg)
        named = add("IPAdapter", prompts[0], negative_image=torch.zeros(1, 30, 50, 3))
        assert torch.equal(black, drawn(draw, positive=named, **cfg))
        other = add("IPAdapter", prompts[0], negative_image=picture(30, 50))
        assert not torch.allclose(black, drawn(draw, positive=other, **cfg), atol=1e-5)

    def test_adapters_of_the_other_kind_are_sent_to_their_own_node(self, add, words, adapters):
        with pytest.raises(
            FluxError, match=r"IP-Adapter needs an IP-Adapter, and tiny redux .* connect it to Redux Prior"
        ):
            add("IPAdapter", words, adapter=adapters["redux"])
        with pytest.raises(FluxError, match=r"Redux Prior needs FLUX.1 Redux, and tiny ip .* connect it to IP-Adapter"):
            add("ReduxPrior", words, adapter=adapters["ip"])
        with pytest.raises(FluxError, match=r"IP-Adapter: the input 'adapter' got a .* connect it to Load Adapter"):
            add("IPAdapter", words, adapter=words)


class TestRegions:
    def test_two_prompts_in_their_places(self, draw, prompts, run, half):
        left, right = (run("RegionPrompt", conditioning=p, mask=m)[0]
                       for p, m in zip(prompts, (1 - half(32, 32), half(32, 32)), strict=True))  # fmt: skip
        (both,) = run("CombineConditioning", first=left, second=right)
        assert len(both.prompts) == 2 and prompts[0].prompts[0].region is None
        regional, everywhere = (drawn(draw, positive=c) for c in (both, left))
        assert not torch.allclose(regional, everywhere, atol=1e-4)

    def test_a_region_in_a_region_is_what_both_have(self, prompts, run, half):
        upper = torch.zeros(1, 32, 32)
        upper[:, :16] = 1
        (once,) = run("RegionPrompt", conditioning=prompts[0], mask=half(32, 32), strength=2.0)
        (twice,) = run("RegionPrompt", conditioning=once, mask=upper, strength=1.5)
        assert torch.equal(twice.prompts[0].region, (half(32, 32) * upper)[0]) and twice.prompts[0].strength == 3.0

    def test_what_two_prompts_share_counts_once(self, add, prompts, run):
        shared = add("KontextCondition", prompts[0])
        (both,) = run("CombineConditioning", first=shared, second=add("ControlNet", shared))
        assert len(both.prompts) == 1 and len(both.conditions) == 2

    def test_the_first_guidance_leads_and_it_is_told(self, demo, host, run):
        three, five, none = (run("EncodePrompt", text=demo.text, prompt="x", guidance=g)[0] for g in (3.0, 5.0, 0.0))
        assert run("CombineConditioning", first=none, second=five)[0].guidance == 5.0 and not host.texts
        assert run("CombineConditioning", first=three, second=five)[0].guidance == 3.0
        assert "the first's 3 is taken" in host.texts[-1]


class TestFill:
    def fill(self, run, demo, words, image, mask, **more):
        return run("FillCondition", conditioning=words, image=image, mask=mask, vae=demo.vae, **more)

    def test_it_gives_the_latent_to_draw_on(self, run, draw, demo, words, models, picture, half):
        image = picture(70, 100)
        conditioned, latent = self.fill(run, demo, words, image, half(70, 100))
        assert latent["samples"].shape == (1, 16, 8, 12)
        assert torch.equal(latent["samples"], run("EncodeImage", vae=demo.vae, image=image)[0]["samples"])
        assert drawn(draw, model=models["fill"], positive=conditioned, latent=latent).shape == (1, 16, 8, 12)

    @pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
    def test_another_canvas_fits_picture_and_mask_alike(self, run, draw, demo, words, models, picture, half, fit):
        conditioned, _ = self.fill(run, demo, words, picture(40, 90), half(20, 45), fit=fit)
        condition = conditioned.conditions[0]
        grey = (condition.masked.pixels(48, 80) == 0.5).all(-1)
        assert torch.equal(grey, condition.mask(48, 80) == 1)
        drawn(draw, model=models["fill"], positive=conditioned)

    def test_the_model_asks_for_its_mask_by_the_nodes_name(self, draw, models):
        with pytest.raises(FluxError, match=r"fill model draws from a picture and a mask to fill \(Fill Condition\)"):
            draw(model=models["fill"])

    def test_masks_that_do_not_fit_are_refused_with_a_sentence(self, run, demo, words, picture, half):
        with pytest.raises(FluxError, match="the mask is black everywhere, so there is nothing to draw"):
            self.fill(run, demo, words, picture(32, 32), torch.zeros(1, 32, 32))
        with pytest.raises(FluxError, match="3 masks cannot be used with 2 pictures"):
            self.fill(run, demo, words, picture(32, 32, 2), half(32, 32, 3))

    def test_several_masks_of_one_picture_draw_a_batch(self, run, draw, demo, words, models, picture, half):
        masks = torch.cat([half(32, 32), 1 - half(32, 32)])
        conditioned, latent = self.fill(run, demo, words, picture(32, 32), masks)
        assert len(latent["samples"]) == 2
        drawn(draw, model=models["fill"], positive=conditioned, latent=latent)
        four = {"samples": torch.zeros(4, 16, 4, 4)}
        assert len(drawn(draw, model=models["fill"], positive=conditioned, latent=four, steps=1)) == 4


def test_a_vae_of_another_model_is_refused(add, words, demo):
    class Params:
        z_channels, factor = 4, 8

    Vae = type("Vae", (), {"params": Params})
    for name in ("ControlNet", "ControlImage", "KontextCondition"):
        with pytest.raises(FluxError, match=r"this VAE makes latents of 4 channels .* connect the vae of Load FLUX"):
            add(name, words, vae=Vae())


def test_a_net_for_another_width_is_named(draw, add, words, nets, demo, randoms):
    from dataclasses import replace

    from fluxcanvas.flux_runtime.model.sidenet import SideNet, SideNetParams

    other = replace(demo.model.params, hidden_size=64, num_heads=2, depth=1, depth_single=1)
    wide = replace(nets["latents"], model=randoms(SideNet(SideNetParams(other))), name="stranger")
    with pytest.raises(
        FluxError, match=r"the ControlNet stranger was made for another model: its width is 64, and the model.s 192"
    ):
        draw(positive=add("ControlNet", words, controlnet=wide))
