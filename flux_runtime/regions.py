"""Attention bias over a layout: which tokens see which, and how strongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from .conditioning import Conditioning, Prompt
from .errors import FluxError
from .layout import PATCH, Layout
from .masks import combine_masks


def within(conditioning: Conditioning, region: Tensor, strength: float = 1.0) -> Conditioning:
    """The conditioning with prompts that count in a region (H, W) alone; where one has a region already, in both."""

    def placed(prompt: Prompt) -> Prompt:
        both = region if prompt.region is None else combine_masks(prompt.region, region, "intersect")[0]
        return replace(prompt, region=both, strength=prompt.strength * strength)

    return replace(conditioning, prompts=tuple(map(placed, conditioning.prompts)))


def attention_bias(layout: Layout, prompts: Sequence[Prompt], strengths: Sequence[float]) -> Tensor | None:
    """(1, 1, S, S) to add to the attention scores, or None where everything sees everything alike.

    A prompt with a region is seen only by the canvas inside it (softly where the mask is), and sees only that; regional
    prompts do not see each other. A strength other than 1 adds its logarithm to the scores of those tokens, so that
    their softmax weight is multiplied. `strengths` are those of the references.
    """
    regional = any(p.region is not None for p in prompts)
    if not regional and all(s == 1 for s in (*strengths, *(p.strength for p in prompts))):
        return None
    weight = torch.ones(layout.total_tokens, layout.total_tokens)
    spans = layout.text_spans()
    if regional:
        _keep_apart(weight, layout, prompts, spans)
    for span, prompt in zip(spans, prompts, strict=True):
        _scale(weight, span, prompt.strength)
    for span, strength in zip(layout.reference_spans(), strengths, strict=True):
        _scale(weight, span, strength)
    return weight.log()[None, None]


def _keep_apart(weight: Tensor, layout: Layout, prompts: Sequence[Prompt], spans: Sequence[slice]) -> None:
    canvas = layout.canvas_span()
    for index, (prompt, span) in enumerate(zip(prompts, spans, strict=True)):
        if prompt.region is None:
            continue
        inside = region_tokens(prompt.region, layout)
        weight[canvas, span] = inside[:, None]
        weight[span, canvas] = inside[None, :]
        for other_index, other in enumerate(spans):
            if other_index != index and prompts[other_index].region is not None:
                weight[span, other] = 0.0


def region_tokens(region: Tensor, layout: Layout) -> Tensor:
    """(H, W) mask of any size -> one weight in 0..1 for each canvas token."""
    size = layout.height // PATCH, layout.width // PATCH
    mask = F.interpolate(region[None, None].float(), size=size, mode="area").clamp(0, 1)
    if not mask.any():
        raise FluxError("a region's mask has no white pixel: nothing would be drawn there; paint the region white")
    return mask.flatten()


def _scale(weight: Tensor, span: slice, strength: float) -> None:
    """The columns are the tokens looked at; what a token gives to itself and its own span stays."""
    if strength == 1:
        return
    if strength < 0:
        raise FluxError(f"a strength of {strength} is not possible; use 0 (unseen) or more")
    own = weight[span, span].clone()
    weight[:, span] *= strength
    weight[span, span] = own
