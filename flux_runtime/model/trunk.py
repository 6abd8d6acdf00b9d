"""What the transformer and its side networks have in common: embeddings, modulation and the two stacks of blocks.

What depends on the run alone (context, rope) is `prepare`d once, what depends on the step but not on the image
(the modulation, a quarter of the weights) is made for all steps at once by `embed` and `modulate`; the call itself
does only what must be done for every step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..variants import FluxParams
from .attention import rope
from .blocks import DoubleBlock, ModulationLinear, SingleBlock

SINUSOID = 256


@dataclass(frozen=True)
class Context:
    """What one branch of a run keeps for all its steps: txt (B, L, hidden) and rope (L + N, head_dim / 2)."""

    txt: Tensor
    rope: Tensor


@dataclass(frozen=True)
class Modulation:
    """Modulation vectors of every block, with any leading dimensions; `modulation[i]` is that of step i."""

    double: tuple[tuple[Tensor, Tensor], ...]  # image and text, (..., 6 * hidden)
    single: tuple[Tensor, ...]  # (..., 3 * hidden)
    final: Tensor | None = None  # (..., 2 * hidden); a side network has no final layer

    def __getitem__(self, index: int) -> Modulation:
        double = tuple((img[index], txt[index]) for img, txt in self.double)
        final = None if self.final is None else self.final[index]
        return Modulation(double, tuple(m[index] for m in self.single), final)


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, dim)
        self.out_layer = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


def sinusoid(thousandths: Tensor, dtype: torch.dtype) -> Tensor:
    """(...) values in 0..1000 -> (..., 256): cosines, then sines, of 128 frequencies from 1 down to 1/10000."""
    half = SINUSOID // 2
    exponent = -math.log(10_000) * torch.arange(half, dtype=torch.float32, device=thousandths.device) / half
    angle = thousandths[..., None].float() * exponent.exp()
    return torch.cat([angle.cos(), angle.sin()], dim=-1).to(dtype)


class Trunk(nn.Module):
    """Inputs, embeddings and blocks, under the names of the original checkpoints."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        dim, heads, hidden = params.hidden_size, params.num_heads, params.mlp_hidden
        self.params = params
        self.img_in = nn.Linear(params.in_channels, dim)
        self.txt_in = nn.Linear(params.context_in_dim, dim)
        self.time_in = MLPEmbedder(SINUSOID, dim)
        self.vector_in = MLPEmbedder(params.vec_in_dim, dim)
        self.guidance_in = MLPEmbedder(SINUSOID, dim) if params.guidance_embed else None
        self.double_blocks = nn.ModuleList(DoubleBlock(dim, heads, hidden) for _ in range(params.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(dim, heads, hidden) for _ in range(params.depth_single))

    @property
    def device(self) -> torch.device:
        return self._plain.device

    @property
    def dtype(self) -> torch.dtype:
        """The type it computes in; linear layers may store their weights in another."""
        return self._plain.dtype

    @property
    def _plain(self) -> Tensor:
        return self.double_blocks[0].img_attn.norm.query_norm.scale

    def embed(self, sigma: Tensor, guidance: Tensor | None, pooled: Tensor) -> Tensor:
        """Sigma in 0..1 and guidance, broadcastable to (...), pooled (..., P) -> time embedding (..., hidden).

        Both numbers are rounded to the model's dtype before they are multiplied by 1000, as in the original code:
        a guidance of 3.5 reads 3504 in bfloat16, and the weights were trained on that.
        """
        dtype = pooled.dtype
        time = (sigma * 1000).to(dtype) / 1000 * 1000
        embedding = self.time_in(sinusoid(time, dtype))
        if self.guidance_in is not None:
            if guidance is None:
                raise ValueError("this transformer has a guidance embedding: a guidance value is needed")
            embedding = embedding + self.guidance_in(sinusoid(guidance.to(dtype) * 1000, dtype))
        return embedding + self.vector_in(pooled)

    def modulate(self, embedding: Tensor) -> Modulation:
        """(..., hidden) time embedding -> the modulation of every block: one matrix product a block for all steps."""
        vec = F.silu(embedding)

        def of(module: ModulationLinear) -> Tensor:
            return module.lin(vec)

        double = tuple((of(block.img_mod), of(block.txt_mod)) for block in self.double_blocks)
        return Modulation(double, tuple(of(block.modulation) for block in self.single_blocks))

    def prepare(self, txt: Tensor, ids: Tensor) -> Context:
        """(B, L, context_in_dim) text tokens and the (L + N, 3) ids of the whole sequence -> what all steps share."""
        tables = rope(ids, self.params.axes_dim, self.params.theta)
        return Context(self.txt_in(txt), tables.to(txt.device))
