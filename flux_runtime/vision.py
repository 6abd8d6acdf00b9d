"""Image encoders of the image prompts: CLIP for IP-Adapter, SigLIP for Redux, both by transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .image import to_pil


@dataclass(frozen=True)
class ImageEncoder:
    """A transformers vision model with the processor that resizes and normalises pictures for it."""

    model: nn.Module
    processor: Any

    @torch.no_grad()
    def pooled(self, images: Tensor) -> Tensor:
        """(n, H, W, 3) in 0..1 -> (n, D) projected image embeddings."""
        return self.model(self._pixels(images)).image_embeds

    @torch.no_grad()
    def hidden(self, images: Tensor) -> Tensor:
        """(n, H, W, 3) in 0..1 -> (n, tokens, D), the last hidden state."""
        return self.model(self._pixels(images)).last_hidden_state

    def _pixels(self, images: Tensor) -> Tensor:
        weight = next(self.model.parameters())
        pixels = self.processor(images=to_pil(images), return_tensors="pt").pixel_values
        return pixels.to(weight.device, weight.dtype)
