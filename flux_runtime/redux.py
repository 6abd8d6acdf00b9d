"""FLUX.1 Redux: pictures as prompts. Their tokens stand beside the text's, with a strength of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapters import Redux
from .conditioning import Prompt
from .errors import FluxError

Combine = Literal["sum", "average", "join"]


def redux_prompts(
    text: Prompt,
    redux: Redux,
    images: Tensor,
    *,
    scales: Sequence[float],
    pooled_scales: Sequence[float],
    combine: Combine = "sum",
    downsample: int = 1,
    text_strength: float = 1.0,
    image_strength: float = 1.0,
    region: Tensor | None = None,
) -> tuple[Prompt, Prompt]:
    """A text prompt (1 or n rows) and n pictures (n, H, W, 3) -> the text and the picture prompt, of one row each.

    "sum" adds up the scaled tokens of all pictures and the scaled text once for each (diffusers), "average" divides that
    by their number, "join" sets the pictures' tokens one after another beside the unscaled text. The scales multiply
    tokens; the strengths multiply the attention they get. `downsample` 3 leaves 9x9 of the 27x27 tokens a picture.
    """
    tokens = thinned(redux.tokens(images), downsample)
    count = len(tokens)
    words = text.tokens.to(tokens).expand(count, -1, -1)
    pooled = text.pooled.to(tokens).expand(count, -1)
    weights, pooled_weights = (_weights(s, count, tokens) for s in (scales, pooled_scales))
    if combine == "join":
        joined = (tokens * weights[:, None, None]).flatten(0, 1)[None]
        return Prompt(words[:1], pooled[:1], strength=text_strength), Prompt(joined, pooled[:1], region, image_strength)
    share = 1 / count if combine == "average" else 1.0
    words, tokens = ((t * weights[:, None, None] * share).sum(0, keepdim=True) for t in (words, tokens))
    pooled = (pooled * pooled_weights[:, None] * share).sum(0, keepdim=True)
    return Prompt(words, pooled, strength=text_strength), Prompt(tokens, pooled, region, image_strength)


def thinned(tokens: Tensor, factor: int) -> Tensor:
    """(n, side * side, C) image tokens with the mean of each factor x factor square left."""
    side = math.isqrt(tokens.shape[1])
    if factor == 1:
        return tokens
    if not 1 < factor <= side or side * side != tokens.shape[1]:
        raise FluxError(f"{tokens.shape[1]} image tokens cannot be thinned out by {factor}; use 1 to {side}")
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))
    return F.interpolate(grid, size=(math.ceil(side / factor),) * 2, mode="area").flatten(2).transpose(1, 2)


def _weights(scales: Sequence[float], count: int, like: Tensor) -> Tensor:
    if len(scales) not in (1, count):
        raise FluxError(f"{len(scales)} scales were given for {count} pictures; give one, or one for each")
    return torch.tensor([float(s) for s in scales], device=like.device, dtype=like.dtype).expand(count)
