"""FLUX.1 Redux: pictures as prompts. Their tokens stand beside the text's, with a strength of their own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapters import Redux
from .conditioning import Conditioning, Prompt
from .errors import FluxError

Combine = Literal["sum", "average", "join"]


def redux_prompts(
    text: Prompt,
    redux: Redux,
    images: Tensor | Sequence[Tensor],
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

    Pictures of several sizes come as several batches.

    "sum" adds up the scaled tokens of all pictures and the scaled text once for each (diffusers), "average" divides
    that by their number, "join" sets the pictures' tokens one after another beside the unscaled text. The scales
    multiply tokens; the strengths multiply the attention they get. `downsample` 3 leaves 9x9 of the 27x27 tokens of a
    picture.
    """
    batches = [images] if isinstance(images, Tensor) else images
    tokens = thinned(torch.cat([redux.tokens(alike) for alike in batches]), downsample)
    count = len(tokens)
    _check(text, tokens, redux.name, combine)
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


def with_pictures(
    conditioning: Conditioning,
    redux: Redux,
    images: Tensor,
    *,
    combine: Combine = "join",
    downsample: int = 1,
    text_strength: float = 1.0,
    image_strength: float = 1.0,
    region: Tensor | None = None,
) -> Conditioning:
    """A conditioning with pictures (n, H, W, 3) beside its words; pictures that it holds already stay as they are."""
    if not conditioning.prompts:
        raise FluxError("this conditioning holds no prompt; connect an Encode Prompt node to it (it may be empty)")
    lead = next((p for p in conditioning.prompts if not p.picture), conditioning.prompts[0])
    options = {"combine": combine, "downsample": downsample, "image_strength": image_strength, "region": region}
    text, picture = redux_prompts(lead, redux, images, scales=[1.0], pooled_scales=[1.0], **options)
    summed = {"tokens": text.tokens, "pooled": text.pooled} if combine == "sum" else {}
    words = [
        p if p.picture else replace(p, strength=p.strength * text_strength, **(summed if p is lead else {}))
        for p in conditioning.prompts
    ]
    return replace(conditioning, prompts=(*words, replace(picture, picture=True)))


def thinned(tokens: Tensor, factor: int) -> Tensor:
    """(n, side * side, C) image tokens with the mean of each factor x factor square left."""
    side = math.isqrt(tokens.shape[1])
    if factor == 1:
        return tokens
    if not 1 < factor <= side or side * side != tokens.shape[1]:
        raise FluxError(f"{tokens.shape[1]} image tokens cannot be thinned out by {factor}; use 1 to {side}")
    grid = tokens.transpose(1, 2).unflatten(2, (side, side))
    return F.interpolate(grid, size=(math.ceil(side / factor),) * 2, mode="area").flatten(2).transpose(1, 2)


def _check(text: Prompt, tokens: Tensor, name: str, combine: Combine) -> None:
    rows, count = len(text.tokens), len(tokens)
    if tokens.shape[-1] != text.tokens.shape[-1]:
        raise FluxError(
            f"Redux {name} makes tokens of {tokens.shape[-1]} numbers and the text encoders make them of "
            f"{text.tokens.shape[-1]}: it was made for another model"
        )
    if rows != 1 and (combine == "join" or rows != count):
        raise FluxError(f"{rows} prompts cannot share {count} pictures; use one prompt")


def _weights(scales: Sequence[float], count: int, like: Tensor) -> Tensor:
    if len(scales) not in (1, count):
        raise FluxError(f"{len(scales)} scales were given for {count} pictures; give one, or one for each")
    return torch.tensor([float(s) for s in scales], device=like.device, dtype=like.dtype).expand(count)
