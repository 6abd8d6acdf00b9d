"""Drawing with the demo model through `sample`: ranges, masks, seeds, and what a watcher sees."""

from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fluxcanvas.flux_runtime import (
    Conditioning,
    FluxError,
    Prompt,
    make_noise,
    preview_image,
    recipes,
    sample,
    to_tensor,
)
from fluxcanvas.flux_runtime.conditioning import combine
from fluxcanvas.flux_runtime.conditions import Reference
from fluxcanvas.flux_runtime.layout import unpack
from fluxcanvas.flux_runtime.pictures import Encoded
from fluxcanvas.flux_runtime.regions import within

SHAPE = (1, 16, 16, 16)


@pytest.fixture(scope="module")
def prompt(demo):
    return Conditioning((demo.text.encode("a red house under a yellow moon"),))


def draw(demo, prompt, **options):
    options = {"latents": torch.zeros(SHAPE), "noise": make_noise(SHAPE, 1), "steps": 4, **options}
    return sample(demo.model, prompt, **options)


def test_a_run_in_two_parts_is_the_whole_run(demo, prompt):
    whole = draw(demo, prompt)
    begun = draw(demo, prompt, end=0.5)
    finished = draw(demo, prompt, latents=begun, noise=None, start=0.5)
    assert torch.allclose(finished, whole, atol=1e-4)
    assert not torch.allclose(begun, whole, atol=0.1)


def test_a_mask_keeps_the_rest_of_the_source(demo, prompt):
    source = make_noise(SHAPE, 7)
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., 64:] = 1
    drawn = draw(demo, prompt, latents=source, noise_mask=mask)
    assert torch.allclose(drawn[..., :8], source[..., :8], atol=1e-5)
    assert not torch.allclose(drawn[..., 8:], source[..., 8:], atol=0.1)


def test_a_later_start_keeps_more_of_the_source(demo, prompt):
    source = demo.model.latent.to_raw(make_noise(SHAPE, 7) * 0.1)
    far = [(draw(demo, prompt, latents=source, start=start, steps=8) - source).norm() for start in (0.25, 0.5, 0.75)]
    assert far[0] > far[1] > far[2]


def test_nothing_given_is_changed(demo, prompt):
    latents, noise = torch.zeros(SHAPE), make_noise(SHAPE, 1)
    before = latents.clone(), noise.clone(), prompt.prompts[0].tokens.clone()
    draw(demo, prompt, latents=latents, noise=noise)
    assert all(torch.equal(a, b) for a, b in zip(before, (latents, noise, prompt.prompts[0].tokens), strict=True))


def test_one_seed_draws_a_batch_and_a_list_each_picture():
    assert torch.equal(make_noise((2, 16, 4, 4), [3, 5])[1:], make_noise((1, 16, 4, 4), 5))
    assert not torch.equal(make_noise((2, 16, 4, 4), 3)[0], make_noise((2, 16, 4, 4), 3)[1])
    with pytest.raises(FluxError, match="3 seeds cannot draw 2"):
        make_noise((2, 16, 4, 4), [1, 2, 3])


def test_a_watcher_sees_latents_that_become_the_picture(demo, prompt):
    seen = []
    final = draw(demo, prompt, watch=lambda step, x, clean: seen.append((step, clean)))
    assert [step.index for step, _ in seen] == [0, 1, 2, 3]
    assert seen[-1][1].shape == SHAPE
    assert torch.allclose(demo.model.latent.to_raw(seen[-1][1]), final, atol=1e-4)
    preview = preview_image(demo.vae, seen[-1][1])
    assert preview.size == (256, 256)
    picture, look = demo.vae.decode(final).mean((0, 1, 2)), to_tensor(preview).mean((0, 1, 2))
    assert (picture - look).abs().max() < 0.15, "the preview has the picture's colours"


def test_a_batch_shares_one_prompt_or_divides_several(demo, prompt):
    latents, noise = torch.zeros(2, *SHAPE[1:]), make_noise((2, *SHAPE[1:]), [1, 2])
    both = draw(demo, prompt, latents=latents, noise=noise)
    alone = draw(demo, prompt, noise=make_noise(SHAPE, [2]))
    assert torch.allclose(both[1:], alone, atol=1e-4)
    three = Conditioning((demo.text.encode(["a", "b", "c"]),))
    with pytest.raises(FluxError, match="3 prompts cannot be shared out among 2"):
        draw(demo, three, latents=latents, noise=noise)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.zeros(1, 4, 16, 16)}, "latents of shape"),
        ({"latents": torch.zeros(1, 16, 15, 16), "noise": torch.zeros(1, 16, 15, 16)}, "15x16 cannot be packed"),
        ({"start": 0.9, "end": 0.2}, "denoise range"),
        ({"steps": 0}, "at least 1"),
        ({"noise": None, "noise_mask": torch.ones(1, 1, 8, 8)}, "needs fresh noise"),
        ({"latents": None, "noise_mask": torch.ones(1, 1, 8, 8)}, "give its latents"),
        ({"latents": None, "noise": None}, "nothing to draw from"),
        ({"noise": torch.zeros(1, 16, 8, 8)}, r"noise of shape \(1, 16, 8, 8\) does not fit"),
        ({"guidance": float("nan")}, "guidance of nan"),
        ({"latents": torch.full(SHAPE, torch.nan), "start": 0.5}, "dev model made numbers that are not finite"),
    ],
    ids=[
        "channels",
        "odd",
        "range",
        "steps",
        "mask without noise",
        "mask without latents",
        "nothing",
        "noise of another size",
        "guidance",
        "not finite",
    ],
)
def test_what_cannot_be_drawn_says_why(demo, prompt, change, message):
    with pytest.raises(FluxError, match=message):
        draw(demo, prompt, **change)


@pytest.mark.parametrize("shape", [(1, 4, 16, 16), (16, 16, 16), (1, 16, 0, 16)])
def test_what_a_vae_cannot_decode_says_so(demo, shape):
    with pytest.raises(FluxError, match=r"decodes latents of shape \(batch, 16, height, width\)"):
        demo.vae.decode(torch.zeros(shape))


def test_a_vae_that_overflows_says_so_instead_of_showing_black(demo):
    with pytest.raises(FluxError, match="the VAE made numbers that are not finite, in "):
        demo.vae.decode(torch.full(SHAPE, torch.inf))


def test_a_negative_prompt_may_ask_for_a_guidance_of_its_own(demo, prompt):
    def drawn(own, **options):
        return draw(demo, prompt, negative=replace(prompt, guidance=own), true_cfg_scale=2.0, steps=2, **options)

    assert torch.equal(drawn(None), drawn(demo.model.variant.guidance))
    assert not torch.equal(drawn(None), drawn(1.5))
    assert torch.equal(drawn(None, guidance=2.0), drawn(1.5, guidance=2.0)), "the run's own guidance is for both"


def test_text_of_another_model_says_so(demo):
    other = Conditioning((Prompt(torch.zeros(1, 4, 4096), torch.zeros(1, 768)),))
    with pytest.raises(FluxError, match="text encoders that belong to the model"):
        draw(demo, other)


def test_an_empty_conditioning_says_so(demo):
    with pytest.raises(FluxError, match="holds no prompt"):
        draw(demo, Conditioning(()))


def test_true_cfg_without_both_of_its_halves_says_so(demo, prompt, caplog):
    draw(demo, prompt, negative=prompt, steps=1)
    assert "negative prompt has no effect at a true_cfg_scale of 1" in caplog.text
    caplog.clear()
    draw(demo, prompt, true_cfg_scale=2.0, steps=1)
    assert "true_cfg_scale of 2 has no effect without a negative prompt" in caplog.text
    caplog.clear()
    draw(demo, prompt, negative=prompt, true_cfg_scale=2.0, steps=1)
    draw(demo, prompt, steps=1)
    assert not caplog.text


def test_a_random_seed_leaves_the_generator_of_others_alone(demo):
    torch.manual_seed(11)
    before = torch.get_rng_state()
    one, other = (recipes.text_to_image(demo, "a tree", steps=1, output="latent") for _ in range(2))
    assert not torch.equal(one, other)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"negative_prompt_2": "blur"}, "goes with a negative_prompt"),
        ({"negative_prompt": Conditioning(()), "negative_prompt_2": "blur"}, "encoded already"),
        ({"seed": 1, "generator": torch.Generator()}, "give one of them"),
    ],
    ids=["half a negative", "words for tokens", "two sources of noise"],
)
def test_an_option_that_would_have_no_effect_is_refused(demo, options, message):
    with pytest.raises(FluxError, match=message):
        recipes.text_to_image(demo, "a tree", **options)


def test_no_picture_at_all_is_refused(demo):
    with pytest.raises(FluxError, match="0 images per prompt draw nothing"):
        recipes.text_to_image(demo, "a tree", images_per_prompt=0)


def test_three_pictures_for_two_are_refused_before_anything_is_drawn(demo):
    generators = [torch.Generator().manual_seed(n) for n in (1, 2)]
    with pytest.raises(FluxError, match="3 pictures cannot be shared out among 2"):
        recipes.image_to_image(
            demo, "a tree", image=torch.rand(3, 64, 64, 3), images_per_prompt=2, generator=generators
        )


@pytest.mark.parametrize("white", [slice(0, 0), slice(1, 4)], ids=["black", "too small for a latent"])
def test_a_mask_that_marks_no_latent_is_refused(demo, prompt, white):
    mask = torch.zeros(1, 1, 128, 128)
    mask[..., white, white] = 1
    with pytest.raises(FluxError, match="marks nothing at the latents' 16x16"):
        draw(demo, prompt, noise_mask=mask)


def test_a_soft_mask_in_a_recipe_redraws_greys_later(demo):
    picture = demo.vae.decode(torch.zeros(SHAPE))
    ramp = torch.linspace(0, 1, 128).expand(1, 128, 128)
    options = {"image": picture, "mask": ramp, "strength": 1.0, "steps": 4, "width": 128, "height": 128, "seed": 1}

    def drawn(**more):
        tokens = recipes.inpaint(demo, "a red house", output="latent", **options, **more)
        return unpack(tokens, 16, 16)

    hard, soft, source = drawn(), drawn(soft_mask=True), demo.model.latent.to_model(demo.vae.encode(picture))
    change = [(latents - source).abs().mean((0, 1, 2)) for latents in (hard, soft)]  # by column
    assert change[0][7] < 0.3 * change[0][8], "a hard mask has an edge where the ramp reaches a half"
    assert 0.3 * change[0][8:].mean() < change[1][6:8].mean(), "a soft one redraws darker greys, too"
    assert change[1][0] < 0.3 * change[1][12:].mean()


class Waits(TorchDispatchMode):
    """Counts what would make a GPU wait for the CPU: numbers read out of tensors, and shapes that hang on them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select"):
            self.seen.append(name)
        return function(*args, **kwargs or {})


def test_no_step_waits_for_the_device(demo, prompt):
    """All that a step needs to know of its noise level is known before the run begins."""
    region = torch.zeros(16, 16)
    region[:, :8] = 1
    conditions = (Reference(Encoded(make_noise(SHAPE, 3)), 128, 128, strength=0.5),)
    told = combine(prompt, within(prompt, region)).plus(*conditions)
    mask = torch.ones(1, 1, 16, 16)
    options = {"negative": prompt, "true_cfg_scale": 2.0, "noise_mask": mask, "latents": make_noise(SHAPE, 7)}
    counts = []
    for steps in (1, 4):
        with Waits() as waits:
            draw(demo, told, steps=steps, **options)
        counts.append(len(waits.seen))
    assert counts[0] > 0, "the check of the result, at the end, does wait"
    assert counts[0] == counts[1]
