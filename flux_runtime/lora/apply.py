"""LoRAs on a model for as long as a context lasts; afterwards every byte of it is what it was.

Low-rank changes, LoKr and DoRA that measures rows act beside their layer, whatever its weight is stored as. What would
double the work of a step there (LoHa, whole differences, DoRA that measures columns) goes into a copy of a plain weight
for that time, and beside a packed one, which is never packed anew. A control LoRA widens the input and sets norms.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..errors import FluxError
from ..model.transformer import FluxTransformer
from ..quant.packed import PackedLinear, weight_of
from ..variants import FluxParams
from .magnitudes import settled
from .patches import rows_of
from .sides import PatchedLinear, Weighted, sides_of
from .stack import LoraStack

MODES = ("auto", "beside", "merged")


def check_mode(mode: str) -> None:
    if mode not in MODES:
        raise FluxError(f"LoRAs are not applied {mode!r}; use one of {', '.join(MODES)}")


@contextmanager
def applied(transformer: FluxTransformer, stack: LoraStack, mode: str = "auto") -> Iterator[None]:
    """Apply a stack to a transformer for the time of the context.

    `mode` says where changes go: `beside` the weights, `merged` into a copy of those that are plain (no cost a step,
    but memory, and a moment before the first), or `auto`, which does what suits each.
    """
    with ExitStack() as undo:
        if stack:
            _widen(transformer, widened(transformer.params, stack), undo)
            for entry in stack.entries:
                for name, value in entry.lora.values.items() if entry.weight else ():
                    _set_value(transformer, name, value, undo)
            _patch(transformer, stack.patches("transformer"), mode, undo)
        yield


@contextmanager
def applied_to_encoder(encoder: nn.Module, part: str, stack: LoraStack) -> Iterator[None]:
    """Apply a stack's part for a text encoder (`clip` or `t5`) for the time of the context.

    It runs once for each prompt, so that merging would cost more than it saves.
    """
    with ExitStack() as undo:
        if stack:
            _patch(encoder, stack.patches(part), "beside", undo)
        yield


def widened(params: FluxParams, stack: LoraStack) -> FluxParams:
    """The model's sizes with these LoRAs: a control LoRA reads 128 channels where the model reads 64."""
    wide = stack.in_channels
    if wide <= params.in_channels:
        return params
    if params.in_channels != params.out_channels:
        raise FluxError(
            f"a LoRA that reads {wide} channels cannot widen a model that reads {params.in_channels}: "
            "it is made for FLUX.1 dev; load that"
        )
    return replace(params, in_channels=wide)


def _widen(transformer: FluxTransformer, params: FluxParams, undo: ExitStack) -> None:
    """Give the input layer columns of zeros, beside which a control LoRA's numbers count alone."""
    if params == transformer.params:
        return
    old, before = transformer.img_in, transformer.params
    weight = weight_of(old, transformer.dtype)
    extra = weight.new_zeros(weight.shape[0], params.in_channels - weight.shape[1])
    undo.callback(setattr, transformer, "params", before)
    undo.callback(setattr, transformer, "img_in", old)
    transformer.img_in, transformer.params = _plain(torch.cat([weight, extra], dim=1), old.bias), params


def _plain(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), bias
    return linear


def _set_value(transformer: FluxTransformer, name: str, value: Tensor, undo: ExitStack) -> None:
    """Put a whole tensor (a norm's scale, seldom a weight) in the place of the model's own."""
    path, _, attribute = name.rpartition(".")
    module = transformer.get_submodule(path)
    if isinstance(module, PackedLinear):
        owner, _, attribute = path.rpartition(".")
        new = _plain(value.to(_numbers(transformer, module)), module.bias)
        old, module = module, transformer.get_submodule(owner)
    else:
        old = getattr(module, attribute)
        new = nn.Parameter(value.to(old), requires_grad=False)
    undo.callback(setattr, module, attribute, old)
    setattr(module, attribute, new)


def _patch(model: nn.Module, layers: dict[str, list[Weighted]], mode: str, undo: ExitStack) -> None:
    for name, patches in layers.items():
        place = linear_at(model, name)
        if place is None:  # `fit` has told which layers the model does not have
            continue
        owner, child = place
        base = getattr(owner, child)
        patches = [(settled(patch, base), weight) for patch, weight in patches]
        if _merges(patches, base, mode):
            undo.callback(setattr, base, "weight", base.weight)
            undo.callback(setattr, base, "bias", base.bias)
            _merge(base, patches)
        else:
            undo.callback(setattr, owner, child, base)
            setattr(owner, child, PatchedLinear(base, sides_of(patches, base, _numbers(model, base))))


def _numbers(model: nn.Module, base: nn.Module) -> Tensor:
    """An empty tensor with the device and the type that a layer computes in."""
    if isinstance(base, PackedLinear):
        return torch.empty(0, device=next(base.buffers()).device, dtype=model.dtype)
    return base.weight.new_empty(0)


def _merges(patches: Sequence[Weighted], base: nn.Module, mode: str) -> bool:
    """All patches of a layer go the same way: what is beside a weight must find it as it was."""
    light = all(patch.light for patch, _ in patches)
    return not isinstance(base, PackedLinear) and (mode == "merged" or (mode == "auto" and not light))


def _merge(base: nn.Linear, patches: Sequence[Weighted]) -> None:
    """The layer's weight with the changes written in, summed in float32 and rounded once."""
    old = base.weight.detach().float()
    weight, bias = old.clone(), base.bias.detach().float().clone() if base.bias is not None else None
    for patch, strength in patches:
        delta = patch.delta(rows_of(old, patch.rows)[:, : patch.shape[1]])
        rows_of(weight, patch.rows)[:, : delta.shape[1]].add_(delta, alpha=strength)
        if patch.bias is not None:
            bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
            rows_of(bias, patch.rows).add_(patch.bias.to(bias), alpha=strength)
    base.weight = nn.Parameter(weight.to(base.weight.dtype), requires_grad=False)
    if bias is not None:
        base.bias = nn.Parameter(bias.to(base.weight.dtype), requires_grad=False)


def linear_at(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """The module that owns a linear layer, and the layer's name in it; None where the model has no such layer.

    CLIP's layers lie one deeper in some versions of transformers.
    """
    for path in (name, f"text_model.{name}"):
        owner, _, child = path.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            continue
        if isinstance(getattr(module, child, None), (nn.Linear, PackedLinear)):
            return module, child
    return None
