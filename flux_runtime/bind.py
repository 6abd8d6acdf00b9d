"""Binding: a conditioning meets its canvas, once a run. The order is by kind of condition, not by the user's wiring."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import zip_longest

import torch
from torch import Tensor

from .conditioning import Conditioning, Prompt
from .conditions import Condition, Conditioner, Kind, place
from .errors import FluxError
from .flux import FluxModel
from .layout import Layout, pack
from .model.blocks import ImagePrompt
from .model.transformer import FluxTransformer, Residuals
from .model.trunk import Context, Modulation, Trunk
from .order import in_order
from .regions import attention_bias
from .sampling import Step


@dataclass(frozen=True)
class Inputs:
    """What the transformer reads in one call; conditioners return a changed copy."""

    img: Tensor
    context: Context
    modulation: Modulation
    layout: Layout
    sigma: float
    residuals: Residuals = field(default_factory=Residuals)
    image_prompts: tuple[ImagePrompt, ...] = ()
    bias: Tensor | None = None


@dataclass(frozen=True)
class Canvas:
    """What a condition needs to know of the run it is bound to. `shape` is that of the latents, (B, C, h, w)."""

    model: FluxModel
    shape: torch.Size
    sigmas: Tensor
    prompts: tuple[Prompt, ...]
    guidance: float
    negative: bool = False  # whether conditions of the positive prompt are bound for the negative pass

    @property
    def width(self) -> int:
        return self.shape[3] * self.model.latent.factor

    @property
    def height(self) -> int:
        return self.shape[2] * self.model.latent.factor

    @cached_property
    def text(self) -> Tensor:
        """All prompts' tokens, one after another: (B or 1, L, C)."""
        return torch.cat([p.tokens for p in self.prompts], dim=1)

    @property
    def pooled(self) -> Tensor:
        return self.prompts[0].pooled

    @cached_property
    def levels(self) -> dict[float, int]:
        """The number of each noise level that the model is asked at."""
        return {sigma: index for index, sigma in enumerate(self.sigmas[:-1].tolist())}

    def layout(self, references: tuple = ()) -> Layout:
        return Layout(tuple(p.tokens.shape[1] for p in self.prompts), self.shape[2], self.shape[3], references)

    def tokens(self, raw: Tensor) -> Tensor:
        """Raw latents as tokens of the model, in its dtype; a batch of 1 serves all pictures, k divide them."""
        tokens = pack(self.model.latent.to_model(raw)).to(self.model.device, self.model.dtype)
        return self.for_batch(tokens)

    def for_batch(self, rows: Tensor) -> Tensor:
        """Repeat the rows of a batch of pictures in turn, as often as the canvas needs."""
        have, need = len(rows), self.shape[0]
        if have == 1 or have == need:
            return rows
        if need % have:
            raise FluxError(
                f"{have} pictures cannot be shared out among a batch of {need}; use 1 or a divisor of {need}"
            )
        return rows.repeat(need // have, *[1] * (rows.ndim - 1))

    def modulation(self, trunk: Trunk) -> Modulation:
        """The modulation of a network for all noise levels of the run at once."""
        pooled = self.pooled[None].to(trunk.device, trunk.dtype)
        levels = self.sigmas[:-1].to(pooled.device)[:, None]
        guidance = torch.tensor(self.guidance, device=pooled.device)
        return trunk.modulate(trunk.embed(levels, guidance, pooled))


@dataclass(frozen=True)
class Bound:
    """A conditioning bound to a canvas: all that its steps share."""

    context: Context
    modulation: Modulation
    levels: dict[float, int]
    layout: Layout
    bias: Tensor | None
    conditioners: tuple[tuple[Condition, Conditioner], ...]

    def __call__(self, x: Tensor, sigma: float, step: Step) -> Inputs:
        inputs = Inputs(x, self.context, self.modulation[self.levels[sigma]], self.layout, sigma, bias=self.bias)
        for _, condition in self.conditioners:
            inputs = condition(inputs, step)
        return inputs


def bind(canvas: Canvas, conditions: Sequence[Condition], positive: Bound | None = None) -> Bound:
    """Prepare one branch: its layout, what all its steps share, and its conditioners.

    The negative branch is given the `positive` one, and shares the conditioners that serve both.
    """
    transformer, model = canvas.model.transformer, canvas.model
    _check_prompt(model, canvas)
    ordered = in_order(conditions)
    _check_channels(model, ordered)
    references = [c for c in ordered if c.kind is Kind.REFERENCE]
    layout = canvas.layout(place(references, canvas))
    context = transformer.prepare(canvas.text, layout.ids())
    txt = context.txt.expand(canvas.shape[0], -1, -1)
    strengths = [r.strength for r in references]
    return Bound(
        context=Context(txt, context.rope),
        modulation=canvas.modulation(transformer),
        levels=canvas.levels,
        layout=layout,
        bias=attention_bias(layout, canvas.prompts, strengths, device=model.device, dtype=model.dtype),
        conditioners=tuple((c, _conditioner(c, canvas, positive)) for c in ordered),
    )


def _conditioner(condition: Condition, canvas: Canvas, positive: Bound | None) -> Conditioner:
    """In the negative branch, what the positive one lends it knows where it is; the negative's own acts as it is."""
    if positive is None:
        return condition.bind(canvas)
    lent = next((conditioner for known, conditioner in positive.conditioners if known is condition), None)
    if lent is None:
        return condition.bind(replace(canvas, negative=False))
    return lent if condition.serves_negative else condition.bind(canvas)


def negative_conditions(positive: Conditioning, negative: Conditioning) -> tuple[Condition, ...]:
    """What the negative pass of true CFG sees: its own conditions, and the positive's of every kind it has none of."""
    own = {c.kind for c in negative.conditions}
    return (*negative.conditions, *(c for c in positive.conditions if c.kind not in own))


def run_transformer(transformer: FluxTransformer) -> Callable[[Inputs], Tensor]:
    """The model as the loop sees it: a branch's inputs -> the velocity of the canvas."""

    def velocity(inputs: Inputs) -> Tensor:
        predicted = transformer(
            inputs.img,
            inputs.context,
            inputs.modulation,
            residuals=inputs.residuals,
            image_prompts=inputs.image_prompts,
            bias=inputs.bias,
        )
        return inputs.layout.canvas(predicted)

    return velocity


def with_residuals(inputs: Inputs, more: Residuals) -> Inputs:
    """Add what one more side network says, block by block."""
    have = inputs.residuals
    return replace(inputs, residuals=Residuals(_sum(have.double, more.double), _sum(have.single, more.single)))


def _sum(a: Sequence[Tensor | None], b: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    """Blocks that share a residual share the sum: otherwise two nets would hold one for each of 57 blocks."""
    sums: dict[tuple[int, int], Tensor | None] = {}
    pairs = list(zip_longest(a, b))
    for x, y in pairs:
        if (id(x), id(y)) not in sums:
            sums[id(x), id(y)] = y if x is None else x if y is None else x + y
    return tuple(sums[id(x), id(y)] for x, y in pairs)


def _check_prompt(model: FluxModel, canvas: Canvas) -> None:
    params = model.params
    have, want = (canvas.text.shape[-1], canvas.pooled.shape[-1]), (params.context_in_dim, params.vec_in_dim)
    if have != want:
        raise FluxError(
            f"the text encoders give T5 tokens of {have[0]} and a CLIP vector of {have[1]} numbers, but this model "
            f"reads {want[0]} and {want[1]}: encode the prompt with the text encoders that belong to the model"
        )


NEEDS = {1: "a prompt alone", 2: "a control image (Control Image)", 6: "a picture and a mask to fill (Fill Condition)"}


def _check_channels(model: FluxModel, conditions: Sequence[Condition]) -> None:
    """The canvas and what lies beside it must fill the model's input; a sentence says what is missing or too much."""
    beside = [c for c in conditions if c.kind is Kind.CHANNELS]
    want = model.params.in_channels // (4 * model.latent.channels)
    if 1 + sum(c.beside for c in beside) == want:
        return
    name, needs = model.variant.name, NEEDS.get(want, f"{model.params.in_channels} channels")
    if not beside:
        raise FluxError(f"a {name} model draws from {needs}, which is missing; add it, or load dev or schnell")
    given = " and ".join(type(c).__name__ for c in beside)
    raise FluxError(f"a {name} model draws from {needs}, but was given {given}; load the model that was made for it")
