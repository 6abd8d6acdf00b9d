"""Image prompts as nodes and recipes use them: IP-Adapter and Redux, each with its image encoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .errors import FluxError
from .model.adapters import IPAdapterNet, ReduxEncoder
from .model.attention import attend

if TYPE_CHECKING:
    from .bind import Canvas
    from .vision import ImageEncoder, LateEncoder
    from .weights.report import Report


@dataclass(frozen=True)
class IPAdapter:
    """The `FLUX_ADAPTER` edge of an IP-Adapter: its network and the CLIP image encoder it reads."""

    model: IPAdapterNet
    encoder: ImageEncoder | LateEncoder | None
    name: str
    report: Report | None = None

    def embed(self, images: Tensor) -> Tensor:
        """(n, H, W, 3) pictures in 0..1 -> (1, n, D) embeddings: several images are one prompt."""
        if self.encoder is None:
            raise FluxError(f"the IP-Adapter {self.name} has no image encoder; load it with a CLIP vision model")
        return self.encoder.pooled(images)[None]

    def attention(self, embeds: Tensor, scales: Sequence[float], canvas: Canvas) -> ImageAttention:
        params, model = self.model.params, canvas.model
        if (params.hidden_size, params.blocks) != (model.params.hidden_size, model.params.depth):
            raise FluxError(
                f"the IP-Adapter {self.name} was made for {params.blocks} double blocks of width {params.hidden_size}, "
                f"and the model has {model.params.depth} of {model.params.hidden_size}"
            )
        projection = self.model.ip_adapter_proj_model
        tokens = projection(embeds.to(projection.proj.weight))
        heads = model.params.num_heads
        pairs = [block.processor(canvas.for_batch(tokens), heads) for block in self.model.double_blocks]
        keys_values = [(k.to(model.device, model.dtype), v.to(model.device, model.dtype)) for k, v in pairs]
        return ImageAttention(tuple(keys_values), tuple(scales))


@dataclass(frozen=True)
class ImageAttention:
    """Bound: what each double block's image stream sees of the image tokens, scaled; made once a run."""

    keys_values: tuple[tuple[Tensor, Tensor], ...]
    scales: tuple[float, ...]

    def __call__(self, block: int, query: Tensor) -> Tensor | None:
        scale = self.scales[block]
        if scale == 0:
            return None
        k, v = (t.expand(len(query), -1, -1, -1) for t in self.keys_values[block])
        return scale * attend(query, k, v)


@dataclass(frozen=True)
class Redux:
    """The `FLUX_ADAPTER` edge of FLUX.1 Redux: image tokens for the prompt, and the SigLIP encoder they come from."""

    model: ReduxEncoder
    encoder: ImageEncoder | LateEncoder | None
    name: str
    report: Report | None = None

    @torch.no_grad()
    def tokens(self, images: Tensor) -> Tensor:
        """(n, H, W, 3) pictures in 0..1 -> (n, 729, C) image tokens."""
        if self.encoder is None:
            raise FluxError(f"Redux {self.name} has no image encoder; load it with a SigLIP vision model")
        weight = self.model.redux_up.weight
        return self.model(self.encoder.hidden(images).to(weight.device, weight.dtype))
