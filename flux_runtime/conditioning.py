"""What steers a picture, before it is bound to a canvas: the `FLUX_CONDITIONING` edge."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import FluxError

if TYPE_CHECKING:
    from .conditions import Condition


@dataclass(frozen=True)
class Prompt:
    """Text or image tokens (B, L, C) and a pooled vector (B, P), as the transformer reads them.

    `region` (H, W) in 0..1 says where the tokens count, `strength` how much attention they get (1: as they are),
    `picture` that they are a picture's (Redux) and not words.
    """

    tokens: Tensor
    pooled: Tensor
    region: Tensor | None = None
    strength: float = 1.0
    picture: bool = False

    def to(self, device: torch.device, dtype: torch.dtype) -> Prompt:
        return replace(self, tokens=self.tokens.to(device, dtype), pooled=self.pooled.to(device, dtype))

    def for_batch(self, count: int) -> Prompt:
        """One prompt serves any batch; several are repeated, each for as many pictures in a row."""
        have = len(self.tokens)
        if have == 1:
            return self
        if count % have:
            raise FluxError(
                f"{have} prompts cannot be shared out among {count} pictures; use 1 or a divisor of {count}"
            )
        tokens, pooled = (t.repeat_interleave(count // have, dim=0) for t in (self.tokens, self.pooled))
        return replace(self, tokens=tokens, pooled=pooled)


@dataclass(frozen=True)
class Conditioning:
    """Prompts, conditions still unbound, and the guidance they ask for (None: what the model's makers recommend).

    Immutable: a node returns a copy with one thing more. The order of the conditions does not matter.
    """

    prompts: tuple[Prompt, ...]
    guidance: float | None = None
    conditions: tuple[Condition, ...] = ()

    def plus(self, *conditions: Condition) -> Conditioning:
        return replace(self, conditions=(*self.conditions, *conditions))

    def for_canvas(self, count: int, device: torch.device, dtype: torch.dtype) -> tuple[Prompt, ...]:
        """The prompts where the model is, repeated for a batch of `count`, or one row where they are all alike."""
        if not self.prompts:
            raise FluxError("this conditioning holds no prompt; connect an Encode Prompt node to it")
        ready = [prompt.to(device, dtype).for_batch(count) for prompt in self.prompts]
        rows = max(len(p.tokens) for p in ready)
        return tuple(replace(p, tokens=p.tokens.expand(rows, -1, -1), pooled=p.pooled.expand(rows, -1)) for p in ready)


def combine(first: Conditioning, second: Conditioning) -> Conditioning:
    """Both in one picture: the prompts side by side, and every prompt and condition that they share once.

    The pooled vector is the first's, and so is the guidance if it has one.
    """
    guidance = second.guidance if first.guidance is None else first.guidance
    prompts, conditions = _once(first.prompts + second.prompts), _once(first.conditions + second.conditions)
    return Conditioning(prompts, guidance, conditions)


def _once(items: tuple) -> tuple:
    """By identity: equal tensors of different nodes are different wishes."""
    return tuple({id(item): item for item in items}.values())
