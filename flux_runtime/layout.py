"""Token arithmetic: packing latents into tokens, position ids, and `Layout`, the one object that slices a sequence.

The sequence is always text, canvas, references. A token is a 2x2 patch of latents with channels in the order
(channel, dy, dx); its position id is (index, row, column), and text sits at (0, 0, 0).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .errors import FluxError

PATCH = 2


def pack(latents: Tensor) -> Tensor:
    """(B, C, H, W) latents, H and W even -> (B, H/2 * W/2, 4C) tokens, row by row."""
    batch, channels, height, width = latents.shape
    if height % PATCH or width % PATCH:
        raise FluxError(
            f"latents of {height}x{width} cannot be packed: both sides must be even (pictures: multiples of 16)"
        )
    patches = latents.reshape(batch, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, height * width // PATCH**2, channels * PATCH**2)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `pack`; height and width are those of the latents."""
    batch, _, features = tokens.shape
    patches = tokens.reshape(batch, height // PATCH, width // PATCH, features // PATCH**2, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, features // PATCH**2, height, width)


def text_ids(length: int) -> Tensor:
    """(length, 3) zeros: text has no place in the picture."""
    return torch.zeros(length, 3)


def canvas_ids(height: int, width: int, index: int = 0, row: int = 0, column: int = 0) -> Tensor:
    """(height/2 * width/2, 3) float32 ids (index, row, column) of a picture with latents of height x width.

    Kept in float32: bfloat16 cannot hold coordinates above 256.
    """
    rows = torch.arange(height // PATCH, dtype=torch.float32) + row
    columns = torch.arange(width // PATCH, dtype=torch.float32) + column
    grid = torch.cartesian_prod(torch.tensor([float(index)]), rows, columns)
    return grid.reshape(-1, 3)


@dataclass(frozen=True)
class Placed:
    """A picture in the sequence beside the canvas: its latent size and where its ids start."""

    height: int
    width: int
    index: int = 1
    row: int = 0
    column: int = 0

    @property
    def tokens(self) -> int:
        return self.height * self.width // PATCH**2

    def ids(self) -> Tensor:
        return canvas_ids(self.height, self.width, self.index, self.row, self.column)


@dataclass(frozen=True)
class Layout:
    """Which tokens are which, in one branch of one run: text lengths, the canvas (latent size), references."""

    text: tuple[int, ...]
    height: int
    width: int
    references: tuple[Placed, ...] = ()

    @property
    def canvas_tokens(self) -> int:
        return self.height * self.width // PATCH**2

    @property
    def text_tokens(self) -> int:
        return sum(self.text)

    @property
    def total_tokens(self) -> int:
        return self.text_tokens + self.canvas_tokens + sum(r.tokens for r in self.references)

    def text_spans(self) -> tuple[slice, ...]:
        """Where each prompt's tokens lie in the whole sequence."""
        return _spans(0, self.text)

    def canvas_span(self) -> slice:
        return slice(self.text_tokens, self.text_tokens + self.canvas_tokens)

    def reference_spans(self) -> tuple[slice, ...]:
        return _spans(self.text_tokens + self.canvas_tokens, tuple(r.tokens for r in self.references))

    def ids(self) -> Tensor:
        """(text + canvas + references, 3) position ids."""
        pictures = [canvas_ids(self.height, self.width), *(r.ids() for r in self.references)]
        return torch.cat([text_ids(self.text_tokens), *pictures])

    def canvas(self, tokens: Tensor) -> Tensor:
        """The canvas part of (B, canvas + references, C) picture tokens."""
        return tokens[:, : self.canvas_tokens]


def _spans(start: int, lengths: tuple[int, ...]) -> tuple[slice, ...]:
    ends = list(accumulate(lengths, initial=start))
    return tuple(slice(a, b) for a, b in pairwise(ends))
