"""From conditionings and latents to new latents: binds everything to a canvas and runs the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from . import solvers
from .bind import Canvas, bind, negative_conditions, run_transformer
from .conditioning import Conditioning
from .errors import FluxError, check_finite
from .flux import FluxModel
from .guidance import Cfg, Plain
from .inpaint import Differential, KeepOutside, renoise
from .layout import pack, unpack
from .sampling import Guide, Solver, Step, denoise
from .schedule import cut

log = logging.getLogger("fluxcanvas")
Watcher = Callable[[Step, Tensor, Tensor], None]


def make_noise(shape: Sequence[int], seed: int | Sequence[int]) -> Tensor:
    """Standard normal noise (B, C, h, w) in float32, drawn on the CPU, so that a seed means the same on every device.

    One seed draws the whole batch; a list has one seed a picture.
    """
    if isinstance(seed, int):
        return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    if len(seed) != shape[0]:
        raise FluxError(f"{len(seed)} seeds cannot draw {shape[0]} pictures; give one seed, or one for each")
    return torch.cat([make_noise((1, *shape[1:]), int(s)) for s in seed])


@torch.no_grad()
def sample(
    model: FluxModel,
    positive: Conditioning,
    negative: Conditioning | None = None,
    *,
    latents: Tensor | None,
    noise: Tensor | None,
    steps: int,
    sigmas: Sequence[float] | Tensor | None = None,
    start: float = 0.0,
    end: float = 1.0,
    guidance: float | None = None,
    true_cfg_scale: float = 1.0,
    noise_mask: Tensor | None = None,
    soft_mask: bool = False,
    solver: Solver = solvers.euler,
    watch: Watcher | None = None,
) -> Tensor:
    """Draw: raw latents (B, C, h, w) -> raw latents in float32.

    `start` and `end` cut the schedule, as fractions of its steps: a later start keeps more of `latents`, an earlier
    end leaves noise in the result. `noise` None means that `latents` are already at the noise level of the start,
    `latents` None that the noise alone is, whatever level that may be.
    `noise_mask` (B or 1, 1, any size), 1 where to draw, keeps the rest; where it is grey it blends, or with `soft_mask`
    sets from when on a pixel changes. `watch` gets (step, x, clean estimate) as model-space latents (B, C, h, w) after
    every step, and may raise to stop.
    """
    shape = _shape(model, latents, noise)
    height, width = shape[2:]
    levels = cut(model.sigmas(steps, height, width, sigmas), start, end)
    source = None if latents is None else _tokens(model, model.latent.to_model(latents.float()))
    fresh = None if noise is None else _tokens(model, noise)
    x = _start(source, fresh, levels[0].item())
    constraints = () if noise_mask is None else (_keep(source, fresh, noise_mask, height, width, soft_mask),)
    observe = None if watch is None else _unpacked(watch, height, width)
    with model.ready():
        guide = _guide(model, positive, negative, shape, levels, guidance, true_cfg_scale)
        model_call = run_transformer(model.transformer)
        x = denoise(model_call, x, levels.tolist(), guide, solver=solver, constraints=constraints, watch=observe)
    check_finite(x, f"the {model.variant.name} model")
    return model.latent.to_raw(unpack(x, height, width).float())


def _shape(model: FluxModel, latents: Tensor | None, noise: Tensor | None) -> torch.Size:
    want = model.latent.channels
    given = [tensor.shape for tensor in (latents, noise) if tensor is not None]
    if not given:
        raise FluxError("there is nothing to draw from; give latents, noise or both")
    for shape in given:
        if len(shape) != 4 or shape[1] != want:
            raise FluxError(f"FLUX.1 draws latents of shape (batch, {want}, height, width); got {tuple(shape)}")
    if given[0] != given[-1]:
        raise FluxError(f"noise of shape {tuple(given[-1])} does not fit latents of {tuple(given[0])}; make them alike")
    return given[0]


def _tokens(model: FluxModel, latents: Tensor) -> Tensor:
    return pack(latents.to(model.device, model.dtype))


def _start(source: Tensor | None, noise: Tensor | None, sigma: float) -> Tensor:
    if source is None or noise is None:
        return noise if source is None else source
    return noise if sigma == 1 else renoise(source, noise, sigma)


def _guide(
    model: FluxModel,
    positive: Conditioning,
    negative: Conditioning | None,
    shape: torch.Size,
    sigmas: Tensor,
    guidance: float | None,
    true_cfg_scale: float,
) -> Guide:
    where = shape[0], model.device, model.dtype
    canvas = Canvas(model, shape, sigmas, positive.for_canvas(*where), _guidance(model, positive, guidance))
    branch = bind(canvas, positive.conditions)
    if negative is None or true_cfg_scale <= 1:
        _tell_one_pass(negative is not None, true_cfg_scale)
        return Plain(branch)
    own = canvas.guidance if negative.guidance is None else _guidance(model, negative, guidance)
    other = replace(canvas, prompts=negative.for_canvas(*where), guidance=own, negative=True)
    return Cfg(branch, bind(other, negative_conditions(positive, negative), branch), true_cfg_scale)


def _tell_one_pass(has_negative: bool, true_cfg_scale: float) -> None:
    """True CFG takes a negative prompt and a scale above 1; one without the other does nothing."""
    if has_negative:
        log.warning("the negative prompt has no effect at a true_cfg_scale of %g: it must be above 1", true_cfg_scale)
    elif true_cfg_scale > 1:
        log.warning("the true_cfg_scale of %g has no effect without a negative prompt", true_cfg_scale)


def _guidance(model: FluxModel, conditioning: Conditioning, override: float | None) -> float:
    """The override, else what the conditioning asks for, else what the model's makers recommend."""
    asked = conditioning.guidance if override is None else override
    if asked and not model.params.guidance_embed:
        log.warning("%s has no guidance embedding: the guidance of %g has no effect", model.variant.name, asked)
    largest = torch.finfo(model.dtype).max / 1000  # the embedding reads thousandths
    if asked is not None and model.params.guidance_embed and not abs(asked) < largest:
        raise FluxError(
            f"a guidance of {asked:g} is beyond what {str(model.dtype).removeprefix('torch.')} holds; "
            f"use less than {largest:.0f}"
        )
    return model.variant.guidance if asked is None else asked


def _keep(
    source: Tensor | None, noise: Tensor | None, mask: Tensor, height: int, width: int, soft: bool
) -> KeepOutside | Differential:
    if noise is None:
        raise FluxError("a masked latent needs fresh noise: switch `add_noise` on, or remove the mask")
    if source is None:
        raise FluxError("a mask keeps a part of a picture: give its latents, or remove the mask")
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    if len(source) % len(mask):
        raise FluxError(
            f"{len(mask)} masks cannot be shared out among {len(source)} pictures; use 1 or a divisor of {len(source)}"
        )
    fitted = F.interpolate(mask, size=(height, width), mode="nearest")
    if not fitted.flatten(1).any(1).all():
        raise FluxError(
            f"the mask marks nothing at the latents' {width}x{height} (one for 8x8 pixels), so nothing would be drawn: "
            "paint a larger part white, or grow the mask"
        )
    channels = source.shape[-1] // 4
    flags = pack(fitted.repeat(len(source) // len(mask), channels, 1, 1)).to(source)
    return (Differential if soft else KeepOutside)(source, noise, flags)


def _unpacked(watch: Watcher, height: int, width: int) -> Watcher:
    def observe(step: Step, x: Tensor, clean: Tensor) -> None:
        watch(step, unpack(x, height, width), unpack(clean, height, width))

    return observe
