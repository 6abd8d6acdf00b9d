"""How patches act beside a linear layer, which stays as it is: y = W x + b, plus what each of them adds.

So a layer of any kind of weight takes them, nothing is rounded away into it, and removing them is exact. All low-rank
patches of a layer act as one: changing a weight changes one small vector, not a shape. A patch may be narrower than
its layer, whose further inputs it does not see.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quant.packed import weight_of
from .patches import Full, Hadamard, Kronecker, LowRank, Patch, Rescaled, Rows, rows_of, whole

Weighted = tuple[Patch, float]


class PatchedLinear(nn.Module):
    """Stands where a linear layer stood, for as long as patches are applied to it."""

    def __init__(self, base: nn.Module, sides: Sequence[nn.Module]) -> None:
        super().__init__()
        self.base = base
        self.sides = nn.ModuleList(sides)

    @property
    def weight(self) -> Tensor | None:
        """The layer's own: transformers asks for its dtype."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        for side in self.sides:
            side(x, y)
        return y


def outputs(y: Tensor, rows: Rows) -> Tensor:
    """What a layer's rows have made: y (..., out) or a part of it."""
    return y if rows is None else y[..., rows[0] : rows[1]]


class Side(nn.Module):
    """Adds to y (..., out), in its rows, what patches make of x (..., in)."""

    def __init__(self, rows: Rows = None) -> None:
        super().__init__()
        self.rows = rows

    def part(self, y: Tensor) -> Tensor:
        return outputs(y, self.rows)


class RowGainSide(Side):
    """Rows of the layer grown by a gain each; the first of the sides, for it reads what the layer alone has made."""

    def __init__(self, gain: Tensor, bias: Tensor | None, like: Tensor) -> None:
        super().__init__()
        self.register_buffer("gain", gain.to(like))
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor, y: Tensor) -> None:
        y.addcmul_(y if self.bias is None else y - self.bias, self.gain)


class ColumnGainSide(Side):
    """Columns of the layer's parts grown by a gain each: the weight acts once more, on the input times the gain."""

    def __init__(self, gains: dict[Rows, Tensor], base: nn.Module, like: Tensor) -> None:
        super().__init__()
        self.base = (base,)  # in a tuple: the layer is not this module's own
        self.parts = tuple(gains)
        self.register_buffer("gains", torch.stack(list(gains.values())).to(like))

    def forward(self, x: Tensor, y: Tensor) -> None:
        weight = weight_of(self.base[0], x.dtype)
        for rows, gain in zip(self.parts, self.gains, strict=True):
            outputs(y, rows).add_(F.linear(x * gain, rows_of(weight, rows)))


class LowRankSide(Side):
    """Several LoRAs of the same rows as one of their summed rank: y += (x down^T * gain) up^T."""

    def __init__(self, patches: Sequence[tuple[LowRank, float]], rows: Rows, like: Tensor) -> None:
        super().__init__(rows)
        gains = [torch.full((len(p.down),), p.scale * weight) for p, weight in patches]
        self.register_buffer("down", torch.cat([p.down.to(like) for p, _ in patches]))
        self.register_buffer("up", torch.cat([p.up.to(like) for p, _ in patches], dim=1))
        self.register_buffer("gain", torch.cat(gains).to(like.device))  # float32: rounded, it is another weight

    def forward(self, x: Tensor, y: Tensor) -> None:
        hidden = (F.linear(x[..., : self.down.shape[1]], self.down) * self.gain).to(y.dtype)
        part = self.part(y.view(-1, y.shape[-1]))
        part.addmm_(hidden.view(-1, hidden.shape[-1]), self.up.T)


class KroneckerSide(Side):
    """LoKr without writing its product out: x as a matrix, multiplied from both sides."""

    def __init__(self, patch: Kronecker, weight: float, like: Tensor) -> None:
        super().__init__(patch.rows)
        exact = like.float()
        self.register_buffer("one", (whole(patch.w1, exact) * (patch.scale * weight)).to(like))
        self.register_buffer("two", whole(patch.w2, exact).to(like))

    def forward(self, x: Tensor, y: Tensor) -> None:
        sizes = self.one.shape[1], self.two.shape[1]
        wide = x[..., : sizes[0] * sizes[1]].unflatten(-1, sizes)
        self.part(y).add_((self.one @ F.linear(wide, self.two)).flatten(-2))


class HadamardSide(Side):
    """LoHa, multiplied out at every call: its factors are small and the change is as large as the weight."""

    def __init__(self, patch: Hadamard, weight: float, like: Tensor) -> None:
        super().__init__(patch.rows)
        left = patch.w1[0].to(like.float()) * (patch.scale * weight)
        for name, factor in zip("abcd", (left, patch.w1[1], *patch.w2), strict=True):
            self.register_buffer(name, factor.to(like))

    def forward(self, x: Tensor, y: Tensor) -> None:
        change = (self.a @ self.b).mul_(self.c @ self.d)
        self.part(y).add_(F.linear(x[..., : change.shape[1]], change))


class DeltaSide(Side):
    """A whole difference, where the weight cannot take it up."""

    def __init__(self, patch: Full, weight: float, like: Tensor) -> None:
        super().__init__(patch.rows)
        self.register_buffer("delta", (patch.diff.to(like.float()) * weight).to(like))

    def forward(self, x: Tensor, y: Tensor) -> None:
        self.part(y).add_(F.linear(x[..., : self.delta.shape[1]], self.delta))


class BiasSide(Side):
    """What patches add whatever x is."""

    def __init__(self, bias: Tensor, weight: float, rows: Rows, like: Tensor) -> None:
        super().__init__(rows)
        self.register_buffer("bias", (bias.to(like.float()) * weight).to(like))

    def forward(self, x: Tensor, y: Tensor) -> None:
        self.part(y).add_(self.bias)


_SIDES = {Kronecker: KroneckerSide, Hadamard: HadamardSide, Full: DeltaSide}


def sides_of(patches: Sequence[Weighted], base: nn.Module, like: Tensor) -> list[Side]:
    """All sides of one layer; `like` has the device and the type to compute in."""
    biases = [BiasSide(p.bias, weight, p.rows, like) for p, weight in patches if p.bias is not None]
    grown = [(p, weight) for p, weight in patches if isinstance(p, Rescaled)]
    changes = [(replace(p.change, rows=p.rows) if isinstance(p, Rescaled) else p, weight) for p, weight in patches]
    low: dict[tuple[Rows, int], list[Weighted]] = {}
    others = []
    for patch, weight in changes:
        if isinstance(patch, LowRank):
            low.setdefault((patch.rows, patch.shape[1]), []).append((patch, weight))
        elif not isinstance(patch, Full) or patch.diff is not None:
            others.append(_SIDES[type(patch)](patch, weight, like))
    joined = [LowRankSide(group, rows, like) for (rows, _), group in low.items()]
    return [*_gains(grown, base, like), *others, *biases, *joined]


def _gains(grown: Sequence[tuple[Rescaled, float]], base: nn.Module, like: Tensor) -> list[Side]:
    """Gains of rows are one vector for the whole layer; those of columns one for each part of it."""
    of_rows = torch.zeros(base.out_features, device=like.device)
    of_columns: dict[Rows, Tensor] = {}
    for patch, weight in grown:
        if patch.by_rows:
            rows_of(of_rows, patch.rows).add_(patch.gain.flatten().to(of_rows), alpha=weight)
        else:
            whole_width = of_columns.setdefault(patch.rows, torch.zeros(base.in_features, device=like.device))
            whole_width[: patch.shape[1]].add_(patch.gain.flatten().to(of_rows), alpha=weight)
    sides: list[Side] = []
    if any(patch.by_rows for patch, _ in grown):
        sides.append(RowGainSide(of_rows, base.bias, like))
    if of_columns:
        sides.append(ColumnGainSide(of_columns, base, like))
    return sides
