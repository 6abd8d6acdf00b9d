"""The conditions of FLUX.1: control image, fill, reference (Kontext), ControlNet and image prompt (IP-Adapter).

Each is an immutable wish on the conditioning edge. `bind` makes of it a conditioner for one run, `(Inputs, Step) ->
Inputs`. They are bound in the order of their `kind`, never in that of the user's wiring.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import FluxError
from .layout import PATCH, Placed, pack
from .pictures import Source
from .sampling import Step, steps

if TYPE_CHECKING:
    from .adapters import IPAdapter
    from .bind import Canvas, Inputs
    from .sidenets import ControlNet

log = logging.getLogger("fluxcanvas")
Conditioner = Callable[["Inputs", Step], "Inputs"]


class Kind(IntEnum):
    """The order of binding: side networks read the bare canvas, channels widen it, references lengthen it."""

    SIDE_NET = 0
    CHANNELS = 1
    REFERENCE = 2
    IMAGE_PROMPT = 3


class Condition(Protocol):
    kind: ClassVar[Kind]

    @property
    def serves_negative(self) -> bool:
        """Whether the conditioner of the positive pass is that of the negative pass too."""

    def bind(self, canvas: Canvas) -> Conditioner: ...


@dataclass(frozen=True)
class Channels:
    """Bound: tokens that lie beside the canvas, channel by channel."""

    tokens: Tensor

    def __call__(self, inputs: Inputs, step: Step) -> Inputs:
        tokens = self.tokens.expand(len(inputs.img), -1, -1)
        return replace(inputs, img=torch.cat([inputs.img, tokens], dim=-1))


@dataclass(frozen=True)
class ControlImage:
    """A control image for the models that read one beside the canvas (Canny, Depth: 128 channels)."""

    kind: ClassVar[Kind] = Kind.CHANNELS
    serves_negative: ClassVar[bool] = True
    beside: ClassVar[int] = 1  # in units of the canvas's channels
    source: Source

    def bind(self, canvas: Canvas) -> Conditioner:
        return Channels(canvas.tokens(self.source.latents(canvas.width, canvas.height)))


@dataclass(frozen=True)
class FillImage:
    """The picture to fill and its mask (1 where to draw), for the fill model (384 channels).

    `masked` is the picture with the masked part grey (0 in -1..1), `mask` (B, H, W) at the canvas's size.
    """

    kind: ClassVar[Kind] = Kind.CHANNELS
    serves_negative: ClassVar[bool] = True
    beside: ClassVar[int] = 5  # the masked picture, and 64 mask channels to a latent's 16
    masked: Source
    mask: Callable[[int, int], Tensor]

    def bind(self, canvas: Canvas) -> Conditioner:
        mask = self.mask(canvas.width, canvas.height)
        tokens = canvas.tokens(self.masked.latents(canvas.width, canvas.height))
        flags = canvas.for_batch(pack(unshuffle(mask, canvas.model.latent.factor))).to(tokens)
        rows = max(len(tokens), len(flags))
        return Channels(torch.cat([tokens.expand(rows, -1, -1), flags.expand(rows, -1, -1)], dim=-1))


def unshuffle(mask: Tensor, factor: int) -> Tensor:
    """(B, H, W) -> (B, factor * factor, H / factor, W / factor), channel = dy * factor + dx."""
    return F.pixel_unshuffle(mask[:, None], factor)


@dataclass(frozen=True)
class Reference:
    """A picture that the model looks at while it draws (Kontext): clean tokens after the canvas.

    `width` and `height` are those it is encoded at, 0 the canvas's. `index` is the first position coordinate, `row` and
    `column` (in tokens) shift the place, which holds with the method "fixed"; for the others see `place`. `strength`
    scales the attention it gets.
    """

    kind: ClassVar[Kind] = Kind.REFERENCE
    serves_negative: ClassVar[bool] = True
    source: Source
    width: int = 0
    height: int = 0
    index: int = 1
    row: int = 0
    column: int = 0
    strength: float = 1.0
    method: Literal["fixed", "index", "offset"] = "fixed"

    def size(self, canvas: Canvas) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.width or canvas.width, self.height or canvas.height

    def bind(self, canvas: Canvas) -> Conditioner:
        tokens = canvas.tokens(self.source.latents(*self.size(canvas)))

        def lengthen(inputs: Inputs, step: Step) -> Inputs:
            widened = F.pad(tokens, (0, inputs.img.shape[-1] - tokens.shape[-1]))  # beside control channels: zeros
            return replace(inputs, img=torch.cat([inputs.img, widened.expand(len(inputs.img), -1, -1)], dim=1))

        return lengthen


def place(references: Sequence[Reference], canvas: Canvas) -> tuple[Placed, ...]:
    """Where each reference lies.

    With the method "index" the n-th has the index n. With "offset" the index is 1, and each goes beside or below the
    others of that index, whichever keeps all of them together closer to a square.
    """
    placed: list[Placed] = []
    for number, reference in enumerate(references, 1):
        width, height = (side // canvas.model.latent.factor for side in reference.size(canvas))
        index, row, column = reference.index, reference.row, reference.column
        if reference.method != "fixed":
            index, row, column = (number, 0, 0) if reference.method == "index" else (1, *_free(placed, height, width))
        placed.append(Placed(height, width, index, row, column))
    return tuple(placed)


def _free(placed: Sequence[Placed], height: int, width: int) -> tuple[int, int]:
    """The (row, column), in tokens, of the next place beside or below those of index 1."""
    others = [p for p in placed if p.index == 1]
    bottom = max((p.row + p.height // PATCH for p in others), default=0)
    right = max((p.column + p.width // PATCH for p in others), default=0)
    beside = height // PATCH + bottom > width // PATCH + right
    return (0, right) if beside else (bottom, 0)


Negative = Literal["reuse", "none", "again"]


@dataclass(frozen=True)
class SideNetCondition:
    """A ControlNet with its image. Active while a step lies within `start`..`end` of the run.

    `curve` multiplies the scale over the run (interpolated). `negative` says what the net does in the negative pass of
    true CFG: "reuse" the positive pass's residuals (diffusers), "none" (InvokeAI), or run "again" with the negative
    prompt (XLabs, ComfyUI).
    """

    kind: ClassVar[Kind] = Kind.SIDE_NET
    net: ControlNet
    source: Source
    scale: float = 1.0
    start: float = 0.0
    end: float = 1.0
    curve: tuple[float, ...] = ()
    mode: int | None = None
    negative: Negative = "reuse"

    @property
    def serves_negative(self) -> bool:
        return self.negative == "reuse"

    def bind(self, canvas: Canvas) -> Conditioner:
        _tell_idle(f"the ControlNet {self.net.name}", self.start, self.end, canvas)
        return self.net.bind(canvas, self)

    def weight(self, step: Step) -> float:
        """The scale in this step, 0 outside the range."""
        return self.scale * along(self.curve, step) if step.within(self.start, self.end) else 0.0


def _tell_idle(name: str, start: float, end: float, canvas: Canvas) -> None:
    """A range too narrow for the number of steps would do nothing, and nobody would know why."""
    every = list(steps(canvas.sigmas.tolist()))
    if not canvas.negative and not any(step.within(start, end) for step in every):
        log.warning(
            "%s has no effect: none of the %d steps lies wholly between %g and %g; widen the range or use more steps",
            name, len(every), start, end,
        )  # fmt: skip


def along(curve: Sequence[float], step: Step) -> float:
    """A curve's value at a step, with its points spread evenly over the run; 1 without points."""
    if not curve:
        return 1.0
    place = step.index / max(1, step.count - 1) * (len(curve) - 1)
    low = min(math.floor(place), len(curve) - 1)
    high = min(low + 1, len(curve) - 1)
    return curve[low] + (curve[high] - curve[low]) * (place - low)


@dataclass(frozen=True)
class ImagePromptCondition:
    """An IP-Adapter with embedded images (B, n, D); `scale` for all double blocks, or one for each.

    `negative` are the embeddings for the negative pass of true CFG (None: no image prompt there).
    """

    kind: ClassVar[Kind] = Kind.IMAGE_PROMPT
    serves_negative: ClassVar[bool] = False
    adapter: IPAdapter
    embeds: Tensor
    negative: Tensor | None = None
    scale: float | tuple[float, ...] = 1.0
    start: float = 0.0
    end: float = 1.0

    def bind(self, canvas: Canvas) -> Conditioner:
        embeds = self.negative if canvas.negative else self.embeds
        if embeds is None:
            return lambda inputs, step: inputs
        _tell_idle(f"the IP-Adapter {self.adapter.name}", self.start, self.end, canvas)
        prompt = self.adapter.attention(embeds, self.scales(canvas.model.params.depth), canvas)

        def look(inputs: Inputs, step: Step) -> Inputs:
            if not step.within(self.start, self.end):
                return inputs
            return replace(inputs, image_prompts=(*inputs.image_prompts, prompt))

        return look

    def scales(self, blocks: int) -> tuple[float, ...]:
        """One scale for each double block."""
        if isinstance(self.scale, (int, float)):
            return (float(self.scale),) * blocks
        if len(self.scale) != blocks:
            raise FluxError(
                f"{len(self.scale)} scales were given for the {blocks} double blocks; give one, or one for each"
            )
        return tuple(float(s) for s in self.scale)
