"""Text to image against diffusers' FluxPipeline: same weights, same prompt, same generator."""

import pytest
import torch

from fluxcanvas.flux_runtime import FluxError, text_to_image
from fluxcanvas.flux_runtime.model import transformer as transformer_module
from fluxcanvas.flux_runtime.model import trunk

PROMPT, NEGATIVE = "a red house under a yellow moon", "blurry, dark"
SIZE = {"height": 64, "width": 96}
EXACT = 1e-5  # relative, float32


def rng(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def oracle(pipe, prompt=PROMPT, output_type="latent", steps=4, **options):
    options = {"guidance_scale": 3.5, "max_sequence_length": 24, **SIZE, **options}
    return pipe(prompt, num_inference_steps=steps, output_type=output_type, **options).images


def ours(flux, prompt=PROMPT, output="latent", steps=4, **options):
    options = {"guidance": 3.5, "max_sequence_length": 24, **SIZE, **options}
    return text_to_image(flux, prompt, steps=steps, output=output, **options)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"depth": 1, "depth_single": 1, "heads": 2, "head_dim": 16, "axes": (4, 6, 6)},
        {"depth": 3, "depth_single": 0, "heads": 3, "head_dim": 64, "axes": (8, 28, 28)},
        {"guidance": False, "dynamic": False, "shift": 1.0},
        {"dynamic": False, "shift": 2.5},
    ],
    ids=["plain", "narrow", "no single blocks", "schnell", "static shift"],
)
def test_latents_and_images(pair, relative, shape_of, change):
    pipe, flux = pair(shape_of(**change))
    latents = relative(ours(flux, generator=rng()), oracle(pipe, generator=rng()))
    images = relative(ours(flux, output="tensor", generator=rng()), oracle(pipe, output_type="pt", generator=rng()))
    assert latents < EXACT
    assert images < EXACT


def test_pil_pictures_are_equal_to_a_byte(pair):
    pipe, flux = pair()
    theirs, mine = oracle(pipe, output_type="pil", generator=rng())[0], ours(flux, output="pil", generator=rng())[0]
    assert mine.size == theirs.size == (96, 64)
    differing = sum(a != b for a, b in zip(mine.tobytes(), theirs.tobytes(), strict=True))
    assert differing <= 3, "only a value that lies on a rounding edge may differ"


def test_true_cfg_with_a_negative_prompt(pair, relative):
    pipe, flux = pair()
    options = {"negative_prompt": NEGATIVE, "true_cfg_scale": 3.0}
    mine = ours(flux, generator=rng(), **options)
    assert relative(mine, oracle(pipe, generator=rng(), **options)) < EXACT
    assert relative(mine, ours(flux, generator=rng())) > 0.01, "the negative prompt must matter"


def test_a_second_negative_prompt_goes_to_t5(pair, relative):
    pipe, flux = pair()
    options = {"negative_prompt": NEGATIVE, "negative_prompt_2": "a green boat", "true_cfg_scale": 3.0}
    mine = ours(flux, generator=rng(), **options)
    assert relative(mine, oracle(pipe, generator=rng(), **options)) < EXACT
    assert relative(mine, ours(flux, generator=rng(), **options | {"negative_prompt_2": None})) > 1e-4


def test_a_second_prompt_goes_to_t5(pair, relative):
    pipe, flux = pair()
    theirs = oracle(pipe, prompt_2="a green boat", generator=rng())
    assert relative(ours(flux, prompt_2="a green boat", generator=rng()), theirs) < EXACT


def test_several_pictures_of_several_prompts(pair, relative):
    pipe, flux = pair()
    prompts = [PROMPT, "a boat on the sea"]
    theirs = oracle(pipe, prompts, num_images_per_prompt=2, generator=rng())
    assert relative(ours(flux, prompts, images_per_prompt=2, generator=rng()), theirs) < EXACT


def test_a_list_of_generators_draws_each_picture_alone(pair, relative):
    pipe, flux = pair()
    theirs = oracle(pipe, num_images_per_prompt=2, generator=[rng(1), rng(2)])
    mine = ours(flux, images_per_prompt=2, generator=[rng(1), rng(2)])
    assert relative(mine, theirs) < EXACT
    assert relative(mine[1:], ours(flux, generator=rng(2))) < EXACT


def test_own_sigmas_are_shifted(pair, relative):
    pipe, flux = pair()
    sigmas = [1.0, 0.8, 0.5, 0.2]
    assert relative(ours(flux, sigmas=sigmas, generator=rng()), oracle(pipe, sigmas=sigmas, generator=rng())) < EXACT


def test_own_sigmas_may_begin_below_1_with_the_noise_as_it_is(pair, relative):
    pipe, flux = pair()
    sigmas = [0.9, 0.6, 0.2]
    assert relative(ours(flux, sigmas=sigmas, generator=rng()), oracle(pipe, sigmas=sigmas, generator=rng())) < EXACT


def test_given_latents_packed_or_not(pair, relative):
    pipe, flux = pair()
    noise = torch.randn(1, 16, 8, 12, generator=rng(8))
    packed = pipe._pack_latents(noise, 1, 16, 8, 12)
    theirs = oracle(pipe, latents=packed)
    assert relative(ours(flux, latents=packed), theirs) < EXACT
    assert relative(ours(flux, latents=noise), theirs) < EXACT


def test_odd_sizes_are_floored_and_told(pair, relative, caplog):
    pipe, flux = pair()
    size = {"height": 75, "width": 109}
    mine = ours(flux, output="tensor", generator=rng(), **size)
    assert mine.shape == (1, 3, 64, 96)
    assert "109x75 is not a multiple of 16; drawing 96x64" in caplog.text
    assert relative(mine, oracle(pipe, output_type="pt", generator=rng(), **size)) < EXACT


def test_bfloat16_latents_are_equal_to_the_bit(pair):
    pipe, flux = pair(dtype=torch.bfloat16)
    theirs = oracle(pipe, generator=rng())
    mine = ours(flux, generator=rng())
    assert mine.dtype == theirs.dtype == torch.bfloat16
    assert torch.equal(mine, theirs)


def test_timesteps_are_rounded_as_often_as_the_oracles(pair, shape_of):
    """Twice at 502 and 253, which a division and a product in bfloat16 change, and not before 1000 * 0.95."""
    pipe, flux = pair(shape_of(guidance=False, dynamic=False, shift=1.0), torch.bfloat16)
    sigmas = [1.0, 0.95, 0.502, 0.253]
    assert torch.equal(ours(flux, sigmas=sigmas, generator=rng()), oracle(pipe, sigmas=sigmas, generator=rng()))


def test_float16_latents_are_equal_to_the_bit(pair):
    pipe, flux = pair(dtype=torch.float16)
    options = {"negative_prompt": NEGATIVE, "true_cfg_scale": 2.5}
    assert torch.equal(ours(flux, generator=rng(), **options), oracle(pipe, generator=rng(), **options))


def test_a_guidance_beyond_float16_is_refused(pair):
    """The embedding reads 70000, which is infinite there: the oracle draws black."""
    _, flux = pair(dtype=torch.float16)
    with pytest.raises(FluxError, match="guidance of 70 is beyond what float16 holds; use less than 66"):
        ours(flux, guidance=70.0)


def test_a_bfloat16_batch_is_no_further_from_float32_than_the_oracles(pair, relative):
    """Not to the bit: one product for q, k and v adds up in another order than three, as soon as it is large."""
    options = {"prompt": [PROMPT, "a boat on the sea"]}
    exact = oracle(pair()[0], generator=rng(), num_images_per_prompt=2, **options)
    pipe, flux = pair(dtype=torch.bfloat16)
    theirs = relative(oracle(pipe, generator=rng(), num_images_per_prompt=2, **options), exact)
    assert relative(ours(flux, generator=rng(), images_per_prompt=2, **options), exact) <= 1.05 * theirs


def test_bfloat16_pictures_are_no_further_from_float32_than_the_oracles(pair, relative):
    exact = oracle(pair()[0], output_type="pt", generator=rng())
    pipe, flux = pair(dtype=torch.bfloat16)
    theirs = relative(oracle(pipe, output_type="pt", generator=rng()), exact)
    assert relative(ours(flux, output="tensor", generator=rng()), exact) <= 1.05 * theirs


def test_a_seed_is_a_cpu_generator(pair):
    _, flux = pair()
    assert torch.equal(ours(flux, seed=5), ours(flux, generator=rng(5)))
    assert not torch.equal(ours(flux, seed=5), ours(flux, seed=6))


def test_schnell_says_that_guidance_has_no_effect(pair, shape_of, caplog):
    _, flux = pair(shape_of(guidance=False, dynamic=False, shift=1.0))
    with_guidance = ours(flux, seed=1, guidance=7.0)
    assert "schnell has no guidance embedding: the guidance of 7 has no effect" in caplog.text
    assert torch.equal(with_guidance, ours(flux, seed=1, guidance=0.0))


def test_schnell_refuses_more_than_256_tokens(pair, shape_of):
    _, flux = pair(shape_of(guidance=False, dynamic=False, shift=1.0))
    with pytest.raises(FluxError, match="256"):
        ours(flux, max_sequence_length=257)


def _rows_last(latents):
    batch, channels, height, width = latents.shape
    patches = latents.reshape(batch, channels, height // 2, 2, width // 2, 2)
    return patches.permute(0, 2, 4, 3, 5, 1).reshape(batch, height * width // 4, channels * 4)


@pytest.mark.parametrize("planted", ["id order", "pack order", "shift", "half-swap", "guidance"])
def test_a_planted_error_is_noticed(pair, relative, monkeypatch, planted):
    """The tests above must be able to fail: each of these faults moves the result far beyond their tolerance."""
    from fluxcanvas.flux_runtime import generate, layout
    from fluxcanvas.flux_runtime.schedule import Schedule

    pipe, flux = pair()
    theirs = oracle(pipe, generator=rng())
    if planted == "id order":
        plain = layout.canvas_ids
        monkeypatch.setattr(layout, "canvas_ids", lambda *at: plain(*at)[:, [0, 2, 1]])
    elif planted == "pack order":
        monkeypatch.setattr(generate, "pack", _rows_last)
    elif planted == "shift":
        monkeypatch.setattr(Schedule, "mu", lambda self, tokens: 1.15)
    elif planted == "half-swap":
        plain = transformer_module.modulated_norm
        monkeypatch.setattr(transformer_module, "modulated_norm", lambda x, a, b: plain(x, b, a))
    else:
        monkeypatch.setattr(generate, "_guidance", lambda *_: 3.6)
    assert relative(ours(flux, generator=rng()), theirs) > 1e-3


def test_unrounded_guidance_is_noticed_in_bfloat16(pair, relative, monkeypatch):
    """3.5 reads 3504 in bfloat16; an embedding of 3500 is another picture."""
    pipe, flux = pair(dtype=torch.bfloat16)
    theirs = oracle(pipe, generator=rng())
    plain = trunk.sinusoid

    def unrounded(value, dtype):
        is_guidance = value.ndim == 0
        return plain(torch.tensor(3500.0) if is_guidance else value, dtype)

    monkeypatch.setattr(trunk, "sinusoid", unrounded)
    assert not torch.equal(ours(flux, generator=rng()), theirs)
