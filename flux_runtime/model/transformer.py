"""The FLUX.1 transformer, under the module names of the original checkpoints (`double_blocks.0.img_attn.qkv` ...)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ..variants import FluxParams
from .blocks import ImagePrompt, modulated_norm
from .trunk import Context, Modulation, Trunk


@dataclass(frozen=True)
class Residuals:
    """What side networks add after each block, to the image's first tokens: one (B, n, hidden) or None per block."""

    double: tuple[Tensor | None, ...] = ()
    single: tuple[Tensor | None, ...] = ()


class FinalLayer(nn.Module):
    def __init__(self, dim: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, mod: Tensor) -> Tensor:
        return self.linear(modulated_norm(x, *mod.chunk(2, dim=-1)))


class FluxTransformer(Trunk):
    """Predicts the velocity of image tokens. Any width, depth and head count; see `FluxParams`."""

    def __init__(self, params: FluxParams) -> None:
        super().__init__(params)
        self.final_layer = FinalLayer(params.hidden_size, params.out_channels)

    def modulate(self, embedding: Tensor) -> Modulation:
        """(..., hidden) time embedding -> the modulation of every block and of the final layer."""
        return replace(super().modulate(embedding), final=self.final_layer.adaLN_modulation(embedding))

    def forward(
        self,
        img: Tensor,
        context: Context,
        modulation: Modulation,
        *,
        residuals: Residuals | None = None,
        image_prompts: Sequence[ImagePrompt] = (),
        bias: Tensor | None = None,
    ) -> Tensor:
        """(B, N, in_channels) image tokens -> (B, N, out_channels) velocity.

        `modulation` has the shape (B or 1, parts * hidden); `bias` (B or 1, 1, L + N, L + N) is added to every
        attention's scores; `residuals` come after their block.
        """
        residuals = residuals or Residuals()
        img, txt = self.img_in(img), context.txt
        for index, (block, (img_mod, txt_mod)) in enumerate(zip(self.double_blocks, modulation.double, strict=True)):
            mods = img_mod[:, None], txt_mod[:, None]
            img, txt = block(img, txt, *mods, context.rope, bias, image_prompts, index)
            img = _plus(img, residuals.double, index, 0)
        length = txt.shape[1]
        x = torch.cat([txt, img], dim=1)
        for index, (block, mod) in enumerate(zip(self.single_blocks, modulation.single, strict=True)):
            x = _plus(block(x, mod[:, None], context.rope, bias), residuals.single, index, length)
        return self.final_layer(x[:, length:], modulation.final[:, None])


def _plus(x: Tensor, residuals: Sequence[Tensor | None], index: int, start: int) -> Tensor:
    """Add residual `index`, if there is one, to the tokens that begin at `start`; those behind it stay."""
    if index < len(residuals) and residuals[index] is not None:
        x[:, start : start + residuals[index].shape[1]] += residuals[index]  # x is a block's own result, and no one's
    return x
