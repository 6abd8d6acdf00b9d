"""How patches act beside a linear layer, which stays as it is: y = W x + b, plus what each of them adds.

So a layer of any kind of weight takes them, nothing is rounded away into it, and removing them is exact. All low-rank
patches of a layer act as one: changing a weight changes one small vector, not a shape.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..quant.packed import product, weight_of
from .patches import Full, Hadamard, Kronecker, LowRank, Magnitude, Patch, Rows, whole

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


class Side(nn.Module):
    """Adds to y (..., out), in its rows, what patches make of x (..., in)."""

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def part(self, y: Tensor) -> Tensor:
        return y if self.rows is None else y[..., self.rows[0] : self.rows[1]]


class LowRankSide(Side):
    """Several LoRAs of the same rows as one of their summed rank: y += (x down^T * gain) up^T."""

    def __init__(self, patches: Sequence[tuple[LowRank, float]], rows: Rows, like: Tensor) -> None:
        super().__init__(rows)
        gains = [torch.full((len(p.down),), p.scale * weight) for p, weight in patches]
        self.register_buffer("down", torch.cat([p.down.to(like) for p, _ in patches]))
        self.register_buffer("up", torch.cat([p.up.to(like) for p, _ in patches], dim=1))
        self.register_buffer("gain", torch.cat(gains).to(like))

    def forward(self, x: Tensor, y: Tensor) -> None:
        hidden = F.linear(x[..., : self.down.shape[1]], self.down) * self.gain
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
        wide = x.unflatten(-1, (self.one.shape[1], self.two.shape[1]))
        self.part(y).add_((self.one @ F.linear(wide, self.two)).flatten(-2))


class DeltaSide(Side):
    """LoHa and whole differences, written out: where the weight cannot take them up, they stand beside it."""

    def __init__(self, patch: Hadamard | Full, weight: float, like: Tensor) -> None:
        super().__init__(patch.rows)
        self.register_buffer("delta", (patch.delta(like.float()) * weight).to(like))

    def forward(self, x: Tensor, y: Tensor) -> None:
        self.part(y).add_(F.linear(x[..., : self.delta.shape[1]], self.delta))


class MagnitudeSide(Side):
    """DoRA: the layer's own product and the change's, both rescaled, less what the layer has said already."""

    def __init__(self, patch: Magnitude, weight: float, base: nn.Module, like: Tensor) -> None:
        super().__init__(patch.rows)
        self.base = (base,)  # in a tuple: the layer is not this module's own
        self.change = side_of(replace(patch.change, rows=None), 1.0, like)
        factor = patch.factor(rows_of(weight_of(base, torch.float32), patch.rows).to(like.device))
        self.of_rows = factor.shape[1] == 1
        self.register_buffer("factor", factor.flatten().to(like))
        self.register_buffer("strength", torch.tensor(weight).to(like))  # a number would be compiled in

    def forward(self, x: Tensor, y: Tensor) -> None:
        if self.of_rows:
            own = self.part(product(self.base[0], x)) * (self.factor - 1)
            change = self._changed(x, own) * self.factor
        else:
            own = self.part(product(self.base[0], x * (self.factor - 1)))
            change = self._changed(x * self.factor, own)
        self.part(y).add_((own + change) * self.strength)

    def _changed(self, x: Tensor, like: Tensor) -> Tensor:
        y = torch.zeros_like(like)
        self.change(x, y)
        return y


class BiasSide(Side):
    """What patches add whatever x is."""

    def __init__(self, bias: Tensor, rows: Rows, like: Tensor) -> None:
        super().__init__(rows)
        self.register_buffer("bias", bias.to(like))

    def forward(self, x: Tensor, y: Tensor) -> None:
        self.part(y).add_(self.bias)


def rows_of(weight: Tensor, rows: Rows) -> Tensor:
    return weight if rows is None else weight[rows[0] : rows[1]]


def side_of(patch: Patch, weight: float, like: Tensor) -> Side:
    """The side of a patch that needs nothing of its layer; `like` has the device and the type to compute in."""
    if isinstance(patch, LowRank):
        return LowRankSide([(patch, weight)], patch.rows, like)
    if isinstance(patch, Kronecker):
        return KroneckerSide(patch, weight, like)
    return DeltaSide(patch, weight, like)


def sides_of(patches: Sequence[Weighted], base: nn.Module, like: Tensor) -> list[Side]:
    """All sides of one layer."""
    low: dict[tuple[Rows, int], list[Weighted]] = {}
    sides: list[Side] = []
    for patch, weight in patches:
        if isinstance(patch, LowRank):
            low.setdefault((patch.rows, patch.shape[1]), []).append((patch, weight))
        elif isinstance(patch, Magnitude):
            sides.append(MagnitudeSide(patch, weight, base, like))
        elif not isinstance(patch, Full) or patch.diff is not None:
            sides.append(side_of(patch, weight, like))
        if patch.bias is not None:
            sides.append(BiasSide(patch.bias * weight, patch.rows, like))
    return [*(LowRankSide(group, rows, like) for (rows, _), group in low.items()), *sides]
