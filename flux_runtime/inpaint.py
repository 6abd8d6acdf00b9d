"""Constraints that keep a part of the picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .sampling import Step

HALF_LEVEL = 1 / 512  # of an 8-bit mask: it absorbs what the mask lost in the dtype of the model


@dataclass(frozen=True)
class KeepOutside:
    """Outside the mask, put the source back at this step's noise level; all fields are tokens, mask 1 = redraw."""

    source: Tensor
    noise: Tensor
    mask: Tensor

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        kept = renoise(self.source, self.noise, step.sigma_next)
        return (1 - self.mask) * kept + self.mask * x


@dataclass(frozen=True)
class Differential:
    """A soft mask as a plan: the fainter a pixel, the later it is free to change (arXiv 2306.00950).

    A pixel of mask m is put back, at each step's noise level, until the run's progress has reached 1 - m, and to the
    end where m is 0. All fields are tokens.
    """

    source: Tensor
    noise: Tensor
    mask: Tensor

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        progress = (step.index + 1) / step.count
        free = (self.mask >= 1 - progress - HALF_LEVEL) & (self.mask > HALF_LEVEL)
        return torch.where(free, x, renoise(self.source, self.noise, step.sigma_next))


def renoise(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """The straight path of the flow: the clean latents at noise level sigma, which is rounded to their dtype first."""
    level = torch.tensor(sigma, dtype=clean.dtype)
    return level * noise + (1.0 - level) * clean
