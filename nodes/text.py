"""Words become conditioning; several are joined, each in its place."""

from __future__ import annotations

from typing import Annotated

from .edges import FLUX_CONDITIONING, FLUX_TEXT, MASK
from .host import current
from .masks import region_of
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


@node("Combine Conditioning", category="conditioning", aliases=("conditioning combine", "concat", "regional", "merge"))
def combine_conditioning(
    first: Annotated[FLUX_CONDITIONING, "A prompt with its conditions. Its overall look and its guidance lead."],
    second: Annotated[FLUX_CONDITIONING, "Another."],
) -> Annotated[FLUX_CONDITIONING, Output("conditioning"), "Both together, in one picture."]:
    """Draws two prompts, with all their conditions, into one picture. Give each a Region Prompt to keep them apart."""
    from ..flux_runtime.conditioning import combine

    if None not in (first.guidance, second.guidance) and first.guidance != second.guidance:
        current().text(f"the prompts ask for different guidance; the first's {first.guidance:g} is taken")
    return combine(first, second)


@node(
    "Region Prompt",
    category="conditioning",
    aliases=("regional prompt", "conditioning set mask", "area", "attention mask"),
)
def region_prompt(
    conditioning: Annotated[FLUX_CONDITIONING, "The prompt that is to count in one place only."],
    mask: Annotated[MASK, "Where it counts: white. It is stretched over the canvas, greys count in part."],
    strength: Annotated[float, Range(0.0, 10.0, 0.05), "How much attention the prompt gets there."] = 1.0,
) -> Annotated[FLUX_CONDITIONING, Output("conditioning"), "The prompt in its place, for Combine Conditioning."]:
    """Makes a prompt count in one part of the picture alone. Combine it with others, and with one for the whole."""
    from ..flux_runtime.regions import within

    return within(conditioning, region_of(mask), strength)
