"""Where a condition's picture comes from: pixels that are fitted and encoded once the canvas is known, or latents."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from .errors import FluxError
from .fit import fit
from .layout import PATCH
from .masks import check_mask, mask_like, threshold_mask
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
class MaskedPicture:
    """A picture with its mask (B, H, W) of the same size, fitted alike; its pixels are grey where the mask is white."""

    picture: Picture
    flags: Tensor

    def mask(self, width: int, height: int) -> Tensor:
        """(B, height, width) of 0 and 1; FluxError where nothing white is left of it at that size."""
        fitted = fit(self.flags[..., None], width, height, self.picture.fit)[..., 0]
        return threshold_mask(check_mask(fitted, what="the mask, brought to the size of the canvas,"))

    def pixels(self, width: int, height: int) -> Tensor:
        return grey_out(self.picture.pixels(width, height), self.mask(width, height))

    def latents(self, width: int, height: int) -> Tensor:
        return replace(self.picture, image=self.pixels(width, height)).latents(width, height)


def masked_picture(picture: Picture, mask: Tensor) -> MaskedPicture:
    """A picture and a mask of any size as one; several of one kind need one of the other, or as many."""
    image = picture.image
    mask = mask_like(check_mask(mask), image.shape[2], image.shape[1])
    rows = max(len(image), len(mask))
    if not {len(image), len(mask)} <= {1, rows}:
        raise FluxError(f"{len(mask)} masks cannot be used with {len(image)} pictures; use one, or one for each")
    return MaskedPicture(replace(picture, image=image.expand(rows, -1, -1, -1)), mask.expand(rows, -1, -1))


def grey_out(pixels: Tensor, mask: Tensor) -> Tensor:
    """(B, H, W, 3) in 0..1 with the masked part mid-grey, which is 0 in the model's -1..1."""
    return (pixels - 0.5) * (1 - mask[..., None]) + 0.5


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
