"""From the tensors that a file has for one layer to patches: the flavour is told by which tensors there are."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..errors import FluxError
from .names import Target
from .patches import Full, Hadamard, Instead, Kronecker, LowRank, Magnitude, Patch

_FLOATS = tuple(
    getattr(torch, name)
    for name in ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
                 "float8_e5m2fnuz")
    if hasattr(torch, name)
)  # fmt: skip
_CONVOLVED = ("lokr_t1", "lokr_t2", "hada_t1", "hada_t2")  # the cores of convolutions, which FLUX.1 has none of

# The alpha of a layer without one of its own, given its rank, or None where it shows none.
Alpha = Callable[[int | None], float | None]


@dataclass
class Found:
    """All that a file says of one layer: its tensors by what they are to it, with their names."""

    target: Target
    names: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    alpha: float | None = None

    def take(self, slot: str) -> Tensor:
        """A factor as a matrix; a 1x1 convolution's is one."""
        tensor = self.tensors[slot]
        if tensor.dtype not in _FLOATS:
            raise FluxError(f"tensor {self.names[slot]} is stored as {tensor.dtype}, which is no number of a LoRA")
        matrix = tensor.reshape(tensor.shape[:2]) if tensor.dim() > 2 and tensor[0, 0].numel() == 1 else tensor
        if matrix.dim() != 2 or not matrix.numel():
            raise FluxError(f"tensor {self.names[slot]} should be a matrix and has shape {list(tensor.shape)}")
        return matrix

    def vector(self, slot: str, length: int) -> Tensor:
        """A bias, whose length must be that of the layer's output."""
        tensor = self.tensors[slot]
        if tensor.dtype not in _FLOATS or tensor.numel() != length or not length:
            raise FluxError(f"tensor {self.names[slot]} has shape {list(tensor.shape)} instead of [{length}]")
        return tensor.reshape(-1)

    def shapes(self, *slots: str) -> str:
        return " and ".join(f"{self.names[slot]} {list(self.tensors[slot].shape)}" for slot in slots)


def build(found: Found, alpha: Alpha) -> tuple[tuple[Patch, ...], set[str]]:
    """The patches of a layer (their rows set, halves where they belong) and the slots they were made of."""
    if any(slot in found.tensors for slot in _CONVOLVED):
        return (), set()
    changes, used = _changes(found, alpha)
    if "lengths" in found.tensors and len(changes) == 1:
        changes = [_magnitude(found, changes[0])]
        used.add("lengths")
    changes, biases = _with_bias(found, changes)
    replaced, wholes = _instead(found)
    changes, used = [*changes, *replaced], used | biases | wholes
    if found.target.swap:
        changes = [exchanged(patch) for patch in changes]
    placed = [patch for change in changes if (patch := _placed(found, change)) is not None]
    if len(placed) < len(changes):
        return (), set()
    return tuple(placed), used | ({"alpha"} & found.names.keys() if placed else set())


def _changes(found: Found, alpha: Alpha) -> tuple[list[Patch], set[str]]:
    """One patch of the weight for each flavour that the layer has tensors of."""
    changes: list[Patch] = []
    used: set[str] = set()
    for make, slots in _MAKERS.items():
        mine = slots & found.tensors.keys()
        if mine:
            changes.append(make(found, alpha))
            used |= mine
    return changes, used


def _low_rank(found: Found, alpha: Alpha) -> LowRank:
    for have, lost in (("down", "up"), ("up", "down")):
        if lost not in found.tensors:
            raise FluxError(f"tensor {found.names[have]} has no counterpart: the layer's {lost} matrix is missing")
    down, up = found.take("down"), found.take("up")
    if down.shape[0] != up.shape[1]:
        raise FluxError(f"mixed ranks: {found.shapes('down', 'up')} do not multiply")
    return LowRank(down=down, up=up, alpha=_alpha(found, alpha, len(down)))


def _alpha(found: Found, alpha: Alpha, rank: int) -> float | None:
    return alpha(rank) if found.alpha is None else found.alpha


def _factors(found: Found, slot: str) -> tuple[Tensor, ...]:
    """A matrix of LoKr, whole (`lokr_w1`) or in two factors (`lokr_w1_a`, `lokr_w1_b`)."""
    pair = (f"{slot}_a", f"{slot}_b")
    if slot in found.tensors and not any(name in found.tensors for name in pair):
        return (found.take(slot),)
    if slot in found.tensors or not all(name in found.tensors for name in pair):
        have = ", ".join(name for name in found.names.values() if "lokr" in name)
        raise FluxError(f"{slot} should be there once, whole or as {pair[0]} and {pair[1]}; there is {have}")
    left, right = (found.take(name) for name in pair)
    if left.shape[1] != right.shape[0]:
        raise FluxError(f"mixed ranks: {found.shapes(*pair)} do not multiply")
    return left, right


def _kronecker(found: Found, alpha: Alpha) -> Kronecker:
    one, two = _factors(found, "lokr_w1"), _factors(found, "lokr_w2")
    ranks = [factors[0].shape[1] for factors in (two, one) if len(factors) == 2]
    return Kronecker(w1=one, w2=two, alpha=_alpha(found, alpha, ranks[0]) if ranks else alpha(None))


def _hadamard(found: Found, alpha: Alpha) -> Hadamard:
    slots = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
    lost = [slot for slot in slots if slot not in found.tensors]
    if lost:
        raise FluxError(f"{next(iter(found.names.values()))} has no counterpart: the layer's {lost[0]} is missing")
    one, two = (found.take(slots[0]), found.take(slots[1])), (found.take(slots[2]), found.take(slots[3]))
    if one[0].shape[1] != one[1].shape[0] or two[0].shape[1] != two[1].shape[0]:
        raise FluxError(f"mixed ranks: {found.shapes(*slots)} do not multiply")
    if one[0].shape[0] != two[0].shape[0] or one[1].shape[1] != two[1].shape[1]:
        raise FluxError(f"{found.shapes(*slots)} do not make matrices of one shape")
    return Hadamard(w1=one, w2=two, alpha=_alpha(found, alpha, len(one[1])))


def _full(found: Found, alpha: Alpha) -> Full:
    return Full(diff=found.take("diff"))


_MAKERS: Mapping[Callable[[Found, Alpha], Patch], set[str]] = {
    _low_rank: {"down", "up"},
    _kronecker: {"lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"},
    _hadamard: {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    _full: {"diff"},
}


def _magnitude(found: Found, change: Patch) -> Magnitude:
    """Lengths of rows as (rows, 1) or, as PEFT writes them, (rows,); of columns as (1, in)."""
    rows, columns = change.shape
    lengths = found.tensors["lengths"]
    shape = tuple(lengths.shape)
    if lengths.dtype not in _FLOATS or shape not in ((rows,), (rows, 1), (1, columns)):
        raise FluxError(
            f"tensor {found.names['lengths']} has shape {list(shape)}, which fits neither the rows nor the columns of "
            f"a layer of shape {[rows, columns]}"
        )
    return Magnitude(change=change, lengths=lengths.reshape(rows, 1) if shape == (rows,) else lengths)


def _with_bias(found: Found, changes: list[Patch]) -> tuple[list[Patch], set[str]]:
    """`lora_B.bias` goes through the same scale as its matrix, `diff_b` is the difference itself."""
    used = {"bias", "diff_b"} & found.tensors.keys()
    if not used:
        return changes, used
    length = changes[0].shape[0] if changes else max(found.tensors[slot].numel() for slot in used)
    total = None
    for slot in sorted(used):
        bias = found.vector(slot, length)
        scale = getattr(changes[0], "scale", 1.0) if changes and slot == "bias" else 1.0
        bias = bias if scale == 1.0 else bias.float() * scale
        total = bias if total is None else total.float() + bias.float()
    first = changes[0] if changes else Full()
    return [replace(first, bias=total), *changes[1:]], used


def _instead(found: Found) -> tuple[list[Instead], set[str]]:
    """What takes the place of the layer's own weight (as ComfyUI or as PEFT writes it) and of its bias (PEFT)."""
    weight = next((slot for slot in ("set_weight", "whole") if slot in found.tensors), None)
    used = {weight, "whole_b"} & found.tensors.keys()
    if not used:
        return [], set()
    matrix = found.take(weight) if weight else None
    length = len(matrix) if weight else found.tensors["whole_b"].numel()
    bias = found.vector("whole_b", length) if "whole_b" in used else None
    return [Instead(diff=matrix, bias=bias)], used


def _placed(found: Found, patch: Patch) -> Patch | None:
    """The patch with its rows; None where nothing tells them (the bias alone of a joined layer's last part)."""
    above = found.target.above
    if above is None:
        return patch
    rows, width = patch.shape
    if above < 3 and not found.target.joined:  # q, k, v: as many rows as the model is wide
        if width not in (0, rows):
            some = next(iter(found.names.values()))
            raise FluxError(f"{some} belongs to a layer of shape {[rows, width]}, which should be square in FLUX.1")
        width = rows
    if above and not width:
        return None
    return replace(patch, rows=(above * width, above * width + rows))


def exchanged(patch: Patch) -> Patch:
    """The patch with the halves of its rows exchanged; factors are copied, the layer's input is not touched."""
    if patch.shape[0] % 2:
        raise FluxError(f"a layer of two halves cannot have {patch.shape[0]} rows")
    bias = None if patch.bias is None else _turned(patch.bias)
    if isinstance(patch, LowRank):
        return replace(patch, up=_turned(patch.up), bias=bias)
    if isinstance(patch, Hadamard):
        one, two = ((_turned(left), right) for left, right in (patch.w1, patch.w2))
        return replace(patch, w1=one, w2=two, bias=bias)
    if isinstance(patch, Full):
        return replace(patch, diff=None if patch.diff is None else _turned(patch.diff), bias=bias)
    if isinstance(patch, Magnitude):
        lengths = _turned(patch.lengths) if len(patch.lengths) > 1 else patch.lengths
        return replace(patch, change=exchanged(patch.change), lengths=lengths, bias=bias)
    return _exchanged_kronecker(patch, bias)


def _exchanged_kronecker(patch: Kronecker, bias: Tensor | None) -> Patch:
    """Whole blocks of rows change places if w1 has an even number of rows; if it has one, w2's rows do."""
    rows = len(patch.w1[0])
    if rows % 2 == 0:
        return replace(patch, w1=(_turned(patch.w1[0]), *patch.w1[1:]), bias=bias)
    if rows == 1:
        return replace(patch, w2=(_turned(patch.w2[0]), *patch.w2[1:]), bias=bias)
    return Full(diff=_turned(patch.delta(torch.empty(0))), bias=bias)


def _turned(tensor: Tensor) -> Tensor:
    half = len(tensor) // 2
    return torch.cat([tensor[half:], tensor[:half]])


def checked_alpha(name: str, value: float) -> float:
    """An alpha that can be one (below 0 it turns the change round); anything else is a damaged file."""
    if not math.isfinite(value) or value == 0:
        raise FluxError(f"{name} is {value:g}, and a LoRA's alpha is a number other than 0; the file is damaged")
    return value
