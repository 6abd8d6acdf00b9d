"""The two kinds of transformer block, and the modulation that steers them.

Modulation vectors are inputs here, not computed inside: they depend on the step and the prompt's pooled vector alone,
so a whole run's can be made at once (see `FluxTransformer.modulate`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import QKNorm, attend, rotate


class ImagePrompt(Protocol):
    """Cross-attention of a double block's canvas queries to image tokens (IP-Adapter)."""

    def __call__(self, block: int, query: Tensor) -> Tensor | None:
        """(B, N, H, D) normalised queries before rotation -> (B, N, H * D) to add to the image stream, or None."""


class ModulationLinear(nn.Module):
    """Holds the linear that makes `parts` modulation vectors of the silu of the time embedding."""

    def __init__(self, dim: int, parts: int) -> None:
        super().__init__()
        self.lin = nn.Linear(dim, parts * dim)


class SelfAttention(nn.Module):
    """One stream's projections in a double block; attention itself is joint."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, S, dim) -> normalised q, k and v, each (B, S, H, D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        return (*self.norm(q, k), v)


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without weights, then scale and shift (adaLN)."""
    return F.layer_norm(x, (x.shape[-1],), eps=1e-6) * (1 + scale) + shift


def within_fp16(x: Tensor) -> Tensor:
    """Clip to float16's range where it is in use; other types pass untouched."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x


def _mlp(dim: int, hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))


class DoubleBlock(nn.Module):
    """Text and image keep their own weights and meet in attention."""

    def __init__(self, dim: int, num_heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.img_mod = ModulationLinear(dim, 6)
        self.img_attn = SelfAttention(dim, num_heads)
        self.img_mlp = _mlp(dim, mlp_hidden)
        self.txt_mod = ModulationLinear(dim, 6)
        self.txt_attn = SelfAttention(dim, num_heads)
        self.txt_mlp = _mlp(dim, mlp_hidden)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        img_mod: Tensor,
        txt_mod: Tensor,
        rope: Tensor,
        bias: Tensor | None,
        image_prompts: Sequence[ImagePrompt] = (),
        index: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """img (B, N, dim), txt (B, L, dim), modulations (B, 1, 6 * dim) as shift, scale, gate for attention and MLP."""
        img1, img2 = img_mod.chunk(2, dim=-1)
        txt1, txt2 = txt_mod.chunk(2, dim=-1)
        img_heads = self.img_attn.heads(modulated_norm(img, *img1.chunk(3, dim=-1)[:2]))
        txt_heads = self.txt_attn.heads(modulated_norm(txt, *txt1.chunk(3, dim=-1)[:2]))
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(txt_heads, img_heads, strict=True))
        txt_out, img_out = attend(rotate(q, rope), rotate(k, rope), v, bias).split([txt.shape[1], img.shape[1]], dim=1)
        img = img + img1.chunk(3, dim=-1)[2] * self.img_attn.proj(img_out)
        txt = txt + txt1.chunk(3, dim=-1)[2] * self.txt_attn.proj(txt_out)
        img = _feed_forward(img, img2, self.img_mlp)
        txt = _feed_forward(txt, txt2, self.txt_mlp)
        for prompt in image_prompts:
            seen = prompt(index, img_heads[0])
            img = img if seen is None else img + seen
        return img, within_fp16(txt)


def _feed_forward(x: Tensor, mod: Tensor, mlp: nn.Module) -> Tensor:
    shift, scale, gate = mod.chunk(3, dim=-1)
    return x + gate * mlp(modulated_norm(x, shift, scale))


class SingleBlock(nn.Module):
    """Text and image as one stream; attention and MLP run side by side from one fused projection."""

    def __init__(self, dim: int, num_heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.modulation = ModulationLinear(dim, 3)
        self.linear1 = nn.Linear(dim, 3 * dim + mlp_hidden)
        self.norm = QKNorm(dim // num_heads)
        self.linear2 = nn.Linear(dim + mlp_hidden, dim)

    def forward(self, x: Tensor, mod: Tensor, rope: Tensor, bias: Tensor | None) -> Tensor:
        """x (B, S, dim), mod (B, 1, 3 * dim) as shift, scale, gate."""
        shift, scale, gate = mod.chunk(3, dim=-1)
        dim = x.shape[-1]
        fused = self.linear1(modulated_norm(x, shift, scale))
        qkv, hidden = fused.split([3 * dim, fused.shape[-1] - 3 * dim], dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = self.norm(q, k)
        seen = attend(rotate(q, rope), rotate(k, rope), v, bias)
        out = self.linear2(torch.cat([seen, F.gelu(hidden, approximate="tanh")], dim=-1))
        return within_fp16(x + gate * out)
