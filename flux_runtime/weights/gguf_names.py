"""The names that GGUF files give the tensors of a T5 encoder, as llama.cpp writes them, and transformers' names."""

from __future__ import annotations

from collections.abc import Mapping

from .files import LazyTensor
from .keys import KeyMap

_ATTENTION = "encoder.block.{}.layer.0"
_FEED_FORWARD = "encoder.block.{}.layer.1"

# The gate goes through the activation: wi_0. The position biases lie as in transformers: (buckets, heads).
T5 = KeyMap(
    {
        "shared.weight": "token_embd.weight",
        "encoder.final_layer_norm.weight": "enc.output_norm.weight",
        f"{_ATTENTION}.layer_norm.weight": "enc.blk.{}.attn_norm.weight",
        f"{_ATTENTION}.SelfAttention.relative_attention_bias.weight": "enc.blk.{}.attn_rel_b.weight",
        **{f"{_ATTENTION}.SelfAttention.{x}.weight": f"enc.blk.{{}}.attn_{x}.weight" for x in "qkvo"},
        f"{_FEED_FORWARD}.layer_norm.weight": "enc.blk.{}.ffn_norm.weight",
        f"{_FEED_FORWARD}.DenseReluDense.wi_0.weight": "enc.blk.{}.ffn_gate.weight",
        f"{_FEED_FORWARD}.DenseReluDense.wi_1.weight": "enc.blk.{}.ffn_up.weight",
        f"{_FEED_FORWARD}.DenseReluDense.wo.weight": "enc.blk.{}.ffn_down.weight",
        "lm_head.weight": "output.weight",
    }
)


def t5_names(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """The same tensors under transformers' names, where they have llama.cpp's names of a T5; else as they are.

    The decoder, which FLUX.1 does not use, goes under `decoder.`; names that no T5 has stay.
    """
    if not any(name.startswith("enc.blk.") for name in tensors):
        return dict(tensors)
    renamed = T5.to_native(tensors)
    rest = {name: tensors[name] for name in renamed.unknown}
    return renamed.tensors | {
        f"decoder.{name[4:]}" if name.startswith("dec.") else name: tensor for name, tensor in rest.items()
    }
