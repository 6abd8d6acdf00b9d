"""What steers a picture, before it is bound to a canvas: the `FLUX_CONDITIONING` edge."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import FluxError


@dataclass(frozen=True)
class Prompt:
    """Text as the transformer reads it: tokens (B, L, C) from T5 and a pooled vector (B, P) from CLIP."""

    tokens: Tensor
    pooled: Tensor

    def to(self, device: torch.device, dtype: torch.dtype) -> Prompt:
        return Prompt(self.tokens.to(device, dtype), self.pooled.to(device, dtype))

    def for_batch(self, count: int) -> Prompt:
        """One prompt serves any batch; several are repeated, each for as many pictures in a row."""
        have = len(self.tokens)
        if have == 1:
            return self
        if count % have:
            raise FluxError(f"{have} prompts cannot be shared out among {count} pictures; use 1 or a divisor of {count}")
        return Prompt(*(t.repeat_interleave(count // have, dim=0) for t in (self.tokens, self.pooled)))


@dataclass(frozen=True)
class Conditioning:
    """Prompts, and the guidance they ask for (None: what the model's makers recommend). Immutable: nodes return copies."""

    prompts: tuple[Prompt, ...]
    guidance: float | None = None

    def joined(self) -> Prompt:
        """All prompts as one: tokens one after another, the first prompt's pooled vector."""
        if not self.prompts:
            raise FluxError("this conditioning holds no prompt; connect an Encode Prompt node to it")
        if len(self.prompts) == 1:
            return self.prompts[0]
        return Prompt(torch.cat([p.tokens for p in self.prompts], dim=1), self.prompts[0].pooled)
