"""Noise levels: sigma runs from 1 (noise) to 0 (picture)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .errors import FluxError


@dataclass(frozen=True)
class Schedule:
    """How a model spaces its sigmas: shifted by the number of canvas tokens (dev), or by a constant (schnell: 1).

    The fields carry the names and defaults of the published scheduler configs.
    """

    dynamic: bool = True
    shift: float = 3.0
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_tokens: int = 256
    max_tokens: int = 4096

    def __post_init__(self) -> None:
        if self.dynamic and self.base_tokens == self.max_tokens:
            raise FluxError(
                f"base_image_seq_len and max_image_seq_len are both {self.base_tokens}, and the shift follows a line "
                "between the two: correct them in scheduler_config.json (FLUX.1 dev: 256 and 4096)"
            )

    def mu(self, tokens: int) -> float:
        """The log shift for a canvas of so many tokens: linear through (256, 0.5) and (4096, 1.15), not clamped."""
        slope = (self.max_shift - self.base_shift) / (self.max_tokens - self.base_tokens)
        return tokens * slope + (self.base_shift - slope * self.base_tokens)

    def sigmas(self, steps: int, tokens: int, sigmas: Sequence[float] | Tensor | None = None) -> Tensor:
        """(steps + 1,) float32, falling to 0; own `sigmas` (without the 0) replace the even ones, and are shifted."""
        if sigmas is None:
            if steps < 1:
                raise FluxError(f"{steps} steps draw nothing; at least 1 is needed")
            sigmas = np.linspace(1.0, 1 / steps, steps)
        even = np.asarray(sigmas, dtype=np.float64)
        _check(even)
        return torch.from_numpy(np.append(self._shifted(even.astype(np.float32), tokens), np.float32(0)))

    def _shifted(self, sigmas: np.ndarray, tokens: int) -> np.ndarray:
        if self.dynamic:
            return math.exp(self.mu(tokens)) / (math.exp(self.mu(tokens)) + (1 / sigmas - 1))
        return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)


def _check(sigmas: np.ndarray) -> None:
    if sigmas.ndim != 1 or not sigmas.size or not np.isfinite(sigmas).all():
        raise FluxError("sigmas must be a list of finite numbers")
    if not ((sigmas > 0) & (sigmas <= 1)).all() or (np.diff(sigmas) >= 0).any():
        raise FluxError(f"sigmas must fall from at most 1 towards 0, without the final 0; got {sigmas.tolist()}")


def cut(sigmas: Tensor, start: float, end: float) -> Tensor:
    """The part of a schedule between two fractions of its steps; (0, 1) is all of it."""
    if not 0 <= start < end <= 1:
        raise FluxError(f"the denoise range {start} to {end} must lie in 0 to 1, start before end")
    count = len(sigmas) - 1
    first, last = round(start * count), round(end * count)
    if first == last:
        raise FluxError(
            f"no step of {count} lies in the denoise range {start} to {end}; use more steps or a wider range"
        )
    return sigmas[first : last + 1]
