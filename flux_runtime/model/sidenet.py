"""ControlNets: a short copy of the transformer that reads a control image and adds to the transformer's blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from ..layout import pack
from ..variants import FluxParams
from .transformer import Residuals
from .trunk import Context, Modulation, Trunk

Hint = Literal["latents", "xlabs", "mistoline"]


@dataclass(frozen=True)
class SideNetParams:
    """`trunk` counts the net's own blocks; `hint` says what it reads: VAE latents, or pixels through convolutions.

    `modes` is the number of control types of a union net (0: not one).
    """

    trunk: FluxParams
    hint: Hint = "latents"
    hint_channels: int = 64
    modes: int = 0


class ActivatedLinear(nn.Module):
    """MistoLine's output projection."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, dim)
        self.act = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.linear(x))


def _convolutions(*layers: tuple[int, int, int, int]) -> nn.Sequential:
    """Convolutions (in, out, kernel, stride) with SiLU between them."""
    modules: list[nn.Module] = []
    for in_channels, out_channels, kernel, stride in layers:
        modules += [nn.Conv2d(in_channels, out_channels, kernel, stride, padding=kernel // 2), nn.SiLU()]
    return nn.Sequential(*modules[:-1])


def xlabs_hint() -> nn.Sequential:
    """(B, 3, H, W) -> (B, 16, H/8, W/8)."""
    halving = [(16, 16, 3, 2), (16, 16, 3, 1)]
    return _convolutions((3, 16, 3, 1), (16, 16, 3, 1), *halving, *halving, *halving)


class MistolineHint(nn.Module):
    """(B, 3, H, W) -> (B, 16, H/8, W/8); like XLabs', with two more pointwise layers."""

    def __init__(self) -> None:
        super().__init__()
        halvings = [(16, 16, 3, 2), (16, 16, 3, 1), (16, 16, 3, 2), (16, 16, 3, 1), (16, 16, 3, 2)]
        self.encoder = _convolutions(
            (3, 16, 3, 1), (16, 16, 1, 1), (16, 16, 3, 1), *halvings, (16, 16, 1, 1), (16, 16, 3, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.encoder(x)


class SideNet(Trunk):
    """Names follow the published files: BFL's for the trunk, `controlnet_*` and `input_*_block` for the rest."""

    def __init__(self, params: SideNetParams) -> None:
        super().__init__(params.trunk)
        dim = params.trunk.hidden_size
        self.side = params
        project = ActivatedLinear if params.hint == "mistoline" else lambda dim: nn.Linear(dim, dim)
        self.controlnet_blocks = nn.ModuleList(project(dim) for _ in range(params.trunk.depth))
        self.controlnet_single_blocks = nn.ModuleList(project(dim) for _ in range(params.trunk.depth_single))
        self.controlnet_x_embedder = nn.Linear(params.hint_channels, dim)
        self.controlnet_mode_embedder = nn.Embedding(params.modes, dim) if params.modes else None
        self.input_hint_block = xlabs_hint() if params.hint == "xlabs" else None
        self.input_cond_block = MistolineHint() if params.hint == "mistoline" else None

    @property
    def reads_latents(self) -> bool:
        return self.side.hint == "latents"

    def hint_tokens(self, hint: Tensor) -> Tensor:
        """Model-space latents (B, 16, h, w) or pixels (B, 3, H, W) in -1..1, whichever it reads -> (B, N, hidden)."""
        stem = self.input_hint_block or self.input_cond_block
        return self.controlnet_x_embedder(pack(hint if stem is None else stem(hint)))

    def with_mode(self, context: Context, mode: int) -> Context:
        """The context led by a union net's mode token; the rope must have a row for it."""
        token = self.controlnet_mode_embedder(torch.tensor([[mode]], device=context.txt.device))
        return Context(torch.cat([token.expand(len(context.txt), -1, -1), context.txt], dim=1), context.rope)

    def forward(self, img: Tensor, hint: Tensor, context: Context, modulation: Modulation) -> Residuals:
        """Canvas tokens (B, N, 64) and hint tokens (B, N, hidden) -> one residual for each of the net's own blocks."""
        img, txt = self.img_in(img) + hint, context.txt
        double, single = [], []
        for block, mods, project in zip(self.double_blocks, modulation.double, self.controlnet_blocks, strict=True):
            img, txt = block(img, txt, *(m[:, None] for m in mods), context.rope, None)
            double.append(project(img))
        x, length = torch.cat([txt, img], dim=1), txt.shape[1]
        blocks = zip(self.single_blocks, modulation.single, self.controlnet_single_blocks, strict=True)
        for block, mod, project in blocks:
            x = block(x, mod[:, None], context.rope, None)
            single.append(project(x[:, length:]))
        return Residuals(tuple(double), tuple(single))
