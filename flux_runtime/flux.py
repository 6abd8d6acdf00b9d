"""The handles that nodes and recipes pass around: `FluxModel` (the transformer and its facts) and the whole `Flux`."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .lora.apply import applied, check_mode, widened
from .lora.fit import LoraFit, fit
from .lora.stack import NO_LORAS, LoraStack
from .model.transformer import FluxTransformer
from .schedule import Schedule
from .vae import LatentFormat, Vae
from .variants import FluxParams, Variant

if TYPE_CHECKING:
    from .lora.formats import Lora
    from .text.encoders import TextEncoders
    from .weights.report import Report


@dataclass(frozen=True)
class FluxModel:
    """The `FLUX_MODEL` edge: a shared transformer, and what is to be done to it while it draws.

    `vae` is the one loaded beside it, if any: it gives previews their colours.
    """

    transformer: FluxTransformer
    variant: Variant
    schedule: Schedule
    latent: LatentFormat
    vae: Vae | None = None
    loras: LoraStack = NO_LORAS
    lora_mode: str = "auto"  # how LoRAs are applied, see `lora.apply.applied`

    @property
    def params(self) -> FluxParams:
        """The sizes it draws with: a control LoRA widens the input."""
        return widened(self.transformer.params, self.loras)

    def ready(self) -> AbstractContextManager[None]:
        """A context in which the transformer is as this handle wants it; afterwards it is as it was."""
        return applied(self.transformer, self.loras, self.lora_mode)

    @property
    def device(self) -> torch.device:
        return self.transformer.device

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype

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

    def with_loras(self, loras: Lora | LoraStack, weight: float = 1.0, mode: str = "auto") -> Flux:
        """The same model with a LoRA (at a weight), or a stack of them, added to those it has.

        Raises `FluxError` for a LoRA that is made for another model.
        """
        stack = loras if isinstance(loras, LoraStack) else LoraStack().plus(loras, weight)
        model, text, _ = add_loras(self.model, self.text, stack, mode)
        return replace(self, model=model, text=text)

    @property
    def transformer(self) -> FluxTransformer:
        return self.model.transformer

    @property
    def schedule(self) -> Schedule:
        return self.model.schedule


def add_loras(
    model: FluxModel, text: TextEncoders | None, stack: LoraStack, mode: str = "auto"
) -> tuple[FluxModel, TextEncoders | None, list[LoraFit]]:
    """Handles with more LoRAs, and how each of these fits; nothing is touched until the model draws.

    Raises `FluxError` for a LoRA of other sizes, for one that changes nothing, and for numbers that are none.
    """
    check_mode(mode)
    parts = {"transformer": model.transformer}
    if text is not None:
        parts |= {"clip": text.clip, "t5": text.t5}
    fits = []
    for entry in stack.entries:
        entry.lora.check_numbers()
        fits.append(fit(entry.lora, parts))
    changed = replace(model, loras=model.loras + stack, lora_mode=mode)
    changed.params  # noqa: B018 - raises where the input cannot be widened
    return changed, None if text is None else replace(text, loras=text.loras + stack), fits
