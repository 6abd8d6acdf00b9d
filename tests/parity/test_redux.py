"""Redux against diffusers' prior pipeline, alone and as the prompt of a picture; and what it does beyond that."""

import copy
import math

import numpy as np
import pytest
import torch
from PIL import Image

from fluxcanvas.flux_runtime import FluxError, load_adapter, recipes
from fluxcanvas.flux_runtime.adapters import Redux
from fluxcanvas.flux_runtime.model.adapters import ReduxEncoder

PROMPT = "a red house under a yellow moon"
EXACT = 1e-5  # relative, float32
SIZE = {"height": 64, "width": 96}
WIDTH, CONTEXT, IMAGE_TOKENS = 32, 32, 9  # of the tiny SigLIP, of the models of `pair`, and 3x3 patches


def rng(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(seed: int, width: int = 80, height: int = 56) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def draw(flux, conditioning, **options):
    return recipes.text_to_image(
        flux, conditioning, steps=4, guidance=3.5, generator=rng(), output="latent", **SIZE, **options
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """FLUX.1 Redux in its folder, tiny: image_encoder, image_embedder, feature_extractor."""
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(6)
    root = tmp_path_factory.mktemp("redux")
    config = SiglipVisionConfig(hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=2, num_attention_heads=4,
                                image_size=42, patch_size=14)  # fmt: skip
    encoder, embedder = SiglipVisionModel(config), ReduxImageEncoder(WIDTH, CONTEXT)
    for module, spread in ((encoder, 0.2), (embedder, 0.3)):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter, std=spread)
    encoder.save_pretrained(root / "image_encoder")
    embedder.save_pretrained(root / "image_embedder")
    SiglipImageProcessorPil(size={"height": 42, "width": 42}).save_pretrained(root / "feature_extractor")
    return root


@pytest.fixture(scope="module")
def redux(folder):
    return load_adapter(folder, device="cpu", dtype="fp32")


@pytest.fixture(scope="module")
def prior(folder, pair):
    """The oracle, with the text encoders of `pair`'s model or without."""
    from diffusers import FluxPriorReduxPipeline
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder
    from transformers import SiglipImageProcessorPil, SiglipVisionModel

    eyes = SiglipVisionModel.from_pretrained(folder / "image_encoder").eval()
    processor = SiglipImageProcessorPil.from_pretrained(folder / "feature_extractor")
    embedder = ReduxImageEncoder.from_pretrained(folder / "image_embedder").eval()
    parts = {n: getattr(pair()[0], n) for n in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")}

    def get(text: bool = True, embedder=embedder):
        own = parts if text else dict.fromkeys(parts)
        return FluxPriorReduxPipeline(image_encoder=eyes, feature_extractor=processor, image_embedder=embedder, **own)

    return get


def tokens(conditioning):
    return torch.cat([p.tokens for p in conditioning.prompts], dim=1), conditioning.prompts[0].pooled


CASES = {
    "one": ([1], {}, {}),
    "scaled": (
        [1],
        {"prompt_embeds_scale": 0.6, "pooled_prompt_embeds_scale": 0.3},
        {"scale": 0.6, "pooled_scale": 0.3},
    ),
    "two": ([1, 2], {}, {}),
    "two scaled": (
        [1, 2],
        {"prompt_embeds_scale": [0.7, 0.5], "pooled_prompt_embeds_scale": [1.0, 0.2]},
        {"scale": [0.7, 0.5], "pooled_scale": [1.0, 0.2]},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_with_text(pair, prior, redux, relative, case):
    pipe, flux = pair()
    seeds, theirs, mine = CASES[case]
    images = [picture(i, 80 // i, 56 * i) for i in seeds]  # each of its own shape
    expected = prior()(image=images, prompt=[PROMPT] * len(images), **theirs)
    got = recipes.redux_prior(flux, PROMPT, adapter=redux, image=images, **mine)
    have, pooled = tokens(got)
    assert relative(have, expected.prompt_embeds) < EXACT and relative(pooled, expected.pooled_prompt_embeds) < EXACT
    options = {"num_inference_steps": 4, "guidance_scale": 3.5, "output_type": "latent", **SIZE}
    drawn = pipe(**expected, generator=rng(), **options).images
    assert relative(draw(flux, got), drawn) < EXACT


def test_a_prompt_for_each_picture(pair, prior, redux, relative):
    images, prompts = [picture(1), picture(2)], [PROMPT, "a boat at sea"]
    expected = prior()(image=images, prompt=prompts)
    have, pooled = tokens(recipes.redux_prior(pair()[1], prompts, adapter=redux, image=images))
    assert relative(have, expected.prompt_embeds) < EXACT and relative(pooled, expected.pooled_prompt_embeds) < EXACT


def test_without_text_encoders(prior, redux, relative):
    """diffusers' zeros have the width of FLUX.1's own text, so the embedder must."""
    from diffusers.pipelines.flux.modeling_flux import ReduxImageEncoder

    torch.manual_seed(7)
    theirs, ours = ReduxImageEncoder(WIDTH, 4096), ReduxEncoder(WIDTH, 4096)
    ours.load_state_dict(theirs.state_dict())
    expected = prior(text=False, embedder=theirs)(image=[picture(1), picture(2)])
    mine = recipes.redux_prior(None, adapter=Redux(ours, redux.encoder, "wide"), image=[picture(1), picture(2)])
    have, pooled = tokens(mine)
    assert relative(have, expected.prompt_embeds) < EXACT
    assert torch.equal(pooled, expected.pooled_prompt_embeds) and have.shape == (1, 512 + IMAGE_TOKENS, 4096)


def test_ways_to_combine_pictures(pair, redux):
    _, flux = pair()
    images = [picture(1), picture(2)]

    def prior(**options):
        return recipes.redux_prior(flux, PROMPT, adapter=redux, image=images, max_sequence_length=24, **options)

    (summed, sums), (words, means), (_, joined) = (prior(combine=c).prompts for c in ("sum", "average", "join"))
    torch.testing.assert_close(means.tokens * 2, sums.tokens)
    torch.testing.assert_close(summed.tokens, words.tokens * 2)
    assert joined.tokens.shape == (1, 2 * IMAGE_TOKENS, CONTEXT)
    torch.testing.assert_close(joined.tokens[:, :IMAGE_TOKENS] + joined.tokens[:, IMAGE_TOKENS:], sums.tokens)
    (_, thin) = prior(downsample=3).prompts
    torch.testing.assert_close(thin.tokens, sums.tokens.mean(1, keepdim=True))


def test_strengths_weigh_the_attention(pair, redux):
    _, flux = pair()

    def drawn(**strengths):
        options = {"adapter": redux, "image": picture(1), "max_sequence_length": 24, **strengths}
        return draw(flux, recipes.redux_prior(flux, PROMPT, **options))

    plain, weak = drawn(), drawn(image_strength=0.3)
    assert torch.equal(drawn(image_strength=1.0, text_strength=1.0), plain)
    assert not torch.allclose(weak, plain) and not torch.allclose(drawn(text_strength=0.3), weak)
    nothing = drawn(image_strength=0.0)
    assert math.isfinite(nothing.sum()) and not torch.allclose(nothing, plain)


def test_refusals(pair, redux):
    _, flux = pair()
    for options, words in [
        ({"scale": [1.0, 2.0]}, "2 scales were given for 1 pictures"),
        ({"downsample": 4}, "9 image tokens cannot be thinned out by 4"),
        ({"image_strength": -1.0}, "strength of -1.0"),
    ]:
        with pytest.raises(FluxError, match=words):
            conditioning = recipes.redux_prior(flux, PROMPT, adapter=redux, image=picture(1), **options)
            draw(flux, conditioning)


def test_a_region_says_where_the_pictures_count(pair, redux):
    _, flux = pair()
    half = Image.new("L", (60, 40))
    half.paste(255, (0, 0, 30, 40))
    options = {"adapter": redux, "image": picture(1), "max_sequence_length": 24}

    def drawn(region):
        return draw(flux, recipes.redux_prior(flux, PROMPT, region=region, **options))

    everywhere, left = drawn(Image.new("L", (8, 8), 255)), drawn(half)
    torch.testing.assert_close(everywhere, drawn(None), rtol=1e-4, atol=1e-4)
    assert torch.equal(left, drawn(np.asarray(half))) and not torch.allclose(left, everywhere)
    with pytest.raises(FluxError, match="the region's mask is black everywhere"):
        drawn(Image.new("L", (8, 8)))
    with pytest.raises(FluxError, match="a region is one mask, and 2 were given"):
        drawn([half, half])


def test_bfloat16_is_no_further_from_float32_than_the_oracle(pair, prior, folder, relative):
    exact = prior()(image=picture(1), prompt=PROMPT).prompt_embeds
    rounded = [copy.deepcopy(getattr(prior(), name)).bfloat16() for name in ("image_encoder", "image_embedder")]
    pipe, flux = pair(dtype=torch.bfloat16)
    parts = {n: getattr(pipe, n) for n in ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")}
    half = type(prior())(image_encoder=rounded[0], image_embedder=rounded[1],
                         feature_extractor=prior().feature_extractor, **parts)  # fmt: skip
    allowed = relative(half(image=picture(1), prompt=PROMPT).prompt_embeds.float(), exact)
    redux = load_adapter(folder, device="cpu", dtype="bf16")
    have, _ = tokens(recipes.redux_prior(flux, PROMPT, adapter=redux, image=picture(1)))
    assert relative(have.float(), exact) <= 1.05 * allowed
