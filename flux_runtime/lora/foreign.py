"""What a file is that is no LoRA for FLUX.1: names and sizes that only other models have."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from ..weights import contents
from ..weights.files import LazyTensor

# A piece of a tensor's name -> the model that has such layers; none occurs in a file for FLUX.1.
_MARKS = (
    (r"lora_te2_text_model_|text_encoder_2\.text_model\.|lora_unet_label_emb|lora_unet_add_embedding", "SDXL"),
    (r"(?:lora_unet_|unet\.|diffusion_model\.)(?:input|output|middle|down|up|mid)_blocks?[._]", "Stable Diffusion"),
    (r"joint_(?:transformer_)?blocks[._]\d|text_encoder_3\.", "Stable Diffusion 3"),
    (r"(?:double|single)_stream_modulation|to_qkv_mlp_proj|[._]ff(?:_context)?[._]linear_(?:in|out)[._]", "FLUX.2"),
    (r"transformer_blocks[._]\d+[._](?:img|txt)_(?:mod|mlp)[._]", "Qwen-Image"),
    (r"(?:img|txt)_mlp[._]fc\d|_mod[._]linear\b|modulation[._]linear\b|\.img_attn_(?:qkv|proj)\.", "HunyuanVideo"),
    (r"(?:^|\.|lora_unet_)blocks[._]\d+[._](?:self_attn|cross_attn|ffn|attn1|attn2)[._]", "Wan"),
    (r"(?:^|[._])(?:double|single)_stream_blocks[._]\d", "HiDream"),
    (r"distilled_guidance_layer", "Chroma"),
    (r"(?:^|\.|lora_unet_)(?:layers|context_refiner|noise_refiner)[._]\d+[._](?:attention|feed_forward)[._]", "Lumina"),
    (
        r"(?:^|\.|_)transformer_blocks[._]\d+[._]attn[12][._]",
        "PixArt, LTX-Video, Stable Diffusion 3.5 or another model",
    ),
)
_CROSS_WIDTH = {768: "Stable Diffusion 1.5", 1024: "Stable Diffusion 2", 2048: "SDXL"}
_SD3_WIDTH = {1536: "Stable Diffusion 3 Medium", 2432: "Stable Diffusion 3.5 Large"}
_UNREAD = {".oft_": "OFT", ".boft_": "BOFT", ".on_input": "IA3", ".a1.weight": "GLoRA", ".lora_mid.": "LoCon"}

Shape = tuple[int, int]


def other_model(tensors: Mapping[str, LazyTensor]) -> str:
    """The model whose LoRA this is, where its names tell that it is another than FLUX.1; else an empty text."""
    for pattern, model in _MARKS:
        mark = re.compile(pattern)
        if any(mark.search(name) for name in tensors):
            return _stable_diffusion(tensors) if model == "Stable Diffusion" else model
    return ""


def _stable_diffusion(tensors: Mapping[str, LazyTensor]) -> str:
    """Which one, by the width of the text that its cross attention reads."""
    for name, tensor in tensors.items():
        if re.search(r"attn2[._]to_k\.(?:lora_down|lora_A|lora\.down)", name) and len(tensor.shape) > 1:
            return _CROSS_WIDTH.get(tensor.shape[1], "Stable Diffusion")
    return "Stable Diffusion"


def look_alike(shapes: Iterable[tuple[str, Shape]]) -> str:
    """The model with FLUX.1's names and other sizes, from (native layer, (out, in)) of all its patches."""
    sizes = {layer: shape for layer, shape in shapes if shape[1]}
    for layer, (out, width) in sizes.items():  # in FLUX.2 the MLP is gated, so its first half is twice as tall
        if (layer.endswith(".linear1") and out == 9 * width) or (layer.endswith("_mlp.0") and out == 6 * width):
            return "FLUX.2"
    blocks = {int(layer.split(".")[1]) for layer in sizes if layer.startswith("double_blocks.")}
    widths = {shape[1] for layer, shape in sizes.items() if layer.endswith("img_attn.qkv")}
    if len(widths) != 1 or any(layer.startswith("single_blocks.") for layer in sizes):
        return ""
    if max(blocks) >= 20 and widths == {3072}:
        return "Qwen-Image"
    return _SD3_WIDTH.get(widths.pop(), "")


def what_else(tensors: Mapping[str, LazyTensor], file: str) -> str:
    """Why a file without a single patch is no LoRA: what it is instead, in a clause."""
    unread = sorted({kind for mark, kind in _UNREAD.items() for name in tensors if mark in name})
    if unread:
        return f"it holds {' and '.join(unread)} changes, which are not read; use a LoRA, LoKr, LoHa or DoRA"
    found = contents.sort_out(tensors, (file,))
    if found.components:
        parts = " and ".join(found.components)
        return f"it holds weights of a whole model ({parts}); load it with LoadFlux (load_flux)"
    if found.foreign and found.foreign not in ("LoRA", "LoKr or LoHa"):
        use = next((use for _, kind, use in contents.FOREIGN if kind == found.foreign), "")
        article = "an" if found.foreign[0] in "AEIO" else "a"
        return f"it is {article} {found.foreign}, {use}" if use else f"it is {article} {found.foreign}"
    some = ", ".join(list(tensors)[:3])
    return f"none of its {len(tensors)} tensors ({some[:200]}) belongs to a layer of FLUX.1; use a LoRA made for FLUX.1"
