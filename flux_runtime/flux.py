"""The handles that nodes and recipes pass around: `FluxModel` (the transformer and its facts) and the whole `Flux`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .model.transformer import FluxTransformer
from .schedule import Schedule
from .vae import LatentFormat, Vae
from .variants import FluxParams, Variant

if TYPE_CHECKING:
    from .text.encoders import TextEncoders
    from .weights.report import Report


@dataclass(frozen=True)
class FluxModel:
    """The `FLUX_MODEL` edge. `vae` is the one loaded beside it, if any: it gives previews their colours."""

    transformer: FluxTransformer
    variant: Variant
    schedule: Schedule
    latent: LatentFormat
    vae: Vae | None = None

    @property
    def params(self) -> FluxParams:
        return self.transformer.params

    @property
    def device(self) -> torch.device:
        return self.transformer.img_in.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.img_in.weight.dtype

    def sigmas(self, steps: int, height: int, width: int, own: Tensor | list[float] | None = None) -> Tensor:
        """The noise levels for latents of height x width; see `Schedule.sigmas`."""
        return self.schedule.sigmas(steps, height * width // 4, own)


@dataclass(frozen=True)
class Flux:
    """All that a recipe needs, as `load_flux` gives it."""

    model: FluxModel
    text: TextEncoders | None
    vae: Vae | None
    report: Report

    @property
    def transformer(self) -> FluxTransformer:
        return self.model.transformer

    @property
    def schedule(self) -> Schedule:
        return self.model.schedule
