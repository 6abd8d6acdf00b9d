"""Solvers of the flow: one step from sigma to sigma_next. `velocity(x, sigma)` asks the guided model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .sampling import Step

Velocity = Callable[[Tensor, float], Tensor]


def euler(velocity: Velocity, x: Tensor, step: Step) -> tuple[Tensor, Tensor]:
    """First order. Returns x at sigma_next and the clean estimate."""
    v = velocity(x, step.sigma)
    return advance(x, v, step.sigma_next - step.sigma), advance(x, v, -step.sigma)


def advance(x: Tensor, v: Tensor, distance: float) -> Tensor:
    """x + distance * v; a half type rounds the distance too, before the product, as the oracle does on every device."""
    return x + torch.tensor(distance, dtype=torch.float32).to(v.dtype) * v
