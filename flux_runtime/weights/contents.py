"""What a bag of named tensors is: parts of a FLUX.1 model under some layout and prefix, or another kind of file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..errors import FluxError
from ..quant import ao, quanto
from ..quant.gguf_blocks import FORMATS
from ..quant.save import packings_from
from . import keys
from .files import LazyTensor
from .gguf_names import t5_names
from .identity import told_by
from .packing import gather

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

LORA = "LoRA"

# Other files people have: a piece of a tensor name -> what to call the file, and what it is for.
FOREIGN = (
    ((".qweight", ".smooth_factor"), "SVDQuant transformer", "quantised in a way that is not read"),
    (
        ("lora_A.", "lora_B.", ".lora_down.", ".lora_up.", "_lora.down.", "_lora1.down.", ".lokr_w", ".hada_w"),
        LORA,
        "an addition to a model, which LoadLora (load_lora) loads",
    ),
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
    unreadable: str = ""  # the scheme, where the weights are packed in a way that is not read here
    table: keys.KeyMap | None = None  # from the file's names to native ones, where they differ
    fault: str = ""  # what is wrong where packed weights do not fit what lies beside them; the tensors are as stored
    told: Mapping[str, Any] = field(default_factory=dict)  # what the header says of the model, see `identity`

    def stored_names(self, name: str) -> list[str]:
        """What the file calls, or should have called, the tensors that make up a native one."""
        if self.table is None:
            return [name]
        if name in self.incomplete:
            return self.incomplete[name]
        levels = {n.split(".")[2] for n in self.tensors if n.startswith("decoder.up.")}
        return self.table.foreign_names(name, last=max(len(levels) - 1, 0)) or [name]

    def require_sound(self) -> None:
        """Raises a `FluxError` where the weights cannot be unpacked."""
        if self.fault:
            raise FluxError(self.fault)

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
    """Divide the tensors of a file (or of a component's shards) among the parts of a model.

    A part whose packed weights do not fit what lies beside them is there too, with its `fault`.
    """
    tensors, config, metadata = t5_names(tensors), config or {}, metadata or {}
    try:
        tensors, fault = unpacked_names(tensors, files, config, metadata), None
    except FluxError as error:
        fault = error
    foreign = foreign_kind(tensors)
    if foreign:
        return Contents({}, tuple(tensors), foreign)
    found = {kind: hit for kind in KINDS if (hit := _locate(kind, tensors))}
    if fault and not found:
        raise fault
    taken, leftover = _divide(tensors, {kind: prefix for kind, (prefix, _) in found.items()})
    faults = _unpack_each(taken, files, config, metadata) if fault else {}
    told, components = told_by(metadata), {}
    for kind, (prefix, layout) in found.items():
        own = {name.removeprefix(prefix): tensor for name, tensor in taken[kind].items()}
        if kind in faults:
            components[kind] = Component(kind, "", own, files, config, fault=faults[kind], told=told)
        else:
            part = _component(kind, layout, own, files, {**told.get(kind, {}), **config})
            components[kind] = replace(part, told=told)
    if "clip" in components:  # CLIP's other half, which all-in-one files keep beside the text encoder
        halves = tuple(name for name in leftover if name.endswith(CLIP_SPARE))
        components["clip"] = replace(components["clip"], spare=(*components["clip"].spare, *halves))
        leftover = [name for name in leftover if name not in halves]
    return Contents(components, tuple(leftover))


def _divide(
    tensors: Mapping[str, LazyTensor], prefixes: Mapping[str, str]
) -> tuple[dict[str, dict[str, LazyTensor]], list[str]]:
    """The tensors of each part, by the longest prefix that fits a name, and the names that belong to none."""
    taken: dict[str, dict[str, LazyTensor]] = {kind: {} for kind in prefixes}
    leftover = []
    for name, tensor in tensors.items():
        homes = [kind for kind, prefix in prefixes.items() if name.startswith(prefix)]
        if homes:
            taken[max(homes, key=lambda kind: len(prefixes[kind]))][name] = tensor
        else:
            leftover.append(name)
    return taken, leftover


def _unpack_each(
    taken: dict[str, dict[str, LazyTensor]],
    files: tuple[str, ...],
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> dict[str, str]:
    """Tie weights together part by part, where one fault would hide the others; what is wrong with which part."""
    faults = {}
    for kind, own in taken.items():
        try:
            taken[kind] = unpacked_names(own, files, config, metadata)
        except FluxError as error:
            faults[kind] = str(error)
    return faults


def unpacked_names(
    tensors: Mapping[str, LazyTensor], files: tuple[str, ...], config: Mapping[str, Any], metadata: Mapping[str, str]
) -> dict[str, LazyTensor]:
    """The tensors with those that weights are unpacked by tied to their weights; errors name the file."""
    try:
        own = packings_from(tensors, metadata)
        return gather(quanto.gathered(ao.gathered(own, metadata)), config, metadata)
    except FluxError as error:
        raise FluxError(f"{files[0]}: {error}") from error


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
) -> Component:
    unread = unreadable(tensors, config)
    if kind in ("clip", "t5"):
        tensors, spare = _text_names(kind, tensors)
        return Component(kind, layout, tensors, files, config, spare=spare, unreadable=unread)
    if layout == "BFL":
        return Component(kind, layout, tensors, files, config, unreadable=unread)
    table = keys.TRANSFORMER if kind == "transformer" else keys.VAE
    try:
        renamed = table.to_native(tensors)
    except FluxError as error:
        raise FluxError(f"{files[0]}: {error}") from error
    return Component(
        kind, layout, renamed.tensors, files, config, tuple(renamed.unknown), (), renamed.incomplete, unread, table
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


def unreadable(tensors: Mapping[str, LazyTensor], config: Mapping[str, Any]) -> str:
    """The scheme of weights that are packed in a way that is not read here; an empty text for all others."""
    ends = {name.rsplit(".", 1)[-1] for name in tensors}
    if "weight_scale_2" in ends:
        return "nvfp4"
    packings = [stored.packing for tensor in tensors.values() for stored in tensor.sources if stored.packing]
    blocks = {packing.facts.get("type") for packing in packings if packing.scheme == "gguf"} - FORMATS.keys()
    if blocks:
        return f"GGUF {' and '.join(sorted(map(str, blocks)))} (of GGUF, {', '.join(FORMATS)} are read)"
    plain = {name: t for name, t in tensors.items() if not t.packed}
    packed = next((t.dtype for n, t in plain.items() if n.endswith("weight") and t.dtype.startswith(PACKED)), "")
    named = config.get("quantization_config")
    if named and len(plain) == len(tensors):
        return f"{named.get('quant_method', 'unknown') if isinstance(named, dict) else 'unknown'} quantisation"
    return f"packed {packed} numbers" if packed else ""
