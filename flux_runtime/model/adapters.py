"""Small networks that turn image embeddings into tokens: Redux and the XLabs IP-Adapter."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


class ReduxEncoder(nn.Module):
    """SigLIP's last hidden state (B, n, 1152) -> image tokens (B, n, 4096) that join the text."""

    def __init__(self, in_dim: int = 1152, out_dim: int = 4096, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or 3 * out_dim
        self.redux_up = nn.Linear(in_dim, hidden)
        self.redux_down = nn.Linear(hidden, out_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.redux_down(F.silu(self.redux_up(x)))


@dataclass(frozen=True)
class IPAdapterParams:
    """XLabs' v1 has 4 tokens an image, v2 16; `blocks` are the double blocks of the model it was trained for."""

    tokens: int = 4
    blocks: int = 19
    embed_dim: int = 768
    context_dim: int = 4096
    hidden_size: int = 3072


class ImageProjection(nn.Module):
    """CLIP image embeddings (B, n, embed_dim) -> (B, n * tokens, context_dim)."""

    def __init__(self, params: IPAdapterParams) -> None:
        super().__init__()
        self.tokens = params.tokens
        self.proj = nn.Linear(params.embed_dim, params.tokens * params.context_dim)
        self.norm = nn.LayerNorm(params.context_dim)

    def forward(self, embeds: Tensor) -> Tensor:
        return self.norm(self.proj(embeds).unflatten(-1, (self.tokens, -1))).flatten(1, 2)


class DoubleStreamKV(nn.Module):
    """Keys and values of the image tokens for one double block, under the names of the published files."""

    def __init__(self, params: IPAdapterParams) -> None:
        super().__init__()
        self.ip_adapter_double_stream_k_proj = nn.Linear(params.context_dim, params.hidden_size)
        self.ip_adapter_double_stream_v_proj = nn.Linear(params.context_dim, params.hidden_size)

    def forward(self, tokens: Tensor, heads: int) -> tuple[Tensor, Tensor]:
        """(B, n, context_dim) -> keys and values (B, n, H, D)."""
        k, v = self.ip_adapter_double_stream_k_proj(tokens), self.ip_adapter_double_stream_v_proj(tokens)
        return k.unflatten(-1, (heads, -1)), v.unflatten(-1, (heads, -1))


class IPAdapterNet(nn.Module):
    """The XLabs IP-Adapter: a projection and a pair of linears for each double block."""

    def __init__(self, params: IPAdapterParams) -> None:
        super().__init__()
        self.params = params
        self.ip_adapter_proj_model = ImageProjection(params)
        self.double_blocks = nn.ModuleList(_Block(params) for _ in range(params.blocks))


class _Block(nn.Module):
    def __init__(self, params: IPAdapterParams) -> None:
        super().__init__()
        self.processor = DoubleStreamKV(params)
