"""Attention bias over a layout: which tokens see which, and how strongly."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations

import torch
import torch.nn.functional as F
from torch import Tensor

from .conditioning import Conditioning, Prompt
from .errors import FluxError
from .layout import PATCH, Layout
from .masks import combine_masks

EVERYTHING = torch.ones(1)
ALIGNED = 16  # numbers


def within(conditioning: Conditioning, region: Tensor, strength: float = 1.0) -> Conditioning:
    """The conditioning with prompts that count in a region (H, W) alone; where one has a region already, in both."""

    def placed(prompt: Prompt) -> Prompt:
        both = region if prompt.region is None else combine_masks(prompt.region, region, "intersect")[0]
        return replace(prompt, region=both, strength=prompt.strength * strength)

    return replace(conditioning, prompts=tuple(map(placed, conditioning.prompts)))


def attention_bias(
    layout: Layout,
    prompts: Sequence[Prompt],
    strengths: Sequence[float],
    *,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor | None:
    """(1, 1, S, S) to add to the attention scores, or None where everything sees everything alike.

    A prompt with a region is seen only by the canvas inside it (softly where the mask is), and sees only that; regional
    prompts do not see each other. A strength other than 1 adds its logarithm to the scores of those tokens, so that
    their softmax weight is multiplied; what a token gives to itself and its own span stays. `strengths` are those of
    the references.
    """
    spans = (*layout.text_spans(), layout.canvas_span(), *layout.reference_spans())
    looked_at = (*(_checked(p.strength) for p in prompts), 1.0, *map(_checked, strengths))
    inside = {n: region_tokens(p.region, layout) for n, p in enumerate(prompts) if p.region is not None}
    if not inside and set(looked_at) == {1.0}:
        return None

    def seen(row: int, column: int) -> Tensor:
        """How much the tokens of one span see of another's, as something that spreads over that block."""
        if row in inside and column in inside:
            return torch.tensor(0.0)
        if len(prompts) in (row, column):  # the canvas
            return inside.get(row, EVERYTHING)[None, :] if row < column else inside.get(column, EVERYTHING)[:, None]
        return EVERYTHING

    bias = _zeros(layout.total_tokens, device, dtype)
    for (row, rows), (column, columns) in permutations(enumerate(spans), 2):
        bias[rows, columns] = (seen(row, column) * looked_at[column]).log().to(bias)
    return bias[None, None]


def _checked(strength: float) -> float:
    if strength < 0:
        raise FluxError(f"a strength of {strength} is not possible; use 0 (unseen) or more")
    return strength


def _zeros(size: int, device: torch.device | None, dtype: torch.dtype) -> Tensor:
    """(size, size) with rows so far apart that CUDA's attention does not copy it in every call to align them."""
    return torch.zeros(size, -(-size // ALIGNED) * ALIGNED, device=device, dtype=dtype)[:, :size]


def region_tokens(region: Tensor, layout: Layout) -> Tensor:
    """(H, W) mask of any size -> one weight in 0..1 for each canvas token."""
    size = layout.height // PATCH, layout.width // PATCH
    mask = F.interpolate(region[None, None].float(), size=size, mode="area").clamp(0, 1)
    if not mask.any():
        raise FluxError("a region's mask has no white pixel: nothing would be drawn there; paint the region white")
    return mask.flatten()
