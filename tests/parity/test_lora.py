"""LoRAs against diffusers: the same file loaded by both, the same latents; and the model afterwards as before."""

import copy

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from fluxcanvas.flux_runtime import FluxError, load_lora, recipes
from fluxcanvas.flux_runtime.lora.stack import LoraStack, parse_factors

pytest.importorskip("peft", reason="diffusers loads LoRAs through peft, which the test extra installs")

SIZE = {"height": 64, "width": 96}
EXACT = 1e-5
WIDTH, TEXT = 128, 32  # of the tiny transformer and its text encoders
DOUBLE, SINGLE = "transformer.transformer_blocks", "transformer.single_transformer_blocks"
LAYERS = {  # diffusers' name -> (out, in)
    "transformer.context_embedder": (WIDTH, TEXT),
    "transformer.time_text_embed.guidance_embedder.linear_2": (WIDTH, WIDTH),
    f"{DOUBLE}.0.norm1.linear": (6 * WIDTH, WIDTH),
    f"{DOUBLE}.0.attn.to_q": (WIDTH, WIDTH),
    f"{DOUBLE}.0.attn.to_v": (WIDTH, WIDTH),
    f"{DOUBLE}.1.attn.add_k_proj": (WIDTH, WIDTH),
    f"{DOUBLE}.1.attn.to_out.0": (WIDTH, WIDTH),
    f"{DOUBLE}.1.ff.net.0.proj": (4 * WIDTH, WIDTH),
    f"{DOUBLE}.0.ff_context.net.2": (WIDTH, 4 * WIDTH),
    f"{SINGLE}.0.attn.to_k": (WIDTH, WIDTH),
    f"{SINGLE}.1.proj_mlp": (4 * WIDTH, WIDTH),
    f"{SINGLE}.2.proj_out": (WIDTH, 5 * WIDTH),
    "transformer.norm_out.linear": (2 * WIDTH, WIDTH),
    "transformer.proj_out": (64, WIDTH),
}
CLIP_LAYERS = {"text_encoder.text_model.encoder.layers.1.self_attn.q_proj": (TEXT, TEXT)}


def low_rank(layers: dict, rank: int, seed: int, *, alpha: float | None = None, bias: bool = False) -> dict:
    """A PEFT state dict of random factors, strong enough to change every picture."""
    rng = torch.Generator().manual_seed(seed)
    state = {}
    for name, (out, into) in layers.items():
        state[f"{name}.lora_A.weight"] = torch.randn(rank, into, generator=rng) * 0.1
        state[f"{name}.lora_B.weight"] = torch.randn(out, rank, generator=rng) * 0.1
        if bias:
            state[f"{name}.lora_B.bias"] = torch.randn(out, generator=rng) * 0.1
        if alpha is not None:
            state[f"{name}.alpha"] = torch.tensor(alpha)
    return state


def control_lora(seed: int) -> dict:
    """Like FLUX.1 Canny as a LoRA: a wide input layer, biases, and the norms of a block set anew."""
    rng = torch.Generator().manual_seed(seed)
    state = low_rank({"transformer.x_embedder": (WIDTH, 128), **LAYERS}, 4, seed, bias=True)
    for name in ("norm_q", "norm_added_k"):
        state[f"{DOUBLE}.0.attn.{name}.weight"] = 1 + torch.randn(32, generator=rng) * 0.2
    state[f"{SINGLE}.1.attn.norm_k.weight"] = 1 + torch.randn(32, generator=rng) * 0.2
    return {name: tensor for name, tensor in state.items() if "norm_out" not in name}


@pytest.fixture
def lora(tmp_path):
    """`lora(state, name="one")` -> the LoRA as our reader gives it from a file."""

    def make(state: dict, name: str = "one"):
        path = tmp_path / f"{name}.safetensors"
        save_file(state, path)
        return load_lora(path)

    return make


def draw(recipe, flux, **options):
    options = {"steps": 3, "guidance": 3.5, "max_sequence_length": 24, "output": "latent", **SIZE, **options}
    return recipe(flux, "a red house under a yellow moon", generator=torch.Generator().manual_seed(3), **options)


def both(pipe, name: str, states: dict, weights: list[float], oracle, **options):
    """diffusers' latents with adapters loaded; the pipeline is left as it was."""
    import diffusers

    parts = {k: copy.deepcopy(v) for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    other = getattr(diffusers, name)(**parts)
    for adapter, state in states.items():
        other.load_lora_weights(dict(state), adapter_name=adapter)
    other.set_adapters(list(states), weights)
    return oracle(other, name, steps=3, **SIZE, **options)


@pytest.mark.parametrize("alpha", [None, 2.0], ids=["without alpha", "alpha 2"])
@pytest.mark.parametrize("mode", ["beside", "merged", "auto"])
def test_one_lora(pair, relative, oracle, lora, alpha, mode):
    pipe, flux = pair()
    state = low_rank(LAYERS, 4, 1, alpha=alpha)
    expected = both(pipe, "FluxPipeline", {"one": state}, [0.8], oracle)
    plain = draw(recipes.text_to_image, flux)
    got = draw(recipes.text_to_image, flux.with_loras(lora(state), 0.8, mode))
    assert relative(got, expected) < EXACT < 0.01 < relative(plain, expected)
    assert torch.equal(draw(recipes.text_to_image, flux), plain), "the LoRA left a trace"


def test_the_text_encoder_part(pair, relative, oracle, lora):
    pipe, flux = pair()
    state = low_rank(LAYERS, 4, 1) | low_rank(CLIP_LAYERS, 4, 2)
    expected = both(pipe, "FluxPipeline", {"one": state}, [1.0], oracle)
    got = draw(recipes.text_to_image, flux.with_loras(lora(state)))
    without = draw(recipes.text_to_image, flux.with_loras(LoraStack().plus(lora(state), 1.0, text_weight=0.0)))
    assert relative(got, expected) < EXACT < relative(without, expected)


def test_two_loras_with_their_weights(pair, relative, oracle, lora):
    pipe, flux = pair()
    states = {"one": low_rank(LAYERS, 4, 1), "two": low_rank(dict(list(LAYERS.items())[::2]), 7, 5, alpha=3.0)}
    expected = both(pipe, "FluxPipeline", states, [0.6, -1.2], oracle)
    stack = LoraStack().plus(lora(states["one"]), 0.6).plus(lora(states["two"], "two"), -1.2)
    assert relative(draw(recipes.text_to_image, flux.with_loras(stack)), expected) < EXACT


def test_weights_by_block(pair, relative, oracle, lora):
    pipe, flux = pair()
    state = low_rank(LAYERS, 4, 1)
    import diffusers

    parts = {k: copy.deepcopy(v) for k, v in pipe.components.items() if k not in ("image_encoder", "feature_extractor")}
    other = diffusers.FluxPipeline(**parts)
    other.load_lora_weights(dict(state), adapter_name="one")
    # The first that fits counts, and every layer must be named: diffusers fails on names of three parts otherwise.
    weights = {"single_transformer_blocks.0": 0.0, "single": 1.0, "transformer_blocks.0": 0.3, "": 1.0}
    other.transformer.set_adapters(["one"], [weights])
    expected = oracle(other, "FluxPipeline", steps=3, **SIZE)
    factors = parse_factors("transformer_blocks.0: 0.3\nsingle_transformer_blocks.0: 0")
    stack = LoraStack().plus(lora(state), factors=factors)
    assert relative(draw(recipes.text_to_image, flux.with_loras(stack)), expected) < EXACT


@pytest.mark.parametrize("turbo", [False, True], ids=["alone", "with a turbo LoRA"])
def test_a_control_lora_widens_the_model_and_leaves_it_narrow(pair, relative, oracle, lora, turbo):
    pipe, flux = pair()
    states, weights = {"depth": control_lora(1)}, [0.85]
    if turbo:
        states["hyper-sd"], weights = low_rank(LAYERS, 6, 9, alpha=6.0), [0.85, 0.125]
    picture = Image.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 30).convert("RGB")
    expected = both(pipe, "FluxControlPipeline", states, weights, oracle, control_image=picture)
    stack = LoraStack()
    for (name, state), weight in zip(states.items(), weights, strict=True):
        stack = stack.plus(lora(state, name), weight)
    plain = draw(recipes.text_to_image, flux)
    got = draw(recipes.control, flux.with_loras(stack), control_image=picture)
    assert relative(got, expected) < EXACT
    assert flux.model.params.in_channels == 64 and flux.transformer.img_in.in_features == 64
    assert torch.equal(draw(recipes.text_to_image, flux), plain), "the control LoRA left a trace"
    with pytest.raises(FluxError, match="control image"):
        draw(recipes.text_to_image, flux.with_loras(stack))


def test_a_turbo_lora_of_the_canvas_alone_on_a_fill_model(pair, relative, oracle, lora, shape_of, mask):
    """Its input layer reads the 64 channels of the canvas; the model's reads 320 more."""
    pipe, flux = pair(shape_of(in_channels=384))
    state = low_rank({"transformer.x_embedder": (WIDTH, 64), **LAYERS}, 6, 9, alpha=6.0)
    picture = Image.effect_mandelbrot((96, 64), (-2, -1, 1, 1), 30).convert("RGB")
    expected = both(pipe, "FluxFillPipeline", {"one": state}, [0.125], oracle, image=picture, mask_image=mask)
    for mode in ("beside", "merged"):
        got = draw(recipes.fill, flux.with_loras(lora(state), 0.125, mode), image=picture, mask=mask)
        assert relative(got, expected) < EXACT < relative(draw(recipes.fill, flux, image=picture, mask=mask), expected)


def test_an_error_in_a_run_leaves_no_trace(pair, lora):
    _, flux = pair()
    plain = draw(recipes.text_to_image, flux)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(recipes.text_to_image, flux.with_loras(lora(low_rank(LAYERS, 4, 1))), watch=stop)
    assert torch.equal(draw(recipes.text_to_image, flux), plain)
