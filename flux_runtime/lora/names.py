"""Which layer a tensor of a LoRA file speaks of, in every spelling people have.

A name is a prefix (which program, which part of the model), a layer's name (BFL's, diffusers' or XLabs'; with dots, or
with all of them turned into underscores) and an ending (what the tensor is to the layer). All layers come from the
tables of `weights.keys`; both spellings of them are looked up whole, so an underscore can never be read two ways.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..weights.keys import TRANSFORMER_DIRECT, TRANSFORMER_FUSED, TRANSFORMER_SWAPPED


@dataclass(frozen=True)
class Target:
    """A native linear layer, or the rows of one, or (with `norm`) a norm."""

    part: str  # transformer, clip, t5
    layer: str
    layout: str  # whose name the file uses: BFL, diffusers, XLabs, transformers
    above: int | None = None  # of a joined layer: how many times the model's width stands above these rows; None: all
    swap: bool = False  # halves of the rows stand the other way round
    joined: bool = False  # q, k and v together, of a layer that holds more
    norm: str = ""  # what the weight of a norm is called: scale, weight; of a linear layer nothing


@dataclass(frozen=True)
class Name:
    """A tensor's name, taken apart."""

    base: str  # everything before the ending: the file's own name of the layer
    slot: str  # what the tensor is: down, up, bias, alpha, lengths, diff, lokr_w1, whole ...
    origin: str = ""  # whose prefix it is
    target: Target | None = None  # None: no layer of FLUX.1


# What a tensor is to its layer. Between `lora_A` and `weight` PEFT may put the name of an adapter; what its setting
# `modules_to_save` lists is whole, under the layer's own name, and so is a bias that it trains beside a LoRA.
_SAVED = r"(?:modules_to_save\.(?:[^.]+\.)?)?"
_ENDINGS = {
    "down": r"lora_A(?:\.[^.]+)?\.weight|lora_A|lora[._]down(?:\.weight)?|(?:lora_linear_layer\.)?down\.weight",
    "up": r"lora_B(?:\.[^.]+)?\.weight|lora_B|lora[._]up(?:\.weight)?|(?:lora_linear_layer\.)?up\.weight",
    "bias": r"lora_B(?:\.[^.]+)?\.bias|lora[._]up\.bias",
    "lengths": r"dora_scale|lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?",
    "whole": rf"{_SAVED}(?:weight|scale)",
    "whole_b": rf"(?:base_layer\.|{_SAVED})bias",
    "own": r"alpha|diff|diff_b|[wb]_norm|set_weight|reshape_weight|"
    r"lokr_w[12](?:_[ab])?|lokr_t[12]|hada_w[12]_[ab]|hada_t[12]",
}
WHOLE = ("whole", "whole_b")
_NAME = re.compile(r"(.+?)\.(?:" + "|".join(f"(?P<{slot}>{text})" for slot, text in _ENDINGS.items()) + ")")

# Prefix, the sign between a name's parts, the parts of the model it can mean, and who writes so.
_PREFIXES = (
    ("lora_unet_", "_", ("transformer",), "kohya"),
    ("lora_transformer_", "_", ("transformer",), "OneTrainer"),
    ("lycoris_", "_", ("transformer",), "LyCORIS"),
    # Programs count the text encoders differently, but their layers have different names.
    *((f"lora_te{number}_", "_", ("clip", "t5"), "text encoder") for number in ("", "1", "2", "3")),
    ("base_model.model.", ".", ("transformer",), "PEFT"),
    ("model.diffusion_model.", ".", ("transformer",), "ComfyUI"),
    ("diffusion_model.", ".", ("transformer",), "ComfyUI"),
    ("transformer.", ".", ("transformer",), "diffusers"),
    ("text_encoders.clip_l.transformer.", ".", ("clip",), "text encoder"),
    ("text_encoders.t5xxl.transformer.", ".", ("t5",), "text encoder"),
    ("text_encoder.", ".", ("clip",), "text encoder"),
    ("text_encoder_2.", ".", ("t5",), "text encoder"),
    ("clip_l.", ".", ("clip",), "text encoder"),
    ("t5xxl.", ".", ("t5",), "text encoder"),
    ("t5.", ".", ("t5",), "text encoder"),
    ("", ".", ("transformer", "clip", "t5"), "bare"),
)

_XLABS = {
    "double_blocks.{}.processor.qkv_lora1": Target("transformer", "double_blocks.{}.img_attn.qkv", "XLabs"),
    "double_blocks.{}.processor.qkv_lora2": Target("transformer", "double_blocks.{}.txt_attn.qkv", "XLabs"),
    "double_blocks.{}.processor.proj_lora1": Target("transformer", "double_blocks.{}.img_attn.proj", "XLabs"),
    "double_blocks.{}.processor.proj_lora2": Target("transformer", "double_blocks.{}.txt_attn.proj", "XLabs"),
    "single_blocks.{}.processor.qkv_lora": Target(
        "transformer", "single_blocks.{}.linear1", "XLabs", above=0, joined=True
    ),
    "single_blocks.{}.processor.proj_lora": Target("transformer", "single_blocks.{}.linear2", "XLabs"),
}
_FUSED = {  # diffusers' names once `fuse_qkv_projections` has been called
    "transformer_blocks.{}.attn.to_qkv": Target("transformer", "double_blocks.{}.img_attn.qkv", "diffusers"),
    "transformer_blocks.{}.attn.to_added_qkv": Target("transformer", "double_blocks.{}.txt_attn.qkv", "diffusers"),
    "single_transformer_blocks.{}.attn.to_qkv": Target(
        "transformer", "single_blocks.{}.linear1", "diffusers", above=0, joined=True
    ),
}
_CLIP = (
    *(f"encoder.layers.{{}}.self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
    *(f"encoder.layers.{{}}.mlp.fc{number}" for number in (1, 2)),
)
_CLIP_NORMS = ("encoder.layers.{}.layer_norm1", "encoder.layers.{}.layer_norm2", "final_layer_norm")
_T5 = (
    *(f"encoder.block.{{}}.layer.0.SelfAttention.{name}" for name in "qkvo"),
    *(f"encoder.block.{{}}.layer.1.DenseReluDense.{name}" for name in ("wi_0", "wi_1", "wo")),
)
_T5_NORMS = (*(f"encoder.block.{{}}.layer.{number}.layer_norm" for number in (0, 1)), "encoder.final_layer_norm")


def _transformer_targets() -> Iterator[tuple[str, Target]]:
    """Names in both layouts; those without the ending `.*` in the table are norms, named with and without theirs."""
    for native, foreign in TRANSFORMER_DIRECT.items():
        layer, _, last = native.rpartition(".")
        norm = "" if last == "*" else last
        for name, layout in ((native, "BFL"), (foreign, "diffusers")):
            target = Target("transformer", layer, layout, norm=norm)
            yield name, target
            if norm:
                yield name.rpartition(".")[0], target
    for native, parts in TRANSFORMER_FUSED.items():
        yield native, Target("transformer", native, "BFL")
        for above, foreign in enumerate(parts):
            yield foreign, Target("transformer", native, "diffusers", above)
            yield f"{native.removesuffix('.*')}.{above}", Target("transformer", native, "BFL", above)  # OneTrainer
    yield "img_in.proj", Target("transformer", "img_in", "BFL")  # OneTrainer
    for native, foreign in TRANSFORMER_SWAPPED.items():
        yield native, Target("transformer", native, "BFL")
        yield foreign, Target("transformer", native, "diffusers", swap=True)


def _table() -> dict[str, dict[str, Target]]:
    """Part -> a layer's name with `{}` for the number of its block -> its target, of the same number."""
    transformer = {
        name.removesuffix(".*"): replace(target, layer=target.layer.removesuffix(".*"))
        for name, target in _transformer_targets()
    }
    clip = _encoder("clip", _CLIP, _CLIP_NORMS)
    clip |= {f"text_model.{name}": target for name, target in clip.items()}
    return {"transformer": {**transformer, **_XLABS, **_FUSED}, "clip": clip, "t5": _encoder("t5", _T5, _T5_NORMS)}


def _encoder(part: str, linears: tuple[str, ...], norms: tuple[str, ...]) -> dict[str, Target]:
    found = {name: Target(part, name, "transformers") for name in linears}
    return found | {name: Target(part, name, "transformers", norm="weight") for name in norms}


_TABLES = {".": _table()}
_TABLES["_"] = {
    part: {name.replace(".", "_"): target for name, target in table.items()} for part, table in _TABLES["."].items()
}
_NUMBER = re.compile(r"((?:blocks|layers|block)[._])(0|[1-9]\d{0,3})(?=[._])")


def _layer(name: str, separator: str, parts: tuple[str, ...]) -> Target | None:
    """The target of a layer's name without its prefix."""
    found = _NUMBER.search(name)
    key = f"{name[: found.start(2)]}{{}}{name[found.end(2) :]}" if found else name
    for part in parts:
        target = _TABLES[separator][part].get(key)
        if target is not None:
            return replace(target, layer=target.layer.format(found[2])) if found else target
    return None


def _find(base: str) -> tuple[str, Target] | None:
    """Who writes a layer's name so, and the layer."""
    for prefix, separator, parts, origin in _PREFIXES:
        if base.startswith(prefix):
            target = _layer(base[len(prefix) :], separator, parts)
            if target is not None:
                return origin, target
    return None


def take_apart(name: str) -> Name | None:
    """What a tensor's name says; None where its ending says nothing."""
    ending = _NAME.fullmatch(name)
    if ending is None:
        return None
    base, slot = ending[1], ending.lastgroup
    hit = _find(base)
    if hit and slot in WHOLE and not _can_be_whole(name, *hit):
        hit = None
    return Name(base, ending[slot] if slot == "own" else slot, *(hit or ()))


def _can_be_whole(name: str, origin: str, target: Target) -> bool:
    """Norms in any file (control LoRAs have them), weights and biases where PEFT has written."""
    linear = origin in ("PEFT", "diffusers", "text encoder") and target.layout != "XLabs" and not name.endswith("scale")
    return bool(target.norm) or linear


def format_of(found: list[Name]) -> str:
    """The formats of a file in plain words, from names that have a target; the text encoders' tell little."""
    layouts = {(name.origin, name.target.layout) for name in found if name.slot not in WHOLE}
    telling = {pair for pair in layouts if pair[0] != "text encoder"} or layouts
    slots = {name.slot for name in found}
    return " + ".join(sorted({_format(origin, layout, slots) for origin, layout in telling}))


def _format(origin: str, layout: str, slots: set[str]) -> str:
    if layout == "XLabs":
        return "XLabs"
    if (origin, layout) == ("PEFT", "BFL"):
        return "fal Kontext"
    if (origin, layout) == ("diffusers", "BFL"):
        return "OneTrainer"
    if origin == "ComfyUI" and {"down", "up"} <= slots:
        return "AI-Toolkit"
    if origin == "bare":
        return "BFL control" if layout == "BFL" and "whole" in slots else layout
    return origin
