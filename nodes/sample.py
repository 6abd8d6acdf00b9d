"""Noise becomes a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

from ..flux_runtime.errors import FluxError
from .checks import forward
from .edges import FLUX_CONDITIONING, FLUX_MODEL, LATENT
from .host import Host, current
from .latent import flux_samples
from .schema import Output, node
from .widgets import Flag, Range, Seed

if TYPE_CHECKING:
    from torch import Tensor

    from ..flux_runtime.sampling import Step


@node(
    "Sample",
    category="sampling",
    aliases=("ksampler", "denoise", "generate", "draw", "img2img"),
    validate=forward("0 to 1 draws anew, 0.4 to 1 changes a given picture"),
)
def sample(
    model: Annotated[FLUX_MODEL, "The model, from Load FLUX."],
    positive: Annotated[FLUX_CONDITIONING, "What to draw, from Encode Prompt."],
    latent: Annotated[LATENT, "Where to draw: Empty Canvas for a new picture, Encode Image to change one."],
    seed: Annotated[int, Seed(), "Where the noise comes from. The same seed and settings draw the same picture."] = 0,
    steps: Annotated[
        int,
        Range(0, 1000),
        "How many steps from noise to picture. 0: what the model's makers recommend (schnell 4, dev 28).",
    ] = 0,
    guidance: Annotated[
        float,
        Range(0.0, 100.0, 0.1),
        "How strictly the prompt is followed. 0: as the prompt says, else what the model's makers recommend (dev 3.5).",
    ] = 0.0,
    true_cfg_scale: Annotated[
        float,
        Range(1.0, 30.0, 0.1),
        "How strongly to move away from the negative prompt. Above 1 each step takes twice as long; 1 ignores it.",
    ] = 1.0,
    start: Annotated[
        float,
        Range(0.0, 1.0, 0.01),
        "Where in the schedule to start. 0 draws anew; 0.3 keeps the layout of the given picture, 0.7 all but details.",
    ] = 0.0,
    end: Annotated[float, Range(0.0, 1.0, 0.01), "Where in the schedule to stop. 1 finishes the picture."] = 1.0,
    negative: Annotated[
        FLUX_CONDITIONING | None, "What to avoid, from a second Encode Prompt. Needs a true_cfg_scale above 1."
    ] = None,
    add_noise: Annotated[
        bool,
        Flag(optional=True),
        "Off: the latent comes from another Sample that ended where this one starts, and has its noise already.",
    ] = True,
) -> Annotated[LATENT, Output("latent"), "The drawn latent, for Decode."]:
    """Draws the picture, step by step, with a preview of each. It can be stopped between any two steps."""
    from ..flux_runtime import generate

    host = current()
    samples = flux_samples(latent, host)
    if not add_noise and not samples.any():
        raise FluxError("add_noise is off and the latent is empty, so there is nothing to draw from: switch it on")
    steps = steps or model.variant.steps
    plan = _plan(steps, f"seed {seed}" if add_noise else "no new noise", true_cfg_scale, negative is not None)
    host.text(plan + _ignored(model, guidance or positive.guidance))
    drawn = generate.sample(
        model, positive, negative,
        latents=samples, noise=generate.make_noise(samples.shape, seed) if add_noise else None,
        noise_mask=latent.get("noise_mask"), soft_mask=latent.get("noise_mask_mode") == "soft",
        steps=steps, start=start, end=end, guidance=guidance or None, true_cfg_scale=true_cfg_scale,
        watch=watcher(host, model),
    )  # fmt: skip
    return {**latent, "samples": drawn.float().cpu()}


def _plan(steps: int, noise: str, true_cfg_scale: float, has_negative: bool) -> str:
    """What the run will do, with a word on a setting that has no effect."""
    plan = f"{steps} steps, {noise}"
    if has_negative and true_cfg_scale <= 1:
        return plan + "; the negative prompt has no effect until true_cfg_scale is above 1"
    if true_cfg_scale > 1:
        return plan + (f", true CFG {true_cfg_scale:g}" if has_negative else "; true_cfg_scale needs a negative prompt")
    return plan


def _ignored(model: FLUX_MODEL, guidance: float | None) -> str:
    """A word on a guidance that a model such as schnell has no use for."""
    if not guidance or model.params.guidance_embed:
        return ""
    return f"; {model.variant.name} ignores the guidance of {guidance:g}"


def watcher(host: Host, model: FLUX_MODEL) -> Callable[[Step, Tensor, Tensor], None]:
    """What the loop calls after each step: shows progress and a preview, and lets the host stop the run."""
    from ..flux_runtime.preview import preview_image

    def watch(step: Step, x: Tensor, clean: Tensor) -> None:
        host.check_interrupt()
        preview = preview_image(model.vae, clean) if model.vae else None
        host.progress(step.index + 1, step.count, preview)

    host.check_interrupt()
    host.progress(0, 1)
    return watch
