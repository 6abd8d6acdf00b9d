"""What a LoRA file says about one linear layer, whatever its flavour: a change of the layer's weight, and of its bias.

A layer is named natively (`double_blocks.0.img_attn.qkv`); a change may touch only some rows of its output, because
other layouts keep q, k and v apart. `delta` is the change written out, which every other way of applying it must equal.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Rows = tuple[int, int] | None  # [start, stop) of the layer's output; None: all of it


@dataclass(frozen=True)
class Patch:
    """Base of the flavours. `bias` is (rows,)."""

    rows: Rows = None
    bias: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, in) of the weight it changes; the input may be narrower than the layer's, zeros stand for the rest."""
        raise NotImplementedError

    def delta(self, weight: Tensor) -> Tensor:
        """The change (rows, in) at weight 1, on the device and in the type of `weight`, the layer's own (rows, in)."""
        raise NotImplementedError


def whole(factors: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """A matrix given whole or as two factors, on the device and in the type of `like`."""
    return factors[0].to(like) if len(factors) == 1 else factors[0].to(like) @ factors[1].to(like)


def _size(factors: tuple[Tensor, ...]) -> tuple[int, int]:
    return factors[0].shape[0], factors[-1].shape[1]


@dataclass(frozen=True)
class LowRank(Patch):
    """LoRA (Hu et al., 2021): alpha / r * up @ down, with down (r, in) and up (rows, r); no alpha means alpha = r."""

    down: Tensor = None
    up: Tensor = None
    alpha: float | None = None

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale * whole((self.up, self.down), weight)


@dataclass(frozen=True)
class Kronecker(Patch):
    """LoKr (LyCORIS): scale * kron(w1, w2), each given whole or as two factors (left, right).

    The scale is alpha / r where a factor has a rank r, and 1 where both are whole.
    """

    w1: tuple[Tensor, ...] = ()
    w2: tuple[Tensor, ...] = ()
    alpha: float | None = None

    @property
    def scale(self) -> float:
        factored = self.w2 if len(self.w2) == 2 else self.w1
        return self.alpha / factored[0].shape[1] if len(factored) == 2 and self.alpha is not None else 1.0

    @property
    def shape(self) -> tuple[int, int]:
        (a, b), (c, d) = _size(self.w1), _size(self.w2)
        return a * c, b * d

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale * torch.kron(whole(self.w1, weight), whole(self.w2, weight))


@dataclass(frozen=True)
class Hadamard(Patch):
    """LoHa (LyCORIS): alpha / r * (w1[0] @ w1[1]) * (w2[0] @ w2[1]), elementwise."""

    w1: tuple[Tensor, Tensor] = ()
    w2: tuple[Tensor, Tensor] = ()
    alpha: float | None = None

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.w1[1].shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return _size(self.w1)

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale * whole(self.w1, weight) * whole(self.w2, weight)


@dataclass(frozen=True)
class Full(Patch):
    """The whole difference, as merging tools extract it (`diff`, and `diff_b` for the bias); None: the bias alone."""

    diff: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.diff.shape) if self.diff is not None else (len(self.bias), 0)

    def delta(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight) if self.diff is None else self.diff.to(weight)


@dataclass(frozen=True)
class Magnitude(Patch):
    """DoRA (Liu et al., 2024): weight + change, each row (or each column) rescaled to a learnt length.

    `lengths` is (rows, 1), or (1, in) for the files that measure columns.
    """

    change: Patch = None
    lengths: Tensor = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.change.shape

    def factor(self, weight: Tensor) -> Tensor:
        """What the changed weight is multiplied by, shaped as `lengths`."""
        changed = weight + self.change.delta(weight)
        axis = 1 if self.lengths.shape[1] == 1 else 0
        return self.lengths.to(weight) / changed.norm(dim=axis, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)

    def delta(self, weight: Tensor) -> Tensor:
        return (weight + self.change.delta(weight)) * self.factor(weight) - weight
