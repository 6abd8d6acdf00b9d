"""A loaded model in words: what it is, where its numbers lie, how its layers are stored, and which LoRAs are on it."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import nn

from .lora.apply import linear_at
from .lora.stack import Entry, LoraStack
from .quant.packed import Packed, PackedLinear
from .weights.report import counted, human, listed

if TYPE_CHECKING:
    from .flux import FluxModel
    from .text.encoders import TextEncoders
    from .vae import Vae

OTHERS = "other tensors"


def model_report(model: FluxModel | None = None, text: TextEncoders | None = None, vae: Vae | None = None) -> str:
    """What there is to say about these handles, in plain lines."""
    lines = []
    if model is not None:
        lines += [*_about(model), *_part("transformer", model.transformer, model.dtype)]
        lines += _loras("transformer", model.transformer, model.loras)
        lines += [f"  LoRAs are applied: {model.lora_mode}"] if model.loras else []
    if text is not None:
        for title, part, module in (("CLIP", "clip", text.clip), ("T5", "t5", text.t5)):
            lines += [*_part(title, module, module.dtype), *_loras(part, module, text.loras)]
    if vae is not None:
        lines += _part("VAE", vae.model, vae.dtype)
    return "\n".join(lines)


def _about(model: FluxModel) -> list[str]:
    variant, own, drawn = model.variant, model.transformer.params, model.params
    wide = f", {drawn.in_channels} with its LoRAs" if drawn.in_channels != own.in_channels else ""
    guidance = f", guidance {variant.guidance:g}" if own.guidance_embed else ", no guidance"
    return [
        f"FLUX.1 {variant.name}: {own.depth} double and {own.depth_single} single blocks of width {own.hidden_size}, "
        f"reads {own.in_channels} channels{wide}; recommended: {variant.steps} steps{guidance}"
    ]


def _part(title: str, module: nn.Module, dtype: torch.dtype) -> list[str]:
    """Size, place and type of a part, and a line for each way in which it stores numbers."""
    counts, sizes, numbers = _storage(module)
    devices = dict.fromkeys(str(tensor.device) for tensor in (*module.parameters(), *module.buffers()))
    head = (
        f"{title}: {human(sum(numbers.values()), '', 1000)} parameters, {human(sum(sizes.values()), 'B', 1000)} on "
        f"{' and '.join(devices)}, computes in {_name(dtype)}"
    )
    lines = [
        f"  {counts[kind]} linear layers as {kind}, {human(sizes[kind], 'B', 1000)}" for kind, _ in counts.most_common()
    ]
    return [head, *lines, *([f"  {OTHERS}, {human(sizes[OTHERS], 'B', 1000)}"] if sizes[OTHERS] else [])]


def _storage(module: nn.Module) -> tuple[Counter[str], Counter[str], Counter[str]]:
    """Linear layers, bytes and numbers by the way they are stored; biases are with the other tensors."""
    counts, sizes, numbers, seen = Counter(), Counter(), Counter(), set()
    for layer in module.modules():
        if isinstance(layer, PackedLinear):
            kind = " + ".join(dict.fromkeys(pack.scheme for pack in layer.packs))
            counts[kind] += 1
        elif isinstance(layer, Packed):
            sizes[layer.scheme] += layer.nbytes
            numbers[layer.scheme] += layer.shape[0] * layer.shape[1]
        elif isinstance(layer, nn.Linear):
            kind = _name(layer.weight.dtype)
            counts[kind] += 1
            sizes[kind] += layer.weight.nbytes
            numbers[kind] += layer.weight.numel()
            seen.add(id(layer.weight))
    for tensor in module.parameters():
        if id(tensor) not in seen:
            sizes[OTHERS] += tensor.nbytes
            numbers[OTHERS] += tensor.numel()
    return counts, sizes, numbers


def _loras(part: str, module: nn.Module, stack: LoraStack) -> list[str]:
    return [line for entry in stack.entries for line in _lora(part, module, entry)]


def _lora(part: str, module: nn.Module, entry: Entry) -> list[str]:
    """What one LoRA changes of this part; nothing where it has no layers for it."""
    lora, layers = entry.lora, entry.lora.layers.get(part, {})
    absent = [name for name in layers if linear_at(module, name) is None]
    changed = len(lora.norms.get(part, {}))
    if not layers and not changed:
        return []
    weight = entry.weight if part == "transformer" or entry.text_weight is None else entry.text_weight
    factors = "".join(f", {factor.selector}: {factor.factor:g}" for factor in entry.factors)
    norms = f", {counted(changed, 'tensor')} of norms" if changed else ""
    lines = [
        f"  LoRA {lora.name} ({lora.format}) at {weight:g}{factors}: "
        f"{len(layers) - len(absent)} of its {len(layers)} layers{norms}"
    ]
    return lines + ([f"    not in this model: {listed(absent)}"] if absent else [])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
