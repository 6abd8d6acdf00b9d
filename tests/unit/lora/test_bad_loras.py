"""Files that are no LoRA for FLUX.1, or a damaged one: an error that names the file and says what to do."""

import pickle

import pytest
import torch

from fluxcanvas.flux_runtime import FluxError, load_lora
from fluxcanvas.flux_runtime.lora.formats import read_lora

QKV = "lora_unet_double_blocks_0_img_attn_qkv"


def zeros(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def good(**more):
    return {f"{QKV}.lora_down.weight": zeros(2, 8), f"{QKV}.lora_up.weight": zeros(24, 2), **more}


def refused(read, tensors, *words):
    with pytest.raises(FluxError) as error:
        read(tensors)
    message = str(error.value)
    assert "x.safetensors" in message and message.count("x.safetensors") == 1, message
    assert all(word in message for word in words), message


OTHER_MODELS = {
    "SDXL": {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 1280),
             "lora_te1_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 768)},
    "SDXL  ": {"lora_unet_label_emb_0_0.lora_down.weight": (2, 2816)},
    "SDXL ": {"lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (2, 2048)},
    "Stable Diffusion 1.5": {
        "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (2, 768),
        "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (2, 768)},
    "Stable Diffusion 2": {"unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": (2, 1024)},
    "Stable Diffusion,": {"lora_unet_input_blocks_4_1_proj_in.lora_up.weight": (320, 2)},
    "Stable Diffusion 3,": {"lora_unet_joint_blocks_0_context_block_attn_qkv.lora_down.weight": (2, 1536)},
    "Stable Diffusion 3, ": {"diffusion_model.joint_transformer_blocks.0.attn.to_q.lora_A.weight": (2, 1536)},
    "FLUX.2": {"diffusion_model.double_stream_modulation_img.lin.lora_A.weight": (2, 8)},
    "FLUX.2,": {"transformer.single_transformer_blocks.0.attn.to_qkv_mlp_proj.lora_A.weight": (2, 8)},
    "Qwen-Image": {"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (2, 8),
                   "transformer.transformer_blocks.0.img_mlp.net.2.lora_A.weight": (2, 8)},
    "Wan": {"diffusion_model.blocks.0.self_attn.q.lora_A.weight": (2, 8)},
    "Wan,": {"lora_unet_blocks_0_cross_attn_k.lora_down.weight": (2, 8)},
    "HunyuanVideo": {"diffusion_model.double_blocks.0.img_attn_qkv.lora_A.weight": (2, 8)},
    "HunyuanVideo,": {f"{QKV}.lora_down.weight": (2, 8),
                      "lora_unet_double_blocks_0_img_mlp_fc1.lora_down.weight": (2, 8)},
    "HiDream": {"diffusion_model.double_stream_blocks.0.block.attn1.to_q.lora_A.weight": (2, 8)},
    "Chroma": {"lora_unet_distilled_guidance_layer_layers_0_in_layer.lora_down.weight": (2, 8)},
    "Lumina": {"diffusion_model.layers.0.attention.qkv.lora_A.weight": (2, 8)},
    "PixArt, LTX-Video, Stable Diffusion 3.5": {
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight": (2, 1536),
        "transformer.transformer_blocks.0.attn2.to_q.lora_A.weight": (2, 1536)},
    "PixArt": {"transformer.transformer_blocks.0.attn2.to_q.lora_A.weight": (2, 8)},
}  # fmt: skip


@pytest.mark.parametrize("model", OTHER_MODELS)
def test_loras_of_other_models_are_named(model, read):
    tensors = {name: zeros(*shape) for name, shape in OTHER_MODELS[model].items()}
    refused(read, tensors, f"is a LoRA for {model.strip()}", "FLUX.1")


def pair(name, out, into):
    return {f"{name}.lora_A.weight": zeros(1, into), f"{name}.lora_B.weight": zeros(out, 1)}


@pytest.mark.parametrize(
    ("model", "tensors"),
    [
        ("FLUX.2", pair("diffusion_model.single_blocks.0.linear1", 72, 8)),
        ("FLUX.2", pair("diffusion_model.double_blocks.0.txt_mlp.0", 48, 8)),
        ("Stable Diffusion 3 Medium", pair("transformer.transformer_blocks.0.attn.to_q", 1536, 1536)),
        ("Stable Diffusion 3.5 Large", pair("transformer.transformer_blocks.37.attn.to_k", 2432, 2432)),
        ("Qwen-Image", pair("transformer.transformer_blocks.59.attn.to_q", 3072, 3072)),
    ],
)
def test_loras_with_the_same_names_are_told_by_their_sizes(model, tensors, read):
    refused(read, tensors, f"by its sizes a LoRA for {model}")


@pytest.mark.parametrize(
    ("name", "shape", "words"),
    [
        ("double_blocks.0.img_attn.qkv.weight", (24, 8), ("whole model (transformer)", "LoadFlux")),
        ("model.diffusion_model.single_blocks.0.linear1.weight", (24, 8), ("whole model (transformer)",)),
        ("text_model.embeddings.token_embedding.weight", (9, 8), ("whole model (clip)",)),
        ("controlnet_x_embedder.weight", (24, 8), ("ControlNet", "LoadControlNet")),
        ("double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight", (24, 8), ("an IP-Adapter", "LoadAdapter")),
        ("redux_up.weight", (24, 8), ("Redux adapter", "LoadAdapter")),
        ("model.diffusion_model.input_blocks.0.0.weight", (24, 8), ("Stable Diffusion model",)),
        ("lora_unet_double_blocks_0_img_attn_qkv.oft_blocks", (2, 4, 4), ("OFT changes", "not read")),
        ("lora_unet_nothing.lora_down.weight", (2, 8), ("none of its 1 tensors", "lora_unet_nothing")),
        ("emb_params", (4, 768), ("none of its 1 tensors",)),
        (f"{QKV}.alpha", (1,), ("none of its 1 tensors",)),
    ],
)
def test_other_files_are_named(name, shape, words, read):
    refused(read, {name: torch.ones(shape)}, "is no LoRA for FLUX.1", *words)


def test_scales_alone_are_no_lora(read):
    scales = {f"double_blocks.{i}.img_attn.norm.query_norm.scale": torch.ones(4) for i in range(2)}
    refused(read, scales, "is no LoRA for FLUX.1")


def test_whole_weights_alone_are_no_lora(read):
    refused(read, {"base_model.model.x_embedder.weight": torch.ones(8, 4)}, "is no LoRA for FLUX.1")


def test_file_without_tensors(read):
    refused(read, {}, "is no LoRA for FLUX.1", "none of its 0 tensors")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        ({f"{QKV}.lora_down.weight": zeros(2, 8)}, ("no counterpart", "up matrix")),
        ({f"{QKV}.lora_up.weight": zeros(24, 2)}, ("no counterpart", "down matrix")),
        (good(**{f"{QKV}.lora_up.weight": zeros(24, 3)}), ("mixed ranks", "[2, 8]", "[24, 3]")),
        (good(**{f"{QKV}.lora_up.weight": zeros(24)}), ("should be a matrix", "[24]")),
        (good(**{f"{QKV}.lora_up.weight": zeros(24, 2, 3, 3)}), ("should be a matrix", "[24, 2, 3, 3]")),
        (good(**{f"{QKV}.lora_down.weight": zeros(0, 8), f"{QKV}.lora_up.weight": zeros(24, 0)}), ("matrix", "[0, 8]")),
        (good(**{f"{QKV}.lora_up.weight": zeros(24, 2, dtype=torch.int8)}), ("torch.int8",)),
        (good(**{f"{QKV}.diff_b": zeros(23)}), ("diff_b", "[23] instead of [24]")),
        (good(**{f"{QKV}.dora_scale": zeros(23, 1)}), ("dora_scale", "[23, 1]")),
        (good(**{f"{QKV}.dora_scale": zeros()}), ("dora_scale", "[]")),
        (good(**{f"{QKV}.alpha": zeros(2)}), ("alpha", "one number")),
        (good(**{f"{QKV}.lora_A.weight": zeros(2, 8)}), ("say the same",)),
        (good(**{f"{QKV}.lokr_w1": zeros(2, 8)}), ("lokr_w2", "there is")),
        (good(**{f"{QKV}.lokr_w1": zeros(2, 8), f"{QKV}.lokr_w1_a": zeros(2, 8)}), ("lokr_w1 should be there once",)),
        ({f"{QKV}.lokr_w1": zeros(2, 2), f"{QKV}.lokr_w2_a": zeros(2, 3), f"{QKV}.lokr_w2_b": zeros(2, 2)},
         ("mixed ranks",)),
        ({f"{QKV}.hada_w1_a": zeros(2, 2), f"{QKV}.hada_w1_b": zeros(2, 2)}, ("no counterpart", "hada_w2_a")),
        ({f"{QKV}.hada_{x}": zeros(*s) for x, s in {"w1_a": (4, 2), "w1_b": (2, 4), "w2_a": (4, 2), "w2_b": (2, 5)}
          .items()}, ("one shape",)),
        ({f"{QKV}.hada_{x}": zeros(*s) for x, s in {"w1_a": (4, 2), "w1_b": (3, 4), "w2_a": (4, 2), "w2_b": (2, 4)}
          .items()}, ("mixed ranks",)),
        (pair("transformer.transformer_blocks.0.attn.to_q", 8, 6), ("should be square", "[8, 6]")),
        (pair("transformer.norm_out.linear", 5, 8), ("two halves", "5 rows")),
        ({**pair("transformer.x_embedder", 8, 4),
          "transformer.transformer_blocks.0.attn.norm_q.weight": zeros(4, dtype=torch.int32)},
         ("cannot be a model's",)),
        ({**pair("text_encoders.clip_l.transformer.encoder.layers.0.mlp.fc1", 8, 4),
          **pair("text_encoder.text_model.encoder.layers.0.mlp.fc1", 8, 4)}, ("the same layer",)),
    ],
)  # fmt: skip
def test_tensors_that_do_not_belong_together(tensors, words, read):
    refused(read, tensors, *words)


@pytest.mark.parametrize("alpha", [float("nan"), float("inf"), 0.0])
def test_alphas_that_are_none(alpha, read):
    refused(read, good(**{f"{QKV}.alpha": torch.tensor(alpha)}), f"{QKV}.alpha is {alpha:g}", "other than 0", "damaged")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e5m2])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_broken_numbers_are_found_wherever_they_are(dtype, bad, read, monkeypatch):
    """Reading does not look at them; asking does, in every tensor, in every chunk, and names it."""
    monkeypatch.setattr("fluxcanvas.flux_runtime.lora.formats.CHUNK", 7)
    for place in (0, 6, 7, 47):
        up = torch.randn(24, 2).to(dtype)
        up.view(-1)[place] = bad
        lora = read(good(**{f"{QKV}.lora_up.weight": up}))
        for _ in range(2):
            with pytest.raises(FluxError, match=rf"x\.safetensors: tensor {QKV}\.lora_up\.weight holds numbers"):
                lora.check_numbers()


def test_broken_float8_is_found(read):
    up = torch.ones(24, 2).to(torch.float8_e4m3fn)
    up.view(torch.uint8)[5, 1] = 0x7F  # its only kind of NaN
    lora = read(good(**{f"{QKV}.lora_up.weight": up}))
    with pytest.raises(FluxError, match="lora_up"):
        lora.check_numbers()


def test_broken_values_are_found_and_unused_tensors_do_not_matter(read):
    scale = "diffusion_model.single_blocks.0.norm.key_norm.scale.set_weight"
    lora = read(good(**{scale: torch.tensor([1.0, float("nan")])}))
    with pytest.raises(FluxError, match="key_norm"):
        lora.check_numbers()
    read(good(strange=torch.tensor([float("nan")]), **{f"{QKV}.alpha": torch.tensor(1.0)})).check_numbers()
    read(good(**{f"{QKV}.lora_up.weight": torch.full((24, 2), 65504.0, dtype=torch.float16)})).check_numbers()


def test_files_that_are_no_safetensors(tmp_path, read):
    read(good())
    whole = (tmp_path / "x.safetensors").read_bytes()
    for name, content, word in (
        ("cut", whole[:-3], "download it again"),
        ("pickle", pickle.dumps({"a": list(range(99))}, protocol=4), "pickle"),
        ("empty", b"", "empty"),
        ("page", b"<html></html>", "web page"),
    ):
        path = tmp_path / f"{name}.safetensors"
        path.write_bytes(content)
        with pytest.raises(FluxError, match=rf"{name}\.safetensors.*{word}"):
            read_lora(path)
    with pytest.raises(FluxError, match="cannot be read"):
        read_lora(tmp_path / "none.safetensors")


def test_a_lora_that_does_not_come_along():
    with pytest.raises(FluxError, match=r"no LoRA demo/sepai.*demo/sepia"):
        load_lora("demo/sepai")
