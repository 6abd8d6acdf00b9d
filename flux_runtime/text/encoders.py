"""The two text encoders of FLUX.1 as one handle (the `FLUX_TEXT` edge)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..conditioning import Prompt
from ..errors import FluxError
from ..lora.apply import applied_to_encoder
from ..lora.stack import NO_LORAS, LoraStack
from .tokenize import token_ids

log = logging.getLogger("fluxcanvas")


@dataclass(frozen=True)
class TextEncoders:
    """CLIP gives the pooled vector, T5 the tokens; a shared handle that is never changed once made."""

    clip: nn.Module
    t5: nn.Module
    clip_tokenizer: Any
    t5_tokenizer: Any
    max_tokens: int = 512  # of the model's variant: 256 for schnell
    variant: str = "dev"
    loras: LoraStack = NO_LORAS

    @property
    def default_tokens(self) -> int:
        """T5 tokens when the caller names none: what the checkpoint was made with."""
        return min(int(self.t5_tokenizer.model_max_length), self.max_tokens)

    @property
    def clip_tokens(self) -> int:
        return min(self.clip.config.max_position_embeddings, int(self.clip_tokenizer.model_max_length))

    @property
    def device(self) -> torch.device:
        return self.t5.shared.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.t5.shared.weight.dtype

    @torch.no_grad()
    def encode(
        self,
        prompt: str | Sequence[str],
        prompt_2: str | Sequence[str] | None = None,
        *,
        max_tokens: int | None = None,
    ) -> Prompt:
        """One or several texts -> tokens (B, max_tokens, C) and pooled (B, P).

        CLIP reads `prompt`, T5 `prompt_2` or else `prompt`. Padding is attended to, as in the original; a text too long
        for an encoder is cut, with a warning that names what is lost.
        """
        texts = _texts(prompt, "prompt")
        second = texts if not prompt_2 else _texts(prompt_2, "prompt_2")
        if len(second) == 1:
            second = second * len(texts)
        if len(second) != len(texts):
            raise FluxError(
                f"{len(texts)} prompts and {len(second)} second prompts do not pair up; give as many of each, or one"
            )
        limit = self._limit(max_tokens)
        with applied_to_encoder(self.t5, "t5", self.loras):
            tokens = self._t5_tokens(second, limit)
        with applied_to_encoder(self.clip, "clip", self.loras):
            return Prompt(tokens=tokens, pooled=self._pooled(texts))

    def _limit(self, max_tokens: int | None) -> int:
        limit = max_tokens or self.default_tokens
        if limit < 1:
            raise FluxError(
                f"{limit} T5 tokens hold no prompt; use 1 to {self.max_tokens}, or 0 for the model's default"
            )
        if limit > self.max_tokens:
            raise FluxError(
                f"FLUX.1 {self.variant} reads at most {self.max_tokens} T5 tokens, not {limit}; use at most that many"
            )
        return limit

    def _pooled(self, texts: Sequence[str]) -> Tensor:
        ids = token_ids(self.clip_tokenizer, texts, self.clip_tokens, "CLIP")
        return self.clip(torch.tensor(ids, device=self.clip.device)).pooler_output

    def _t5_tokens(self, texts: Sequence[str], limit: int) -> Tensor:
        ids = token_ids(self.t5_tokenizer, texts, limit, "T5")
        return self.t5(torch.tensor(ids, device=self.device)).last_hidden_state


def _texts(value: str | Sequence[str], name: str) -> list[str]:
    texts = [value] if isinstance(value, str) else list(value) if isinstance(value, Sequence) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise FluxError(f"{name} must be a text or a list of texts")
    return texts
