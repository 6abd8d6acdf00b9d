"""What a bag of named tensors is: parts of a FLUX.1 model under some layout and prefix, or another kind of file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import FluxError
from . import keys
from .files import LazyTensor

KINDS = ("transformer", "clip", "t5", "vae")

# Prefixes under which single files carry a part; the empty one last.
PREFIXES = {
    "transformer": ("model.diffusion_model.", "diffusion_model.", "transformer.", ""),
    "clip": ("text_encoders.clip_l.transformer.", "conditioner.embedders.0.transformer.", "text_encoder.", ""),
    "t5": ("text_encoders.t5xxl.transformer.", "conditioner.embedders.1.transformer.", "text_encoder_2.", ""),
    "vae": ("vae.", "first_stage_model.", ""),
}

# Any of these names (after the prefix) tells the part and its layout.
MARKS = {
    "transformer": {
        "BFL": ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"),
        "diffusers": (
            "single_transformer_blocks.0.attn.to_q.weight",
            "transformer_blocks.0.norm1_context.linear.weight",
        ),
    },
    "clip": {
        "transformers": ("text_model.embeddings.token_embedding.weight", "embeddings.token_embedding.weight"),
    },
    "t5": {"transformers": ("encoder.block.0.layer.0.SelfAttention.q.weight",)},
    "vae": {
        "BFL": ("decoder.up.0.block.0.conv1.weight", "encoder.down.0.block.0.conv1.weight"),
        "diffusers": ("decoder.up_blocks.0.resnets.0.conv1.weight", "encoder.down_blocks.0.resnets.0.conv1.weight"),
    },
}

# Other files people have: a piece of a tensor name -> what to call the file, and what it is for.
FOREIGN = (
    ((".qweight", ".smooth_factor"), "SVDQuant transformer", "quantised in a way that is not read"),
    (
        ("lora_A.", "lora_B.", ".lora_down.", ".lora_up.", "_lora.down.", "_lora1.down."),
        "LoRA",
        "an addition to a model",
    ),
    ((".lokr_w", ".hada_w", ".oft_"), "LoKr or LoHa", "an addition to a model"),
    (
        (
            "controlnet_x_embedder.",
            "controlnet_blocks.",
            "input_hint_block.",
            "input_cond_block.",
            "control_model.",
            "controlnet_cond_embedding.",
        ),
        "ControlNet",
        "an addition to a model, which LoadControlNet (load_controlnet) loads",
    ),
    (
        ("ip_adapter_proj_model.", "image_proj.", "ip_adapter.", ".processor.ip_adapter"),
        "IP-Adapter",
        "an addition to a model, which LoadAdapter (load_adapter) loads",
    ),
    (
        ("redux_up.", "redux_down."),
        "Redux adapter",
        "an addition to a model, which LoadAdapter (load_adapter) loads",
    ),
    (("double_stream_modulation_img.",), "FLUX.2 transformer", "another family of models"),
    (("distilled_guidance_layer.",), "Chroma transformer", "another family of models"),
    (
        ("model.diffusion_model.input_blocks.", "down_blocks.0.attentions."),
        "Stable Diffusion model",
        "another family of models",
    ),
    (("joint_blocks.0.",), "Stable Diffusion 3 model", "another family of models"),
    (
        ("vision_model.embeddings.", "embeddings.patch_embedding.weight"),
        "image encoder",
        "what adapters see pictures with, which LoadAdapter (load_adapter) takes beside one",
    ),
)


PACKED = ("I", "U", "F4", "F6", "F8_E8M0")  # stored types that are no plain numbers
CLIP_SPARE = ("logit_scale", "text_projection", "text_projection.weight")


@dataclass(frozen=True)
class Component:
    """One part of a model, its tensors under native names: BFL's, or transformers' without `text_model.`."""

    kind: str
    layout: str
    tensors: Mapping[str, LazyTensor]
    files: tuple[str, ...]
    config: Mapping[str, Any] = field(default_factory=dict)  # the config.json beside it, if any
    unknown: tuple[str, ...] = ()  # names that the layout does not have
    spare: tuple[str, ...] = ()  # names that are known and not needed
    incomplete: Mapping[str, list[str]] = field(default_factory=dict)  # native name -> its parts that the file lacks
    quantised: str = ""  # the scheme, where the numbers are not plain weights
    table: keys.KeyMap | None = None  # from the file's names to native ones, where they differ

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tensor.shape for name, tensor in self.tensors.items()}


@dataclass(frozen=True)
class Contents:
    """The parts found in some tensors, names that belong to none, and what the whole is if it is no part of a model."""

    components: Mapping[str, Component]
    leftover: tuple[str, ...] = ()
    foreign: str = ""


def sort_out(
    tensors: Mapping[str, LazyTensor],
    files: tuple[str, ...],
    config: Mapping[str, Any] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Contents:
    """Divide the tensors of a file (or of a component's shards) among the parts of a model."""
    foreign = foreign_kind(tensors)
    if foreign:
        return Contents({}, tuple(tensors), foreign)
    found = {kind: hit for kind in KINDS if (hit := _locate(kind, tensors))}
    taken: dict[str, dict[str, LazyTensor]] = {kind: {} for kind in found}
    leftover = []
    for name, tensor in tensors.items():
        homes = [kind for kind, (prefix, _) in found.items() if name.startswith(prefix)]
        if homes:
            home = max(homes, key=lambda kind: len(found[kind][0]))
            taken[home][name.removeprefix(found[home][0])] = tensor
        else:
            leftover.append(name)
    components = {
        kind: _component(kind, found[kind][1], own, files, config or {}, metadata or {}) for kind, own in taken.items()
    }
    if "clip" in components:  # CLIP's other half, which all-in-one files keep beside the text encoder
        halves = tuple(name for name in leftover if name.endswith(CLIP_SPARE))
        components["clip"] = replace(components["clip"], spare=(*components["clip"].spare, *halves))
        leftover = [name for name in leftover if name not in halves]
    return Contents(components, tuple(leftover))


def foreign_kind(tensors: Mapping[str, LazyTensor]) -> str:
    """The name of another kind of file (`LoRA`, `ControlNet`, ...) if these tensors are one, else an empty text."""
    for marks, kind, _ in FOREIGN:
        if any(mark in name for name in tensors for mark in marks):
            return kind
    return ""


def _locate(kind: str, tensors: Mapping[str, LazyTensor]) -> tuple[str, str] | None:
    for prefix in PREFIXES[kind]:
        for layout, marks in MARKS[kind].items():
            if any(prefix + mark in tensors for mark in marks):
                return prefix, layout
    return None


def _component(
    kind: str,
    layout: str,
    tensors: dict[str, LazyTensor],
    files: tuple[str, ...],
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> Component:
    quantised = quantisation(tensors, config, metadata)
    if kind in ("clip", "t5"):
        tensors, spare = _text_names(kind, tensors)
        return Component(kind, layout, tensors, files, config, spare=spare, quantised=quantised)
    if layout == "BFL":
        return Component(kind, layout, tensors, files, config, quantised=quantised)
    table = keys.TRANSFORMER if kind == "transformer" else keys.VAE
    try:
        renamed = table.to_native(tensors)
    except FluxError as error:
        raise FluxError(f"{files[0]}: {error}") from error
    return Component(
        kind, layout, renamed.tensors, files, config, tuple(renamed.unknown), (), renamed.incomplete, quantised, table
    )


def _text_names(kind: str, tensors: dict[str, LazyTensor]) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """One spelling of a text encoder's names, and those it does not need."""
    plain = {name.removeprefix("text_model.") if kind == "clip" else name: tensor for name, tensor in tensors.items()}
    if kind == "t5" and "shared.weight" not in plain and "encoder.embed_tokens.weight" in plain:
        plain["shared.weight"] = plain.pop("encoder.embed_tokens.weight")
    spare = tuple(name for name in plain if _is_spare(kind, name))
    return {name: tensor for name, tensor in plain.items() if name not in spare}, spare


def _is_spare(kind: str, name: str) -> bool:
    if kind == "clip":
        return name.endswith((*CLIP_SPARE, "position_ids"))
    return name in ("encoder.embed_tokens.weight", "logit_scale", "lm_head.weight") or name.startswith("decoder.")


def quantisation(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], metadata: Mapping[str, str]) -> str:
    """The scheme by which these weights are packed; an empty text for plain numbers (fp8 without scales included)."""
    ends = {name.rsplit(".", 1)[-1] for name in tensors}
    if any("bitsandbytes__" in name for name in tensors) or "absmax" in ends:
        return "bitsandbytes 4 bit"
    if "SCB" in ends:
        return "bitsandbytes 8 bit"
    if "weight_scale_2" in ends:
        return "nvfp4"
    if ends & {"scaled_fp8", "scale_weight", "weight_scale", "comfy_quant"} or "_quantization_metadata" in metadata:
        return "scaled fp8"
    named = config.get("quantization_config")
    if named:
        return (
            f"{named.get('quant_method', 'unknown')} quantisation"
            if isinstance(named, dict)
            else "unknown quantisation"
        )
    packed = [t.dtype for name, t in tensors.items() if name.endswith("weight") and t.dtype.startswith(PACKED)]
    return f"packed {packed[0]} numbers" if packed else ""
