"""The VAE as nodes and recipes use it: pictures (B, H, W, 3) in 0..1 <-> raw latents (B, 16, H/8, W/8)."""

from __future__ import annotations

import copy
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import FluxError, check_finite
from .model.vae import AutoEncoder, VaeParams, sample

log = logging.getLogger("fluxcanvas")

REMEMBERED = 16  # encoded pictures kept by a VAE; a megapixel's latents are 1 MB in float32


@dataclass(frozen=True)
class LatentFormat:
    """The affine map between raw latents, as the VAE gives them, and those that the transformer works on."""

    channels: int = 16
    factor: int = 8
    scale: float = 0.3611
    shift: float = 0.1159

    @property
    def multiple(self) -> int:
        """Picture sides must be multiples of this: a latent is `factor` pixels and a token 2x2 latents."""
        return 2 * self.factor

    def to_model(self, raw: Tensor) -> Tensor:
        return (raw - self.shift) * self.scale

    def to_raw(self, latents: Tensor) -> Tensor:
        return latents / self.scale + self.shift


class Vae:
    """A shared handle (the `FLUX_VAE` edge); it is never changed once made."""

    def __init__(self, model: AutoEncoder) -> None:
        self.model = model.eval().requires_grad_(False)
        self._encoded: OrderedDict[tuple, Tensor] = OrderedDict()

    @property
    def params(self) -> VaeParams:
        return self.model.params

    @property
    def device(self) -> torch.device:
        return self.model.decoder.conv_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.decoder.conv_in.weight.dtype

    @cached_property
    def latent_format(self) -> LatentFormat:
        p = self.params
        return LatentFormat(p.z_channels, p.factor, p.scale, p.shift)

    @torch.no_grad()
    def encode(self, images: Tensor, generator: torch.Generator | list[torch.Generator] | None = None) -> Tensor:
        """(B, H, W, 3) in 0..1 -> raw latents; the mean of the distribution, or a sample where a generator is given."""
        height, width = images.shape[1:3]
        multiple = self.latent_format.multiple
        if height % multiple or width % multiple or not height or not width:
            raise FluxError(
                f"a picture of {width}x{height} cannot be encoded: both sides must be multiples of {multiple}"
            )
        pixels = (images[..., :3].permute(0, 3, 1, 2).float() * 2 - 1).to(self.device)
        moments = self._sound(lambda model, dtype: model.moments(pixels.to(dtype)))
        check_finite(moments, "the VAE")
        return sample(moments, generator)

    def encode_once(self, images: Tensor) -> Tensor:
        """The mean latents of these pixels, remembered by content: drawing again with another seed encodes nothing."""
        pixels = images.detach().float().cpu().contiguous()
        key = (tuple(pixels.shape), hashlib.sha256(pixels.numpy().tobytes()).hexdigest())
        if key not in self._encoded:
            self._encoded[key] = self.encode(images)
            if len(self._encoded) > REMEMBERED:
                self._encoded.popitem(last=False)
        return self._encoded[key]

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Raw latents -> (B, H, W, 3) float32 in 0..1, on the CPU."""
        if latents.ndim != 4 or latents.shape[1] != self.params.z_channels or not latents.numel():
            want = f"(batch, {self.params.z_channels}, height, width)"
            raise FluxError(f"this VAE decodes latents of shape {want}; got {tuple(latents.shape)}")
        pixels = self._sound(lambda model, dtype: model.decode(latents.to(self.device, dtype)))
        check_finite(pixels, "the VAE")
        return (pixels / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).float().cpu()

    def _sound(self, work: Callable[[AutoEncoder, torch.dtype], Tensor]) -> Tensor:
        """What the model makes in its own type; once float16 was too narrow for it, what it makes in float32."""
        if "_in_float32" not in self.__dict__:
            made = work(self.model, self.dtype)
            if self.dtype != torch.float16 or made.isfinite().all():
                return made
        return work(self._in_float32, torch.float32).to(self.dtype)

    @cached_property
    def _in_float32(self) -> AutoEncoder:
        log.warning("the VAE makes numbers too large for float16: it computes in float32 from now on")
        return copy.deepcopy(self.model).float()

    @cached_property
    def preview_factors(self) -> tuple[Tensor, Tensor]:
        """(channels, 3) weights and (3,) bias that turn model-space latents into a small picture in 0..1.

        Fitted by least squares to this VAE's own latents of soft colour fields; made once, when first asked for.
        """
        fields = _colour_fields(12, 8 * self.params.factor)
        latents = self.latent_format.to_model(self.encode(fields)).float().cpu()
        colours = F.avg_pool2d(fields.permute(0, 3, 1, 2), self.params.factor)
        rows = latents.permute(0, 2, 3, 1).reshape(-1, latents.shape[1])
        design = torch.cat([rows, torch.ones(len(rows), 1)], dim=1)
        fit = torch.linalg.lstsq(design, colours.permute(0, 2, 3, 1).reshape(-1, 3), driver="gelsd").solution
        return fit[:-1], fit[-1]


def _colour_fields(count: int, side: int) -> Tensor:
    """(count, side, side, 3) pictures of softly changing random colours, always the same ones."""
    grid = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(grid, size=(side, side), mode="bilinear", align_corners=True)
    return smooth.permute(0, 2, 3, 1)
