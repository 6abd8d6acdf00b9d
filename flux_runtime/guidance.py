"""Guides: how the predictions of a run's branches become one velocity."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .sampling import Branch


@dataclass(frozen=True)
class Plain:
    """One prompt, one prediction a step."""

    branch: Branch

    def __call__(self, predict: Callable[[Branch], Tensor]) -> Tensor:
        return predict(self.branch)


@dataclass(frozen=True)
class Cfg:
    """True classifier-free guidance: away from the negative prompt, by `scale`; two predictions a step."""

    positive: Branch
    negative: Branch
    scale: float

    def __call__(self, predict: Callable[[Branch], Tensor]) -> Tensor:
        positive, negative = predict(self.positive), predict(self.negative)
        return negative + self.scale * (positive - negative)
