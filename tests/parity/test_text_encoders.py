"""Prompts against diffusers' FluxPipeline.encode_prompt: tiny CLIP and T5, the real tokenizers, equal to the bit."""

import pytest
import torch
from safetensors.torch import save_file

from fluxcanvas.flux_runtime import FluxError, load_parts

PROMPTS = [
    "a red house under a yellow moon",
    "",
    "  Größe,   naïve café — 東京 🦊\n\tnew line  ",
    "an <|endoftext|> inside, </s> and <extra_id_0> <pad>",
    "very long " * 120,
]


def text_encoders(shared):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizerFast, T5Config, T5EncoderModel, T5TokenizerFast

    torch.manual_seed(1)
    clip = CLIPTextConfig(
        vocab_size=49408, hidden_size=64, intermediate_size=80, num_hidden_layers=2, num_attention_heads=1,
        hidden_act="quick_gelu", bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=32128, d_model=48, d_kv=8, d_ff=56, num_layers=2, num_heads=4, feed_forward_proj="gated-gelu"
    )
    return {
        "text_encoder": CLIPTextModel(clip).eval(),
        "text_encoder_2": T5EncoderModel(t5).eval(),
        "tokenizer": CLIPTokenizerFast.from_pretrained(shared / "tokenizers" / "clip", model_max_length=77),
        "tokenizer_2": T5TokenizerFast.from_pretrained(shared / "tokenizers" / "t5"),
    }


@pytest.fixture(scope="module")
def sides(shared, tmp_path_factory):
    """diffusers' pipeline with text encoders alone, and ours from bare files in the form people have."""
    from diffusers import FluxPipeline

    from fluxcanvas.flux_runtime.model.transformer import FluxTransformer
    from fluxcanvas.flux_runtime.variants import FluxParams

    folder, parts = tmp_path_factory.mktemp("text"), text_encoders(shared)
    sizes = FluxParams(
        64, 64, 64, 48, hidden_size=32, num_heads=1, mlp_hidden=32, depth=1, depth_single=1, axes_dim=(4, 14, 14)
    )
    save_file(FluxTransformer(sizes).state_dict(), folder / "flux1-dev.safetensors")
    save_file(parts["text_encoder"].state_dict(), folder / "clip_l.safetensors")
    t5 = {n: t for n, t in parts["text_encoder_2"].state_dict().items() if n != "encoder.embed_tokens.weight"}
    save_file(t5, folder / "t5xxl.safetensors")
    pipe = FluxPipeline(scheduler=None, vae=None, transformer=None, **parts)
    files = {"transformer": "flux1-dev", "clip": "clip_l", "t5": "t5xxl"}
    paths = {kind: folder / f"{name}.safetensors" for kind, name in files.items()} | {"vae": None}
    return pipe, lambda **options: load_parts(**paths, tokenizers=shared / "tokenizers", device="cpu", **options).text


@pytest.mark.parametrize("prompt", PROMPTS, ids=["plain", "empty", "foreign signs", "special tokens", "too long"])
@pytest.mark.parametrize("tokens", [None, 24])
def test_one_prompt(sides, prompt, tokens):
    pipe, load = sides
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt(prompt, None, max_sequence_length=tokens or 512)
    ours = load().encode(prompt, max_tokens=tokens)
    assert torch.equal(ours.tokens, embeds) and torch.equal(ours.pooled, pooled)


def test_lists_and_second_prompts(sides):
    pipe, load = sides
    first, second = PROMPTS[:2], ["a boat", "two boats"]
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt(first, second, max_sequence_length=40)
    ours = load().encode(first, second, max_tokens=40)
    assert torch.equal(ours.tokens, embeds) and torch.equal(ours.pooled, pooled)
    alone = load().encode(first, "a boat", max_tokens=40)
    assert torch.equal(alone.tokens[0], ours.tokens[0]) and not torch.equal(alone.tokens[1], ours.tokens[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(sides, dtype):
    """diffusers' side is cast as transformers' from_pretrained casts: `wo` stays float32 in float16."""
    pipe, load = sides
    ours = load(dtype=dtype).encode(PROMPTS[0], max_tokens=24)
    clip, t5 = (module.to(dtype) for module in (pipe.text_encoder, pipe.text_encoder_2))
    try:
        if dtype == torch.float16:
            for block in t5.encoder.block:
                block.layer[1].DenseReluDense.wo.float()
        reference = load()  # the float32 weights, for what casting twice would lose
        with torch.no_grad():
            embeds, pooled, _ = pipe.encode_prompt(PROMPTS[0], None, max_sequence_length=24)
        exact = reference.encode(PROMPTS[0], max_tokens=24)
        assert ours.tokens.dtype == embeds.dtype == dtype
        error = (embeds.float() - exact.tokens).norm()
        assert (ours.tokens.float() - exact.tokens).norm() <= 1.1 * error
        assert torch.equal(ours.pooled, pooled)
    finally:
        state = load()
        clip.float().load_state_dict(state.clip.state_dict()), t5.float().load_state_dict(state.t5.state_dict())


def test_schnell_reads_256_tokens(sides):
    _, load = sides
    text = load()
    assert text.max_tokens == text.default_tokens == 512
    with pytest.raises(FluxError, match="at most 512 T5 tokens, not 513"):
        text.encode("a cat", max_tokens=513)
