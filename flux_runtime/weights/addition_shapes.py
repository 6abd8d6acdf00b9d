"""The configuration of each addition to a model, read off its tensor shapes; a config.json tells what they cannot."""

from __future__ import annotations

import logging
from typing import Any

from ..errors import FluxError
from ..model.adapters import IPAdapterNet, IPAdapterParams, ReduxEncoder
from ..model.sidenet import Hint, SideNet, SideNetParams
from ..variants import FluxParams, default_axes
from .build import configured
from .contents import Component
from .shapes import count_blocks, rope_axes, shape_of, where

log = logging.getLogger("fluxcanvas")

MAX_MODES = 1000  # a config.json may say anything; published union nets have 7 to 10


def controlnet(component: Component) -> SideNet:
    """A side network of the component's shapes."""
    return SideNet(sidenet_params(component))


def sidenet_params(component: Component) -> SideNetParams:
    """`num_mode`, `guidance_embeds` and `axes_dims_rope` of a config.json win over what the tensors tell."""
    hint, channels = _hint(component), shape_of(component, "controlnet_x_embedder.weight", 2)[1]
    trunk = _trunk(component)
    if channels != trunk.in_channels:
        raise FluxError(
            f"{where(component)}: this ControlNet reads a control image of {channels} channels beside a canvas of "
            f"{trunk.in_channels} (an inpainting ControlNet reads a mask too); choose one that reads an image alone"
        )
    embedder = "controlnet_mode_embedder.weight"
    modes = shape_of(component, embedder, 2)[0] if embedder in component.tensors else 0
    told = component.config.get("num_mode", modes)
    return SideNetParams(trunk, hint, channels, told if type(told) is int and 0 <= told < MAX_MODES else 0)


def _hint(component: Component) -> Hint:
    stems: dict[str, Hint] = {"input_hint_block.": "xlabs", "input_cond_block.": "mistoline"}
    names = tuple(component.tensors)
    return next((hint for stem, hint in stems.items() if any(n.startswith(stem) for n in names)), "latents")


def _trunk(component: Component) -> FluxParams:
    hidden, in_channels = shape_of(component, "img_in.weight", 2)
    head_dim = shape_of(component, "double_blocks.0.img_attn.norm.query_norm.scale", 1)[0]
    if hidden % head_dim:
        raise FluxError(f"{where(component)}: the ControlNet's width is not a multiple of its head size {head_dim}")
    guided = component.config.get("guidance_embeds", "guidance_in.in_layer.weight" in component.tensors)
    return FluxParams(
        in_channels=in_channels,
        vec_in_dim=shape_of(component, "vector_in.in_layer.weight", 2)[1],
        context_in_dim=shape_of(component, "txt_in.weight", 2)[1],
        hidden_size=hidden,
        num_heads=hidden // head_dim,
        mlp_hidden=shape_of(component, "double_blocks.0.img_mlp.0.weight", 2)[0],
        depth=count_blocks(component, "double_blocks"),
        depth_single=count_blocks(component, "single_blocks", least=0),
        axes_dim=rope_axes(component, head_dim) or default_axes(head_dim),
        guidance_embed=bool(guided),
    )


def ip_adapter(component: Component) -> IPAdapterNet:
    """The number of tokens is that of the projection's rows to the width of a token."""
    rows, embed_dim = shape_of(component, "ip_adapter_proj_model.proj.weight", 2)
    context_dim = shape_of(component, "ip_adapter_proj_model.norm.weight", 1)[0]
    if rows % context_dim:
        raise FluxError(f"{where(component)}: a projection of {rows} rows does not make tokens of {context_dim}")
    keys_of_first = "double_blocks.0.processor.ip_adapter_double_stream_k_proj.weight"
    blocks, hidden = count_blocks(component, "double_blocks"), shape_of(component, keys_of_first, 2)[0]
    return IPAdapterNet(IPAdapterParams(rows // context_dim, blocks, embed_dim, context_dim, hidden))


def redux(component: Component) -> ReduxEncoder:
    """Two linears: from SigLIP's width up, and down to a text token's."""
    hidden, in_dim = shape_of(component, "redux_up.weight", 2)
    return ReduxEncoder(in_dim, shape_of(component, "redux_down.weight", 2)[0], hidden)


def is_clip(component: Component) -> bool:
    """CLIP's vision model (for IP-Adapter) has a class token; SigLIP's (for Redux) has none."""
    return "embeddings.class_embedding" in component.tensors


def embedding_width(component: Component) -> int:
    """How many numbers an image encoder gives: CLIP a projected vector, SigLIP a vector for each patch."""
    name = "visual_projection.weight" if is_clip(component) else "embeddings.patch_embedding.weight"
    tensor = component.tensors.get(name)
    return tensor.shape[0] if tensor is not None and tensor.shape else 0


def image_encoder(component: Component) -> Any:
    """CLIP's or SigLIP's vision model of transformers."""
    import transformers

    if is_clip(component):
        config = configured(component, "CLIPVisionConfig", vision_config(component))
        return transformers.CLIPVisionModelWithProjection(config)
    return transformers.SiglipVisionModel(configured(component, "SiglipVisionConfig", vision_config(component)))


# Published encoders by width: heads, activation, and the side of the picture where it is no multiple of the patch.
_CLIP_KNOWN = {1024: (16, "quick_gelu"), 1280: (16, "gelu"), 1664: (16, "gelu")}
_SIGLIP_KNOWN = {768: (12, 0), 1024: (16, 0), 1152: (16, 384)}
_TOLD = {"num_attention_heads": int, "hidden_act": str, "layer_norm_eps": float, "image_size": int}


def vision_config(component: Component) -> dict[str, Any]:
    """Keyword arguments of transformers' CLIPVisionConfig or SiglipVisionConfig."""
    hidden, channels, patch, _ = shape_of(component, "embeddings.patch_embedding.weight", 4)
    positions = shape_of(component, "embeddings.position_embedding.weight", 2)[0]
    config: dict[str, Any] = dict(
        hidden_size=hidden,
        num_channels=channels,
        patch_size=patch,
        num_hidden_layers=count_blocks(component, "encoder.layers"),
        intermediate_size=shape_of(component, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        image_size=int((positions - is_clip(component)) ** 0.5) * patch,
    )
    nested = component.config.get("vision_config")
    told = nested if isinstance(nested, dict) else component.config
    known = _CLIP_KNOWN if is_clip(component) else _SIGLIP_KNOWN
    if hidden not in known and "num_attention_heads" not in told:
        log.warning("%s: no config.json; %d attention heads are assumed", where(component), max(hidden // 64, 1))
    config |= _clip_facts(component, hidden) if is_clip(component) else _siglip_facts(hidden, config["image_size"])
    config |= {name: told[name] for name, kind in _TOLD.items() if isinstance(told.get(name), kind) and told[name]}
    if hidden % config["num_attention_heads"]:
        raise FluxError(f"{where(component)}: a width of {hidden} does not divide into its attention heads")
    return config


def _clip_facts(component: Component, hidden: int) -> dict[str, Any]:
    heads, activation = _CLIP_KNOWN.get(hidden, (max(hidden // 64, 1), "quick_gelu"))
    projection = shape_of(component, "visual_projection.weight", 2)[0]
    return {"num_attention_heads": heads, "hidden_act": activation, "projection_dim": projection}


def _siglip_facts(hidden: int, image_size: int) -> dict[str, Any]:
    heads, side = _SIGLIP_KNOWN.get(hidden, (max(hidden // 64, 1), 0))
    # 27 patches of 14 are 378 pixels; the published encoder reads 384 and leaves the rest out
    image_size = side if image_size < side < image_size + 14 else image_size
    return {"num_attention_heads": heads, "image_size": image_size, "vision_use_head": False}
