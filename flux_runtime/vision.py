"""Image encoders of the image prompts: CLIP for IP-Adapter, SigLIP for Redux, both by transformers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .image import to_pil

if TYPE_CHECKING:
    from .weights.report import Report


@dataclass(frozen=True)
class ImageEncoder:
    """A transformers vision model with the processor that resizes and normalises pictures for it."""

    model: nn.Module
    processor: Any
    name: str = "image encoder"
    report: Report | None = None

    @property
    def family(self) -> str:
        return "CLIP" if self.model.config.model_type.startswith("clip") else "SigLIP"

    @property
    def width(self) -> int:
        """Numbers in an embedding: CLIP's is projected, SigLIP's is the hidden state."""
        config = self.model.config
        return config.projection_dim if self.family == "CLIP" else config.hidden_size

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


class LateEncoder:
    """An image encoder that is fetched when the first picture is shown to it, and kept."""

    def __init__(self, name: str, load: Callable[[], ImageEncoder]) -> None:
        self.name, self._load = name, load
        self.report: Report | None = None  # nothing is known of it yet

    @cached_property
    def encoder(self) -> ImageEncoder:
        return self._load()

    def pooled(self, images: Tensor) -> Tensor:
        """See `ImageEncoder.pooled`."""
        return self.encoder.pooled(images)

    def hidden(self, images: Tensor) -> Tensor:
        """See `ImageEncoder.hidden`."""
        return self.encoder.hidden(images)
