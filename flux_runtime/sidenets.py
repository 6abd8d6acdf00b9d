"""ControlNets as nodes and recipes use them: a handle that binds a net to a run and spreads its residuals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .conditions import Conditioner, SideNetCondition
from .errors import FluxError
from .model.sidenet import SideNet
from .model.transformer import Residuals
from .model.trunk import Context
from .sampling import Step

if TYPE_CHECKING:
    from .bind import Canvas, Inputs
    from .flux import FluxModel
    from .weights.report import Report


@dataclass(frozen=True)
class ControlNet:
    """The `FLUX_CONTROLNET` edge: a loaded net and what it is called."""

    model: SideNet
    name: str
    report: Report | None = None

    def own(self, tensor: Tensor) -> Tensor:
        """On the net's device, in its dtype: they may differ from the model's."""
        return tensor.to(self.model.device, self.model.dtype)

    def bind(self, canvas: Canvas, wish: SideNetCondition) -> Conditioner:
        if canvas.negative and wish.negative == "none":
            return lambda inputs, step: inputs
        self._check_widths(canvas.model)
        return BoundNet(self, wish, canvas)

    def _check_widths(self, model: FluxModel) -> None:
        own, theirs = self.model.params, model.params
        pairs = {
            "width": (own.hidden_size, theirs.hidden_size),
            "T5 width": (own.context_in_dim, theirs.context_in_dim),
            "CLIP width": (own.vec_in_dim, theirs.vec_in_dim),
            "canvas": (own.in_channels, 4 * model.latent.channels),
        }
        for what, (mine, needed) in pairs.items():
            if mine != needed:
                raise FluxError(
                    f"the ControlNet {self.name} was made for another model: its {what} is {mine}, "
                    f"and the model's {needed}"
                )

    def check_mode(self, mode: int | None) -> None:
        count = self.model.side.modes
        if count and (mode is None or not 0 <= mode < count):
            raise FluxError(f"the union ControlNet {self.name} needs a mode from 0 to {count - 1}; got {mode}")


class BoundNet:
    """A net within one run: it reads the bare canvas, and remembers its last answer for the other pass of true CFG."""

    def __init__(self, net: ControlNet, wish: SideNetCondition, canvas: Canvas) -> None:
        net.check_mode(wish.mode)
        self.net, self.wish = net, wish
        self.blocks = canvas.model.params.depth, canvas.model.params.depth_single
        self.levels = canvas.levels
        self.modulation = canvas.modulation(net.model)
        self.context = self._context(canvas)
        self.hint = self._hint(canvas)
        self._last: tuple[Tensor, float, Residuals] | None = None

    def _context(self, canvas: Canvas) -> Context:
        model = self.net.model
        ids = canvas.layout().ids()
        leads = bool(model.side.modes)
        context = model.prepare(self.net.own(canvas.text), torch.cat([ids[:1], ids]) if leads else ids)
        context = model.with_mode(context, self.wish.mode) if leads else context
        return Context(context.txt.expand(canvas.shape[0], -1, -1), context.rope)

    def _hint(self, canvas: Canvas) -> Tensor:
        model, source = self.net.model, self.wish.source
        if model.reads_latents:
            hint = canvas.model.latent.to_model(source.latents(canvas.width, canvas.height))
        else:
            hint = source.pixels(canvas.width, canvas.height).permute(0, 3, 1, 2) * 2 - 1
        return canvas.for_batch(model.hint_tokens(self.net.own(hint)))

    def __call__(self, inputs: Inputs, step: Step) -> Inputs:
        from .bind import with_residuals

        weight = self.wish.weight(step)
        if weight == 0:
            return inputs
        return with_residuals(inputs, spread(self._answer(inputs), weight, *self.blocks, self.net.model.reads_latents))

    def _answer(self, inputs: Inputs) -> Residuals:
        """What the net says of this canvas; asked twice about the same one, it runs once."""
        if self._last is None or self._last[0] is not inputs.img or self._last[1] != inputs.sigma:
            self._last = None  # so that two steps' residuals are never held at once
            modulation = self.modulation[self.levels[inputs.sigma]]
            own = self.net.model(self.net.own(inputs.img), self.hint, self.context, modulation)
            double, single = (tuple(r.to(inputs.img) for r in part) for part in (own.double, own.single))
            self._last = inputs.img, inputs.sigma, Residuals(double, single)
        return self._last[2]


def spread(own: Residuals, weight: float, double: int, single: int, in_runs: bool) -> Residuals:
    """A net's own few residuals, weighted, as one for each block of the model.

    Nets that read latents serve runs of neighbouring blocks each, those that read pixels take turns (diffusers'
    `controlnet_blocks_repeat`), which holds for the double blocks; single blocks are always served in runs.
    """

    def place(residuals: Sequence[Tensor], blocks: int, runs: bool) -> tuple[Tensor, ...]:
        if not residuals or not blocks:
            return ()
        weighted = [r * weight for r in residuals]
        interval = math.ceil(blocks / len(weighted))
        return tuple(weighted[i // interval if runs else i % len(weighted)] for i in range(blocks))

    return Residuals(place(own.double, double, in_runs), place(own.single, single, True))
