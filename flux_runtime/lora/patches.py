"""What a LoRA file says about one linear layer, whatever its flavour: a change of the layer's weight, and of its bias.

A layer is named natively (`double_blocks.0.img_attn.qkv`); a change may touch only some rows of its output, because
other layouts keep q, k and v apart. `delta` is the change written out, which every other way of applying it must equal.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

Rows = tuple[int, int] | None  # [start, stop) of the layer's output; None: all of it


@dataclass(frozen=True, eq=False)
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

    @property
    def light(self) -> bool:
        """Whether it takes little memory and time beside its layer."""
        return False

    def rescaled(self, factor: Tensor) -> Patch:
        """The same change with its rows multiplied by a factor (rows, 1), or its columns by one (1, in)."""
        raise NotImplementedError


def whole(factors: tuple[Tensor, ...], like: Tensor) -> Tensor:
    """A matrix given whole or as two factors, on the device and in the type of `like`."""
    return factors[0].to(like) if len(factors) == 1 else factors[0].to(like) @ factors[1].to(like)


def rows_of(tensor: Tensor, rows: Rows) -> Tensor:
    return tensor if rows is None else tensor[rows[0] : rows[1]]


def _by_rows(factor: Tensor) -> bool:
    return factor.shape[1] == 1


def _size(factors: tuple[Tensor, ...]) -> tuple[int, int]:
    return factors[0].shape[0], factors[-1].shape[1]


@dataclass(frozen=True, eq=False)
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

    @property
    def light(self) -> bool:
        return True

    def rescaled(self, factor: Tensor) -> LowRank:
        if _by_rows(factor):
            return replace(self, up=self.up.to(factor) * factor)
        return replace(self, down=self.down.to(factor) * factor)


@dataclass(frozen=True, eq=False)
class Kronecker(Patch):
    """LoKr (LyCORIS): scale * kron(w1, w2), each given whole or as two factors (left, right).

    The scale is alpha / r where a factor has a rank r, and alpha where both are whole (r is 1 then); no alpha means 1.
    """

    w1: tuple[Tensor, ...] = ()
    w2: tuple[Tensor, ...] = ()
    alpha: float | None = None

    @property
    def scale(self) -> float:
        factored = self.w2 if len(self.w2) == 2 else self.w1
        rank = factored[0].shape[1] if len(factored) == 2 else 1
        return 1.0 if self.alpha is None else self.alpha / rank

    @property
    def shape(self) -> tuple[int, int]:
        (a, b), (c, d) = _size(self.w1), _size(self.w2)
        return a * c, b * d

    def delta(self, weight: Tensor) -> Tensor:
        return self.scale * torch.kron(whole(self.w1, weight), whole(self.w2, weight))

    @property
    def light(self) -> bool:
        return True

    def rescaled(self, factor: Tensor) -> Full:
        return Full(self.rows, self.bias, self.delta(factor) * factor)


@dataclass(frozen=True, eq=False)
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

    def rescaled(self, factor: Tensor) -> Hadamard:
        left, right = (part.to(factor) for part in self.w1)
        return replace(self, w1=(left * factor, right) if _by_rows(factor) else (left, right * factor))


@dataclass(frozen=True, eq=False)
class Full(Patch):
    """The whole difference, as merging tools extract it (`diff`, and `diff_b` for the bias); None: the bias alone."""

    diff: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return tuple(self.diff.shape) if self.diff is not None else (len(self.bias), 0)

    def delta(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight) if self.diff is None else self.diff.to(weight)

    @property
    def light(self) -> bool:
        return self.diff is None

    def rescaled(self, factor: Tensor) -> Full:
        return self if self.diff is None else replace(self, diff=self.diff.to(factor) * factor)


@dataclass(frozen=True, eq=False)
class Instead(Full):
    """A whole weight, a whole bias, or both, in the place of the layer's own: at any weight of the LoRA but 0.

    That is how PEFT has it, whose scale is one of low-rank changes alone: such a tensor has been trained for itself,
    and what lies between two of them is neither. Of several for the same rows the last one counts.
    """

    def delta(self, weight: Tensor) -> Tensor:
        return torch.zeros_like(weight) if self.diff is None else self.diff.to(weight) - weight


@dataclass(frozen=True, eq=False)
class NormChange:
    """What a file says of a tensor of a norm: another in its place (as `Instead`), what is added to it, or both."""

    whole: Tensor | None = None
    diff: Tensor | None = None

    @property
    def shapes(self) -> set[torch.Size]:
        return {tensor.shape for tensor in (self.whole, self.diff) if tensor is not None}


@dataclass(frozen=True, eq=False)
class Rescaled(Patch):
    """The weight's own rows or columns grown by a gain (rows, 1) or (1, in), and a change: weight * gain + change."""

    gain: Tensor = None
    change: Patch = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.change.shape

    @property
    def by_rows(self) -> bool:
        return _by_rows(self.gain)

    @property
    def light(self) -> bool:
        return self.by_rows and self.change.light

    def delta(self, weight: Tensor) -> Tensor:
        return weight * self.gain.to(weight) + self.change.delta(weight)


@dataclass(frozen=True, eq=False)
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
        """What the changed weight is multiplied by, shaped as `lengths`; it takes the norms of a whole weight."""
        changed = weight + self.change.delta(weight)
        norm = changed.norm(dim=1 if _by_rows(self.lengths) else 0, keepdim=True)
        return self.lengths.to(weight) / norm.clamp_min(torch.finfo(torch.float32).tiny)

    def settled(self, factor: Tensor) -> Rescaled:
        """What it comes to beside the weight that the factor was made for."""
        return Rescaled(self.rows, self.bias, factor - 1, self.change.rescaled(factor))

    def delta(self, weight: Tensor) -> Tensor:
        return self.settled(self.factor(weight)).delta(weight)
