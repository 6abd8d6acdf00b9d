"""Additions to a model (ControlNet, IP-Adapter, Redux, image encoders): which file is which, and its tensor names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import FluxError
from . import keys
from .contents import Component, Contents, sort_out, unpacked_names, unreadable
from .files import LazyTensor

CONTROLNET, IP_ADAPTER, REDUX, IMAGE_ENCODER = "ControlNet", "IP-Adapter", "Redux adapter", "image encoder"

# What a side network has besides a transformer's trunk.
_HEADS = (
    "controlnet_blocks.{}.*", "controlnet_single_blocks.{}.*", "controlnet_blocks.{}.linear.*",
    "controlnet_single_blocks.{}.linear.*", "controlnet_mode_embedder.weight", "input_hint_block.{}.*",
    "input_cond_block.encoder.{}.*",
)  # fmt: skip
_TRUNK = {ours: theirs for ours, theirs in keys.TRANSFORMER_DIRECT.items() if not ours.startswith("final_layer.")}

# XLabs and MistoLine keep the original names; one of the additions is called otherwise here.
NET_BFL = keys.KeyMap(
    {name: name for name in (*_TRUNK, *keys.TRANSFORMER_FUSED, *_HEADS)}
    | {"controlnet_x_embedder.*": "pos_embed_input.*"}
)


def _hint_names() -> dict[str, str]:
    """XLabs' eight convolutions: every other place of a sequence in the original, three names in diffusers."""
    last = 14
    inner = {f"input_hint_block.{2 * i + 2}.*": f"input_hint_block.blocks.{i}.*" for i in range(last // 2 - 1)}
    return {"input_hint_block.0.*": "input_hint_block.conv_in.*"} | inner | {
        f"input_hint_block.{last}.*": "input_hint_block.conv_out.*"
    }  # fmt: skip


NET_DIFFUSERS = keys.KeyMap(
    _TRUNK
    | {name: name for name in (*_HEADS[:2], "controlnet_mode_embedder.weight", "controlnet_x_embedder.*")}
    | _hint_names(),
    keys.TRANSFORMER_FUSED,
)

IP_DIFFUSERS = keys.KeyMap({
    "ip_adapter_proj_model.proj.*": "image_proj.proj.*",
    "ip_adapter_proj_model.norm.*": "image_proj.norm.*",
    "double_blocks.{}.processor.ip_adapter_double_stream_k_proj.*": "ip_adapter.{}.to_k_ip.*",
    "double_blocks.{}.processor.ip_adapter_double_stream_v_proj.*": "ip_adapter.{}.to_v_ip.*",
})  # fmt: skip


@dataclass(frozen=True)
class Spelling:
    """One layout of an addition: the tensor name that tells it, under any prefix, and its table (None: native)."""

    layout: str
    mark: str
    table: keys.KeyMap | None = None


SPELLINGS = {
    CONTROLNET: (
        Spelling("diffusers", "controlnet_x_embedder.weight", NET_DIFFUSERS),
        Spelling("BFL", "pos_embed_input.weight", NET_BFL),
    ),
    IP_ADAPTER: (
        Spelling("XLabs", "ip_adapter_proj_model.proj.weight"),
        Spelling("diffusers", "image_proj.proj.weight", IP_DIFFUSERS),
    ),
    REDUX: (Spelling("BFL", "redux_up.weight"),),
    IMAGE_ENCODER: (
        Spelling("transformers", "vision_model.embeddings.patch_embedding.weight"),
        Spelling("transformers", "embeddings.patch_embedding.weight"),
    ),
}

# The other half of a whole CLIP or SigLIP, and what is read nowhere: only the patches' hidden states and CLIP's
# projection of the class token are.
_VISION_SPARE = ("text_model.", "text_projection", "logit_", "head.", "embeddings.position_ids")


def addition_in(
    kinds: tuple[str, ...],
    tensors: Mapping[str, LazyTensor],
    files: tuple[str, ...],
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> Component | Contents:
    """The addition of one of these kinds that these tensors are, under native names; what they are instead, if not."""
    contents = sort_out(tensors, files, config, metadata)
    if contents.foreign not in kinds:
        return contents
    kind = contents.foreign
    for spelling in SPELLINGS[kind]:
        prefix = _prefix(spelling.mark, tensors)
        if prefix is not None:
            return _component(kind, spelling, prefix, tensors, files, config, metadata)
    marks = " or ".join(spelling.mark for spelling in SPELLINGS[kind])
    raise FluxError(
        f"{files[0]} is a {kind} of another family of models, or not whole: those of FLUX.1 have a tensor {marks}; "
        "choose one that was made for FLUX.1"
    )


def _prefix(mark: str, tensors: Mapping[str, LazyTensor]) -> str | None:
    return next((name.removesuffix(mark) for name in tensors if f".{name}".endswith(f".{mark}")), None)


def _component(
    kind: str,
    spelling: Spelling,
    prefix: str,
    tensors: Mapping[str, LazyTensor],
    files: tuple[str, ...],
    config: Mapping[str, Any],
    metadata: Mapping[str, str],
) -> Component:
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    outside = tuple(name for name in tensors if not name.startswith(prefix))
    own = unpacked_names(own, files, config, metadata)
    unread = unreadable(own, config)
    if kind == IMAGE_ENCODER:
        own, spare = _vision_names(own)
        return Component(kind, spelling.layout, own, files, config, outside, spare, unreadable=unread)
    if spelling.table is None:
        return Component(kind, spelling.layout, own, files, config, outside, unreadable=unread)
    try:
        renamed = spelling.table.to_native(own)
    except FluxError as error:
        raise FluxError(f"{files[0]}: {error}") from error
    return Component(
        kind, spelling.layout, renamed.tensors, files, config, (*outside, *renamed.unknown), (), renamed.incomplete,
        unread, spelling.table,
    )  # fmt: skip


def _vision_names(tensors: dict[str, LazyTensor]) -> tuple[dict[str, LazyTensor], tuple[str, ...]]:
    """Names as in the bare vision model, and those that are not needed."""
    plain = {name.removeprefix("vision_model."): tensor for name, tensor in tensors.items()}
    spare = tuple(name for name in plain if name.startswith(_VISION_SPARE))
    return {name: tensor for name, tensor in plain.items() if name not in spare}, spare
