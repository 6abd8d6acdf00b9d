"""DoRA's factors, remembered: each takes the norms of a whole weight, and a run changes neither weight nor patch."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, MutableMapping

import torch
from torch import Tensor, nn

from ..quant.packed import weight_of
from .patches import Magnitude, Patch, rows_of

# What a weight was when its factor was made: its tensors, and how often each had been written to.
Stamp = tuple[tuple[weakref.ref[Tensor], int], ...]
_factors: MutableMapping[Magnitude, MutableMapping[nn.Module, tuple[Stamp, Tensor]]] = weakref.WeakKeyDictionary()


def settled(patch: Patch, base: nn.Module) -> Patch:
    """The patch as it is beside or in a layer's weight; norms are taken anew only where the weight is another."""
    if not isinstance(patch, Magnitude):
        return patch
    known = _factors.setdefault(patch, weakref.WeakKeyDictionary())
    if base not in known or not _current(known[base][0], base):
        weight = rows_of(weight_of(base, torch.float32), patch.rows)[:, : patch.shape[1]]
        known[base] = _stamp(base), patch.factor(weight)
    return patch.settled(known[base][1])


def _stamp(base: nn.Module) -> Stamp:
    return tuple((weakref.ref(tensor), _writes(tensor)) for tensor in _tensors(base))


def _current(stamp: Stamp, base: nn.Module) -> bool:
    now = list(_tensors(base))
    same = (then() is tensor and count == _writes(tensor) for (then, count), tensor in zip(stamp, now, strict=False))
    return len(stamp) == len(now) and all(same)


def _tensors(base: nn.Module) -> Iterator[Tensor]:
    yield from base.parameters()
    yield from base.buffers()


def _writes(tensor: Tensor) -> int:
    """Tensors made in inference mode count nothing, and cannot be written to outside of it.

    Writing through `.data` is not counted; nothing here does.
    """
    return 0 if tensor.is_inference() else tensor._version
