"""Constraints that keep a part of the picture."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .sampling import Step


@dataclass(frozen=True)
class KeepOutside:
    """Outside the mask, put the source back at this step's noise level; all fields are tokens, mask 1 = redraw."""

    source: Tensor
    noise: Tensor
    mask: Tensor

    def __call__(self, x: Tensor, step: Step) -> Tensor:
        kept = renoise(self.source, self.noise, step.sigma_next)
        return (1 - self.mask) * kept + self.mask * x


def renoise(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """The straight path of the flow: the clean latents at noise level sigma, which is rounded to their dtype first."""
    level = torch.tensor(sigma, dtype=clean.dtype)
    return level * noise + (1.0 - level) * clean
