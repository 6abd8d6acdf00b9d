"""Where a condition's picture comes from: pixels that are fitted and encoded once the canvas is known, or latents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .errors import FluxError
from .fit import fit
from .layout import PATCH
from .vae import Vae


class Source(Protocol):
    """A picture that can be had at any size."""

    def pixels(self, width: int, height: int) -> Tensor:
        """(B, H, W, 3) in 0..1."""

    def latents(self, width: int, height: int) -> Tensor:
        """Raw latents (B, C, height / 8, width / 8)."""


@dataclass(frozen=True)
class Picture:
    """Pixels (B, H, W, 3) with the VAE that encodes them and how they are fitted to the canvas."""

    image: Tensor
    vae: Vae | None
    fit: str = "crop"

    def pixels(self, width: int, height: int) -> Tensor:
        return fit(self.image[..., :3], width, height, self.fit)

    def latents(self, width: int, height: int) -> Tensor:
        if self.vae is None:
            raise FluxError("this picture must be encoded, and no VAE is connected to the node that adds it")
        return self.vae.encode_once(self.pixels(width, height))


@dataclass(frozen=True)
class Encoded:
    """A picture already encoded, as raw latents of the canvas's size, or its pixels where a net reads those."""

    raw: Tensor | None = None
    image: Tensor | None = None

    def pixels(self, width: int, height: int) -> Tensor:
        return self.image

    def latents(self, width: int, height: int) -> Tensor:
        if self.raw.shape[-2] % PATCH or self.raw.shape[-1] % PATCH:
            raise FluxError(f"latents of {tuple(self.raw.shape)} cannot be packed: both sides must be even")
        return self.raw
