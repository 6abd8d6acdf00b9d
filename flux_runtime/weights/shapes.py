"""The configuration of each part, read off its tensor shapes; a config.json adds only what shapes cannot tell.

Counts come from the names that are there, so neither a lying config nor an absurd index makes a model of absurd size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

from ..errors import FluxError
from ..model.vae import VaeParams
from ..variants import FluxParams, params_from_shapes
from .contents import Component
from .files import number_in

log = logging.getLogger("fluxcanvas")

FLUX_GROUPS = 32  # of the published VAE's group norms


def where(component: Component) -> str:
    """The component by its file, for messages."""
    return (
        component.files[0]
        if len(component.files) == 1
        else f"{component.files[0]} and {len(component.files) - 1} more files"
    )


def count_blocks(component: Component, stack: str, *, least: int = 1) -> int:
    """How many blocks `stack.0`, `stack.1`, ... there are; a gap or none is an error that names the missing block."""
    found = set(_indices(component.tensors, stack + "."))
    lost = next((i for i in range(len(found)) if i not in found), None)
    if lost is not None or len(found) < least:
        raise FluxError(
            f"{where(component)}: the {component.kind} lacks {stack}.{lost or 0}; it is not whole, download it again"
        )
    return len(found)


def _indices(names: Iterable[str], start: str) -> Iterable[int]:
    for name in names:
        number = name[len(start) :].split(".", 1)[0] if name.startswith(start) else ""
        if number.isdecimal() and len(number) < 7:
            yield int(number)


def shape_of(component: Component, name: str, rank: int) -> tuple[int, ...]:
    """The shape of a tensor that must be there, with so many dimensions, none of them 0."""
    tensor = component.tensors.get(name)
    if tensor is None:
        lost = " and ".join(repr(stored) for stored in component.stored_names(name))
        raise FluxError(
            f"{where(component)}: the {component.kind} lacks the tensor {lost}; it is not whole, download it again"
        )
    if len(tensor.shape) != rank or 0 in tensor.shape:
        raise FluxError(
            f"{where(component)}: tensor {name!r} has the shape {list(tensor.shape)}, which no {component.kind} has"
        )
    return tensor.shape


def transformer_params(component: Component) -> FluxParams:
    """Shape parameters of a transformer; rope axes from the config, if it names them."""
    count_blocks(component, "double_blocks")
    count_blocks(component, "single_blocks", least=0)
    for name in ("img_in.weight", "txt_in.weight", "vector_in.in_layer.weight", "final_layer.linear.weight"):
        shape_of(component, name, 2)
    shape_of(component, "double_blocks.0.img_mlp.0.weight", 2)
    head_dim = shape_of(component, "double_blocks.0.img_attn.norm.query_norm.scale", 1)[0]
    if component.tensors["img_in.weight"].shape[0] % head_dim:
        raise FluxError(f"{where(component)}: the transformer's width is not a multiple of its head size {head_dim}")
    try:
        return params_from_shapes(component.shapes, rope_axes(component, head_dim))
    except FluxError as error:
        raise FluxError(f"{where(component)}: {error}") from error


def rope_axes(component: Component, head_dim: int) -> tuple[int, ...] | None:
    """The rope axes that a config names, if they suit the head size."""
    axes = component.config.get("axes_dims_rope")
    good = isinstance(axes, list) and all(type(a) is int and a > 0 for a in axes) and sum(axes) == head_dim
    return tuple(axes) if good else None


def vae_params(component: Component) -> VaeParams:
    """Shape parameters of a VAE; scale, shift and norm groups from the config, else FLUX.1's own."""
    levels = count_blocks(component, "encoder.down")
    config, width = component.config, shape_of(component, "encoder.conv_in.weight", 4)[0]
    groups = config.get("norm_num_groups", FLUX_GROUPS)
    if type(groups) is not int or groups < 1 or width % groups:
        raise FluxError(
            f"{where(component)}: a VAE of width {width} does not divide into {groups} norm groups; "
            "put its config.json beside it and name the folder"
        )
    return VaeParams(
        channels=tuple(shape_of(component, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in range(levels)),
        num_res_blocks=count_blocks(component, "encoder.down.0.block"),
        z_channels=shape_of(component, "decoder.conv_in.weight", 4)[1],
        in_channels=component.tensors["encoder.conv_in.weight"].shape[1],
        groups=groups,
        scale=number_in(config, "scaling_factor", VaeParams.scale),
        shift=number_in(config, "shift_factor", VaeParams.shift),
        sample_size=int(number_in(config, "sample_size", VaeParams.sample_size)),
    )


def clip_config(component: Component) -> dict[str, Any]:
    """Keyword arguments for transformers' CLIPTextConfig."""
    vocabulary, hidden = shape_of(component, "embeddings.token_embedding.weight", 2)
    config = dict(
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=count_blocks(component, "encoder.layers"),
        intermediate_size=shape_of(component, "encoder.layers.0.mlp.fc1.weight", 2)[0],
        max_position_embeddings=shape_of(component, "embeddings.position_embedding.weight", 2)[0],
        num_attention_heads=max(hidden // 64, 1),
        hidden_act="quick_gelu",
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
    )
    told = ("num_attention_heads", "hidden_act", "layer_norm_eps", "bos_token_id", "eos_token_id", "pad_token_id")
    if not component.config and hidden != 768:
        log.warning(
            "%s: no config.json; %d attention heads are assumed", where(component), config["num_attention_heads"]
        )
    return config | {name: component.config[name] for name in told if component.config.get(name) is not None}


def t5_config(component: Component) -> dict[str, Any]:
    """Keyword arguments for transformers' T5Config."""
    vocabulary, width = shape_of(component, "shared.weight", 2)
    layer = "encoder.block.0.layer"
    buckets, heads = shape_of(component, f"{layer}.0.SelfAttention.relative_attention_bias.weight", 2)
    inner = shape_of(component, f"{layer}.0.SelfAttention.q.weight", 2)[0]
    if inner % heads:
        raise FluxError(f"{where(component)}: {inner} rows of attention do not divide among {heads} heads")
    gated = f"{layer}.1.DenseReluDense.wi_0.weight" in component.tensors
    config = dict(
        vocab_size=vocabulary,
        d_model=width,
        num_heads=heads,
        d_kv=inner // heads,
        d_ff=shape_of(component, f"{layer}.1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight", 2)[0],
        num_layers=count_blocks(component, "encoder.block"),
        relative_attention_num_buckets=buckets,
        feed_forward_proj="gated-gelu" if gated else "relu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
    )
    told = ("relative_attention_max_distance", "layer_norm_epsilon", "feed_forward_proj")
    return config | {name: component.config[name] for name in told if component.config.get(name) is not None}
