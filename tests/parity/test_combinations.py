"""Conditions together: any wiring gives the same picture, and each part counts."""

from dataclasses import replace
from itertools import combinations, permutations

import numpy as np
import pytest
import torch
from PIL import Image

from fluxcanvas.flux_runtime import Conditioning, FluxError, make_noise, recipes, sample
from fluxcanvas.flux_runtime.adapters import IPAdapter, Redux
from fluxcanvas.flux_runtime.conditions import (
    ControlImage,
    FillImage,
    ImagePromptCondition,
    Reference,
    SideNetCondition,
)
from fluxcanvas.flux_runtime.job import _embedded
from fluxcanvas.flux_runtime.model.adapters import IPAdapterNet, IPAdapterParams, ReduxEncoder
from fluxcanvas.flux_runtime.pictures import Picture, masked_picture

PROMPT, NEGATIVE = "a red house under a yellow moon", "blurry, dark"
EMBED = 40


def picture(seed: int, width: int = 80, height: int = 56) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def pixels(seed: int) -> torch.Tensor:
    return torch.rand(1, 40, 56, 3, generator=torch.Generator().manual_seed(seed))


def randomised(module: torch.nn.Module, seed: int) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return module.requires_grad_(False)


class Eyes:
    """An image encoder that needs no weights: what it says depends on the pictures alone."""

    def pooled(self, images):
        return images.mean((1, 2)).repeat(1, 14)[:, :EMBED]

    def hidden(self, images):
        return images.permute(0, 3, 1, 2).flatten(2)[:, :, :96].reshape(len(images), 9, 32)


def ip_adapter(seed: int) -> IPAdapter:
    params = IPAdapterParams(tokens=4, blocks=2, embed_dim=EMBED, context_dim=32, hidden_size=128)
    return IPAdapter(randomised(IPAdapterNet(params), seed), Eyes(), f"adapter {seed}")


@pytest.fixture(scope="module")
def parts(pair, net_pair, shape_of):
    """`parts(channels)` -> our Flux with so many input channels, and one condition of every kind that it may have."""

    def get(channels: int):
        _, flux = pair(shape_of(in_channels=channels))
        _, first = net_pair(shape_of())
        _, second = net_pair(shape_of(), seed=1, num_layers=1, num_single_layers=2)
        mask = torch.zeros(1, 40, 56)
        mask[:, 10:30, 20:50] = 1
        masked = masked_picture(Picture(pixels(4), flux.vae), mask)
        beside = {64: (), 128: (ControlImage(Picture(pixels(3), flux.vae)),), 384: (FillImage(masked, masked.mask),)}
        adapters = [ip_adapter(1), ip_adapter(2), ip_adapter(3)]
        return flux, {
            "net": SideNetCondition(first, Picture(pixels(1), flux.vae), 0.7, end=0.8),
            "other net": SideNetCondition(second, Picture(pixels(2), flux.vae), 0.4, curve=(1.0, 0.5)),
            "third net": SideNetCondition(first, Picture(pixels(8), flux.vae), 0.3),
            "beside": beside[channels],
            "reference": Reference(Picture(pixels(5), flux.vae), 48, 32),
            "other reference": Reference(Picture(pixels(6), flux.vae), 32, 32, index=2, strength=0.6),
            "picture": ImagePromptCondition(adapters[0], adapters[0].embed(pixels(7)), scale=0.8),
            "other picture": ImagePromptCondition(
                adapters[1], adapters[1].embed(pixels(8)), scale=(0.3, 0.9), start=0.4
            ),
            "third picture": ImagePromptCondition(adapters[2], adapters[2].embed(pixels(9)), scale=0.5),
        }

    return get


def drawn(flux, conditions, *, cfg: float = 1.0, prompts=(), steps: int = 2, batch: int = 1, negative=()):
    positive = Conditioning((flux.text.encode(PROMPT, max_tokens=16), *prompts), 3.5, tuple(conditions))
    negative = Conditioning((flux.text.encode(NEGATIVE, max_tokens=16),), None, tuple(negative))
    shape = (batch, 16, 6, 8)
    return sample(flux.model, positive, negative, latents=torch.zeros(shape), noise=make_noise(shape, 1), steps=steps,
                  true_cfg_scale=cfg)  # fmt: skip


@pytest.mark.parametrize("channels", [64, 128, 384], ids=["kontext", "control", "fill"])
@pytest.mark.parametrize("cfg", [1.0, 2.0], ids=["plain", "true cfg"])
def test_every_order_of_wiring_gives_the_same_picture(parts, channels, cfg):
    flux, every = parts(channels)
    chosen = [every["net"], *every["beside"], every["reference"], every["picture"]]
    expected = drawn(flux, chosen, cfg=cfg)
    assert all(torch.equal(drawn(flux, order, cfg=cfg), expected) for order in permutations(chosen))


@pytest.mark.parametrize("kind", ["net", "picture", "reference"])
def test_so_does_every_order_of_several_of_a_kind(parts, kind):
    flux, every = parts(64)
    chosen = [condition for name, condition in every.items() if name.endswith(kind)]
    expected = drawn(flux, chosen)
    assert len(chosen) > 1 and all(torch.equal(drawn(flux, order), expected) for order in permutations(chosen))


def test_each_part_counts(parts):
    flux, every = parts(384)
    chosen = [every["net"], every["other net"], every["reference"], every["picture"], every["other picture"]]
    whole = drawn(flux, [*every["beside"], *chosen])
    for less in combinations(chosen, len(chosen) - 1):
        assert (drawn(flux, [*every["beside"], *less]) - whole).abs().max() > 1e-3


def test_a_batch_draws_the_same_pictures(parts):
    flux, every = parts(384)
    chosen = [every["net"], *every["beside"], every["reference"], every["picture"]]
    two = drawn(flux, chosen, batch=2)
    one = sample(
        flux.model, Conditioning((flux.text.encode(PROMPT, max_tokens=16),), 3.5, tuple(chosen)), latents=two[:1],
        noise=make_noise((2, 16, 6, 8), 1)[1:], steps=2,
    )  # fmt: skip
    torch.testing.assert_close(two[1:], one, rtol=1e-4, atol=1e-4)


OPTIONS = {
    "height": 48,
    "width": 64,
    "steps": 2,
    "guidance": 3.5,
    "max_sequence_length": 16,
    "output": "latent",
    "seed": 5,
}


def test_controlnet_with_kontext(parts, net_pair, shape_of):
    flux, every = parts(64)
    _, net = net_pair(shape_of())
    nets = {"controlnet": net, "control_image": picture(2)}
    both = recipes.controlnet(flux, PROMPT, **nets, conditions=[every["reference"]], **OPTIONS)
    alone = recipes.controlnet(flux, PROMPT, **nets, **OPTIONS)
    edit = {"image": picture(1), "reference_size": "source"}
    edited = recipes.kontext(flux, PROMPT, **edit, **OPTIONS)
    guided = recipes.kontext(flux, PROMPT, **edit, conditions=[every["net"]], **OPTIONS)
    assert min((both - alone).abs().max(), (guided - edited).abs().max()) > 1e-3


def test_fill_with_controlnet_redux_and_ip_adapter(parts):
    flux, every = parts(384)
    redux = Redux(randomised(ReduxEncoder(32, 32), 4), Eyes(), "redux")
    mask = Image.new("L", (80, 56))
    mask.paste(255, (20, 10, 60, 40))
    seen = recipes.redux_prior(flux, PROMPT, adapter=redux, image=picture(3), max_sequence_length=16)

    def fill(prompt, **more):
        return recipes.fill(flux, prompt, image=picture(1), mask=mask, **OPTIONS, **more)

    show = {"adapter": ip_adapter(1), "adapter_image": picture(7)}
    whole = fill(seen, conditions=[every["net"]], **show)
    for less in (
        fill(seen, conditions=[every["net"]]),
        fill(seen, **show),
        fill(PROMPT, conditions=[every["net"]], **show),
    ):
        assert (whole - less).abs().max() > 1e-3


def test_control_inpaint_with_true_cfg(parts):
    flux, _ = parts(128)
    mask = Image.new("L", (80, 56))
    mask.paste(255, (20, 10, 60, 40))
    options = {"image": picture(1), "mask": mask, "control_image": picture(2), **OPTIONS}
    plain = recipes.control_inpaint(flux, PROMPT, **options)
    both = recipes.control_inpaint(flux, PROMPT, negative_prompt=NEGATIVE, true_cfg_scale=2.5, **options)
    other = recipes.control_inpaint(flux, PROMPT, **options | {"control_image": picture(4)})
    assert min((both - plain).abs().max(), (other - plain).abs().max()) > 1e-3


def region(flux, left: float, right: float):
    mask = torch.zeros(48, 64)
    mask[:, :32], mask[:, 32:] = left, right
    return replace(flux.text.encode("a blue boat", max_tokens=8), region=mask)


def test_regional_prompts_with_a_reference(parts):
    """A region that is white everywhere hides nothing; two halves are not the same as exchanged ones."""
    flux, every = parts(64)
    everywhere = region(flux, 1, 1)
    free = drawn(flux, [every["reference"]], prompts=[replace(everywhere, region=None)])
    torch.testing.assert_close(drawn(flux, [every["reference"]], prompts=[everywhere]), free, rtol=1e-4, atol=1e-4)
    left, right = (drawn(flux, [every["reference"]], prompts=[region(flux, *sides)]) for sides in ((1, 0), (0, 1)))
    assert min((left - right).abs().max(), (left - free).abs().max()) > 1e-3
    weak = drawn(flux, [replace(every["reference"], strength=0.2)], prompts=[region(flux, 1, 0)])
    assert (weak - left).abs().max() > 1e-3


def test_what_is_wired_to_the_negative_prompt_acts_there_as_it_is(parts):
    """An image prompt of its own is seen with its own picture, and a net that stays out of others' negative is in."""
    flux, every = parts(64)
    shown = every["picture"]
    other = shown.adapter.embed(pixels(9))
    lent = drawn(flux, [replace(shown, negative=other)], cfg=2.0)
    own = replace(shown, embeds=other, negative=None)
    assert torch.equal(drawn(flux, [shown], cfg=2.0, negative=[own]), lent)
    assert not torch.equal(drawn(flux, [shown], cfg=2.0), lent)
    nets = [replace(every["net"], negative=negative) for negative in ("none", "again")]
    one, same = (drawn(flux, [every["net"]], cfg=2.0, negative=[net]) for net in nets)
    assert torch.equal(one, same)
    assert not torch.equal(one, drawn(flux, nets[:1], cfg=2.0))


def test_references_of_a_recipe_have_strengths_and_places(parts):
    flux, _ = parts(64)
    looks = {"image": picture(1), "reference": [picture(5), picture(6)], "reference_size": "source"}

    def edited(**more):
        return recipes.kontext(flux, PROMPT, **looks, **OPTIONS, **more)

    plain, offset = edited(), edited(reference_method="offset")
    assert (offset - plain).abs().max() > 1e-3
    assert torch.equal(edited(reference_strength=[1, 1, 1.0]), plain)
    first, last = (edited(reference_strength=weights) for weights in ([0.2, 1, 1], [1, 1, 0.2]))
    assert min((first - plain).abs().max(), (last - plain).abs().max(), (first - last).abs().max()) > 1e-3
    with pytest.raises(FluxError, match="reference_strength has 2 values for 3 pictures"):
        edited(reference_strength=[1, 0.5])


def test_fill_of_the_part_around_the_mask(parts):
    flux, _ = parts(384)
    mask = Image.new("L", (120, 90))
    mask.paste(255, (60, 40, 80, 60))
    whole = picture(1, 120, 90)
    options = OPTIONS | {"output": "pil"}
    filled = recipes.fill(flux, PROMPT, image=whole, mask=mask, padding_mask_crop=8, **options)[0]
    changed = np.any(np.asarray(filled) != np.asarray(whole), axis=-1)
    assert filled.size == whole.size and changed[40:60, 60:80].any()
    changed[40:60, 60:80] = False
    assert not changed.any()


def test_pictures_of_several_sizes_are_seen_as_each_is():
    """None is squeezed into the shape of the first."""
    seen = []

    class Spy(Eyes):
        def pooled(self, images):
            seen.append(tuple(images.shape))
            return super().pooled(images)

    adapter = replace(ip_adapter(1), encoder=Spy())
    embedded = _embedded(adapter, [picture(1, 80, 56), picture(2, 30, 90)])
    assert seen == [(1, 56, 80, 3), (1, 90, 30, 3)] and embedded.shape == (1, 2, EMBED)


def test_a_range_without_a_step_is_told(parts, caplog):
    flux, every = parts(64)
    plain = drawn(flux, [], steps=4)
    for name, title in (("net", "the ControlNet"), ("picture", "the IP-Adapter adapter 1")):
        caplog.clear()
        idle = replace(every[name], start=0.3, end=0.6)
        assert torch.equal(drawn(flux, [idle], steps=4), plain)
        assert title in caplog.text and "none of the 4 steps lies wholly between 0.3 and 0.6" in caplog.text
        caplog.clear()
        drawn(flux, [replace(idle, end=0.8)], steps=4)
        assert "has no effect: none" not in caplog.text


def test_the_negative_prompt_may_be_a_conditioning(parts):
    flux, every = parts(64)
    words = Conditioning((flux.text.encode(NEGATIVE, max_tokens=16),))
    options = {"true_cfg_scale": 2.0, **OPTIONS}
    said = recipes.text_to_image(flux, PROMPT, negative_prompt=NEGATIVE, **options)
    assert torch.equal(recipes.text_to_image(flux, PROMPT, negative_prompt=words, **options), said)
    with_picture = words.plus(every["picture"])
    assert not torch.equal(recipes.text_to_image(flux, PROMPT, negative_prompt=with_picture, **options), said)
