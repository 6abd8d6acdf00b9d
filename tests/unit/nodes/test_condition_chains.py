"""All conditions together, in every order of wiring; Kontext's references and canvas; a picture drawn in two parts."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch

from fluxcanvas.flux_runtime.bind import Canvas
from fluxcanvas.flux_runtime.conditions import place
from fluxcanvas.flux_runtime.errors import FluxError


@pytest.fixture
def steps(run, demo, nets, adapters, picture, half):
    """The names and inputs of a chain that uses every kind of condition."""
    vae = demo.vae
    return {
        "ControlNet": {"controlnet": nets["union"], "image": picture(50, 70), "vae": vae, "mode": "tile"},
        "KontextCondition": {"image": picture(32, 48, seed=1), "vae": vae, "size": "source"},
        "ReduxPrior": {"adapter": adapters["redux"], "image": picture(40, 40, 2, seed=2), "text_strength": 0.7},
        "IPAdapter": {"adapter": adapters["ip"], "image": picture(40, 40, seed=3)},
        "FillCondition": {"image": picture(64, 64, seed=4), "mask": half(64, 64), "vae": vae},
    }


def chain(run, conditioning, steps, order):
    for name in order:
        conditioning = run(name, conditioning=conditioning, **steps[name])[0]
    return conditioning


def test_every_order_of_wiring_draws_the_same_picture(run, draw, prompts, models, steps):
    settings = {"model": models["fill"], "steps": 1, "negative": prompts[1], "true_cfg_scale": 1.5}
    results = [
        draw(positive=chain(run, prompts[0], steps, order), **settings)["samples"] for order in permutations(steps)
    ]
    assert len(results) == 120 and results[0].isfinite().all()
    assert all(torch.equal(one, results[0]) for one in results)
    for name in steps:
        if name != "FillCondition":
            fewer = draw(positive=chain(run, prompts[0], steps, [n for n in steps if n != name]), **settings)
            assert not torch.allclose(fewer["samples"], results[0], atol=1e-5), f"{name} had no say"


def test_two_nets_and_two_adapters_in_either_order(run, draw, prompts, nets, adapters, picture):
    inputs = {
        "a": ("ControlNet", {"controlnet": nets["xlabs"], "image": picture(30, 30), "scale": 0.3}),
        "b": ("ControlNet", {"controlnet": nets["xlabs"], "image": picture(30, 30, seed=1), "curve": "1, 0"}),
        "c": ("IPAdapter", {"adapter": adapters["ip"], "image": picture(30, 30, seed=2)}),
        "d": ("IPAdapter", {"adapter": adapters["ip"], "image": picture(30, 30, seed=3), "scale": -0.4}),
        "e": ("ReduxPrior", {"adapter": adapters["redux"], "image": picture(30, 30, seed=4), "image_strength": 0.5}),
        "f": ("ReduxPrior", {"adapter": adapters["redux"], "image": picture(30, 30, seed=5)}),
    }

    def picture_of(order):
        conditioning = prompts[0]
        for key in order:
            conditioning = run(inputs[key][0], conditioning=conditioning, **inputs[key][1])[0]
        return draw(positive=conditioning, steps=1)["samples"]

    first = picture_of("abcdef")
    for order in ("fedcba", "badcfe", "ecafdb"):
        assert torch.allclose(picture_of(order), first, atol=1e-4)  # sums in another order round otherwise


def test_nothing_on_the_edges_is_changed(run, draw, prompts, models, steps):
    tensors = [value for inputs in steps.values() for value in inputs.values() if torch.is_tensor(value)]
    tensors += [prompts[0].prompts[0].tokens, prompts[0].prompts[0].pooled]
    weights = [*steps["ControlNet"]["controlnet"].model.parameters(), *steps["IPAdapter"]["adapter"].model.parameters()]
    kept = [tensor.clone() for tensor in (*tensors, *weights)]
    conditioned = chain(run, prompts[0], steps, steps)
    counts = len(conditioned.prompts), len(conditioned.conditions)
    draw(model=models["fill"], positive=conditioned, negative=prompts[1], true_cfg_scale=2.0, steps=1)
    assert all(torch.equal(tensor, copy) for tensor, copy in zip((*tensors, *weights), kept, strict=True))
    assert (len(conditioned.prompts), len(conditioned.conditions)) == counts and not prompts[0].conditions


def test_drawing_again_encodes_nothing_again(run, draw, prompts, demo, models, steps, monkeypatch):
    conditioned = chain(run, prompts[0], steps, steps)
    draw(model=models["fill"], positive=conditioned, steps=1)
    monkeypatch.setattr(demo.vae.model, "encode", lambda *_: pytest.fail("the VAE was asked again"))
    draw(model=models["fill"], positive=conditioned, steps=1, seed=9)


class TestKontext:
    def placed(self, demo, conditioning, height=8, width=8):
        canvas = Canvas(demo.model, torch.Size((1, 16, height, width)), torch.ones(2), (), 1.0)
        return place(conditioning.conditions, canvas)

    def several(self, run, demo, prompts, sizes, picture, **options):
        conditioning = prompts[0]
        for height, width in sizes:
            inputs = {"image": picture(height, width), "vae": demo.vae, "size": "source"} | options
            (conditioning,) = run("KontextCondition", conditioning=conditioning, **inputs)
        return conditioning

    def test_references_are_numbered_in_the_order_of_the_chain(self, run, demo, prompts, draw, picture):
        three = self.several(run, demo, prompts, [(32, 32), (50, 70), (16, 16)], picture)
        placed = self.placed(demo, three)
        assert [p.index for p in placed] == [1, 2, 3] and {(p.row, p.column) for p in placed} == {(0, 0)}
        assert [(p.height, p.width) for p in placed] == [(4, 4), (6, 8), (2, 2)]
        assert draw(positive=three, steps=1)["samples"].isfinite().all()

    def test_offset_lays_them_side_by_side(self, run, demo, prompts, draw, picture):
        sizes = [(64, 32), (64, 32), (32, 64)]
        three = self.several(run, demo, prompts, sizes, picture, method="offset")
        placed = self.placed(demo, three)
        assert [(p.index, p.row, p.column) for p in placed] == [(1, 0, 0), (1, 0, 2), (1, 4, 0)]
        indexed = self.several(run, demo, prompts, sizes, picture)
        one, other = (draw(positive=c, steps=1)["samples"] for c in (three, indexed))
        assert not torch.allclose(one, other, atol=1e-5)

    def test_references_of_two_prompts_do_not_share_a_place(self, run, demo, prompts, picture):
        pair = [self.several(run, demo, prompts, [size], picture) for size in ((32, 32), (48, 48))]
        (both,) = run("CombineConditioning", first=pair[0], second=pair[1])
        assert [p.index for p in self.placed(demo, both)] == [1, 2]

    def test_their_size_is_trained_or_their_own_or_the_canvass(self, run, demo, prompts, picture):
        sizes = {
            size: self.placed(demo, self.several(run, demo, prompts, [(50, 100)], picture, size=size), 12, 20)[0]
            for size in ("preferred", "source", "canvas")
        }
        shapes = {size: (p.height * 8, p.width * 8) for size, p in sizes.items()}
        assert shapes == {"preferred": (720, 1456), "source": (48, 96), "canvas": (96, 160)}

    def test_strength_of_zero_hides_a_reference(self, run, demo, prompts, draw, picture):
        hidden = self.several(run, demo, prompts, [(32, 32)], picture, strength=0.0)
        assert torch.allclose(draw(positive=hidden)["samples"], draw()["samples"], atol=1e-4)

    @pytest.mark.parametrize(
        ("inputs", "shape", "why"),
        [
            ({"size": "exact", "width": 160, "height": 96}, (12, 20), "drawing 160x96: the size asked for"),
            ({"size": "source"}, (6, 12), "drawing 96x48: the source's size 100x50, floored"),
            ({"size": "preferred"}, (90, 182), "drawing 1456x720: the trained size nearest to the source's"),
            ({"size": "area", "width": 160, "height": 160}, (128, 128), "drawing 1024x1024"),
        ],
    )
    def test_the_canvas_is_as_asked_and_says_why(self, run, host, picture, inputs, shape, why):
        (latent,) = run("KontextCanvas", image=picture(50, 100), batch_size=2, **inputs)
        assert latent["samples"].shape == (2, 16, *shape) and host.texts[-1].startswith(why)

    def test_a_canvas_of_the_source_needs_one(self, run):
        with pytest.raises(FluxError, match="the size mode 'source' needs a picture to edit"):
            run("KontextCanvas", size="source")


class TestTwoParts:
    def test_a_picture_begun_by_one_sample_is_finished_by_another(self, draw):
        whole = draw(steps=4)["samples"]
        begun = draw(steps=4, end=0.5)
        assert not torch.allclose(begun["samples"], whole, atol=0.1)
        finished = draw(steps=4, start=0.5, latent=begun, add_noise=False, seed=99)
        assert torch.allclose(finished["samples"], whole, atol=1e-4)

    def test_it_says_that_it_adds_no_noise(self, draw, host):
        draw(latent={"samples": torch.ones(1, 16, 8, 8)}, add_noise=False)
        assert host.texts[-1] == "3 steps, no new noise"

    def test_an_empty_latent_without_noise_is_refused(self, draw):
        with pytest.raises(FluxError, match="add_noise is off and the latent is empty"):
            draw(add_noise=False)

    def test_a_mask_needs_noise(self, draw):
        latent = {"samples": torch.ones(1, 16, 8, 8), "noise_mask": torch.ones(1, 1, 64, 64)}
        with pytest.raises(FluxError, match="switch `add_noise` on, or remove the mask"):
            draw(latent=latent, add_noise=False)
