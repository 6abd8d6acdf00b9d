"""LoRAs on a model for as long as a context lasts; afterwards every byte of it is what it was.

Low-rank changes, LoKr and DoRA that measures rows act beside their layer, whatever its weight is stored as. What would
double the work of a step there (LoHa, whole differences, DoRA that measures columns) goes into a copy of a plain weight
for that time, and beside a packed one, which is never packed anew. A control LoRA widens the input and sets norms.
Whole tensors take their places first, so that the changes of all LoRAs count with them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FluxError
from ..model.transformer import FluxTransformer
from ..quant.packed import PackedLinear, weight_of
from ..variants import FluxParams
from .magnitudes import settled
from .patches import Instead, NormChange, rows_of
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
            _set_norms(transformer, stack.norms("transformer"), undo)
            _patch(transformer, stack.patches("transformer"), mode, undo)
        yield


@contextmanager
def applied_to_encoder(encoder: nn.Module, part: str, stack: LoraStack) -> Iterator[None]:
    """Apply a stack's part for a text encoder (`clip` or `t5`) for the time of the context.

    It runs once for each prompt, so that merging would cost more than it saves.
    """
    with ExitStack() as undo:
        if stack:
            _set_norms(encoder, stack.norms(part), undo)
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
    old = transformer.img_in
    weight = weight_of(old, transformer.dtype)
    extra = weight.new_zeros(weight.shape[0], params.in_channels - weight.shape[1])
    _put(transformer, "params", params, undo)
    _put(transformer, "img_in", _plain(torch.cat([weight, extra], dim=1), old.bias), undo)


def _put(module: nn.Module, attribute: str, new: Any, undo: ExitStack) -> None:
    undo.callback(setattr, module, attribute, getattr(module, attribute))
    setattr(module, attribute, new)


def _plain(weight: Tensor, bias: nn.Parameter | None) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), bias
    return linear


def _set_norms(model: nn.Module, norms: Mapping[str, Sequence[tuple[NormChange, float]]], undo: ExitStack) -> None:
    """Put other tensors in the places of norms' own: the last whole one, or the own, and all differences."""
    for name, changes in norms.items():
        place = norm_at(model, name)
        if place is None:  # `fit` has told which the model does not have
            continue
        old = getattr(*place)
        wholes = [change.whole for change, _ in changes if change.whole is not None]
        new = (wholes or [old])[-1].to(old.device, torch.float32)
        for change, weight in changes:
            if change.diff is not None:
                new = new + weight * change.diff.to(new)
        _put(*place, nn.Parameter(new.to(old), requires_grad=False), undo)


def _set_whole(owner: nn.Module, child: str, patches: Sequence[Instead], like: Tensor, undo: ExitStack) -> None:
    """Put whole weights and biases, or rows of them, in the places of a linear layer's own."""
    base = getattr(owner, child)
    if any(patch.diff is not None for patch in patches):
        weight = weight_of(base, like.dtype).clone()
        for patch in patches:
            if patch.diff is not None:
                rows_of(weight, patch.rows)[:, : patch.shape[1]] = patch.diff.to(weight)
        base = _plain(weight, base.bias)
        _put(owner, child, base, undo)
    biases = [patch for patch in patches if patch.bias is not None]
    if biases:
        bias = like.new_zeros(base.out_features) if base.bias is None else base.bias.detach().clone()
        for patch in biases:
            rows_of(bias, patch.rows).copy_(patch.bias)
        _put(base, "bias", nn.Parameter(bias, requires_grad=False), undo)


def _patch(model: nn.Module, layers: dict[str, list[Weighted]], mode: str, undo: ExitStack) -> None:
    for name, patches in layers.items():
        place = linear_at(model, name)
        if place is None:  # `fit` has told which layers the model does not have
            continue
        owner, child = place
        like = _numbers(model, getattr(owner, child))
        _set_whole(owner, child, [patch for patch, _ in patches if isinstance(patch, Instead)], like, undo)
        base = getattr(owner, child)
        changes = [(settled(patch, base), weight) for patch, weight in patches if not isinstance(patch, Instead)]
        if not changes:
            continue
        if _merges(changes, base, mode):
            undo.callback(setattr, base, "weight", base.weight)
            undo.callback(setattr, base, "bias", base.bias)
            _merge(base, changes)
        else:
            _put(owner, child, PatchedLinear(base, sides_of(changes, base, like)), undo)


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
    """The module that owns a linear layer, and the layer's name in it; None where the model has no such layer."""
    return _place(model, name, (nn.Linear, PackedLinear))


def norm_at(model: nn.Module, name: str) -> tuple[nn.Module, str] | None:
    """A norm, and the name of its weight or bias; None where the model has no such tensor."""
    return _place(model, name, nn.Parameter)


def _place(model: nn.Module, name: str, kinds: type | tuple[type, ...]) -> tuple[nn.Module, str] | None:
    """CLIP's layers lie one deeper in some versions of transformers."""
    for path in (name, f"text_model.{name}"):
        owner, _, child = path.rpartition(".")
        try:
            module = model.get_submodule(owner)
        except AttributeError:
            continue
        if isinstance(getattr(module, child, None), kinds):
            return module, child
    return None
