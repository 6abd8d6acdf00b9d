"""Words become conditioning."""

from __future__ import annotations

from typing import Annotated

from .edges import FLUX_CONDITIONING, FLUX_TEXT
from .schema import Output, node
from .widgets import Range, Text


@node("Encode Prompt", category="conditioning", aliases=("prompt", "clip text encode", "t5", "positive", "negative"))
def encode_prompt(
    text: Annotated[FLUX_TEXT, "The text encoders, from Load FLUX."],
    prompt: Annotated[
        str,
        Text(multiline=True, dynamic=True, placeholder="what the picture shows"),
        "What the picture shows, in plain sentences.",
    ] = "",
    prompt_2: Annotated[
        str,
        Text(multiline=True, dynamic=True, placeholder="the same prompt"),
        "A second wording for the T5 encoder, which reads details; CLIP then reads the first. Empty: one for both.",
    ] = "",
    guidance: Annotated[
        float,
        Range(0.0, 100.0, 0.1),
        "How strictly the model follows this prompt. 0: what its makers recommend (dev 3.5). Schnell ignores it.",
    ] = 0.0,
    max_tokens: Annotated[
        int,
        Range(0, 512),
        "How many tokens T5 reads, one a word or so. 0: the checkpoint's own number (dev 512, schnell 256).",
    ] = 0,
) -> Annotated[FLUX_CONDITIONING, Output("conditioning"), "The encoded prompt, for Sample."]:
    """Turns words into what FLUX reads. For a negative prompt, use a second one of these."""
    from ..flux_runtime.conditioning import Conditioning

    encoded = text.encode(prompt, prompt_2 or None, max_tokens=max_tokens or None)
    return Conditioning(prompts=(encoded,), guidance=guidance or None)
