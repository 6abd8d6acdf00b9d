"""From conditionings and latents to new latents: binds everything to a canvas and runs the loop."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from . import solvers
from .conditioning import Conditioning
from .errors import FluxError
from .flux import FluxModel
from .guidance import Cfg, Plain
from .inpaint import KeepOutside, renoise
from .layout import Layout, pack, unpack
from .model.transformer import Context, FluxTransformer, Modulation
from .sampling import Guide, Solver, Step, denoise
from .schedule import cut

log = logging.getLogger("fluxcanvas")
Watcher = Callable[[Step, Tensor, Tensor], None]


@dataclass(frozen=True)
class Inputs:
    """What the transformer reads in one call, and which of its tokens are the canvas."""

    img: Tensor
    context: Context
    modulation: Modulation
    layout: Layout


@dataclass(frozen=True)
class Bound:
    """A conditioning bound to a canvas: all that its steps share, and the modulation of each noise level."""

    context: Context
    modulation: Modulation
    levels: dict[float, int]
    layout: Layout

    def __call__(self, x: Tensor, sigma: float, step: Step) -> Inputs:
        return Inputs(x, self.context, self.modulation[self.levels[sigma]], self.layout)


def bind(model: FluxModel, conditioning: Conditioning, shape: torch.Size, sigmas: Tensor, guidance: float) -> Bound:
    """Prepare one branch for latents of `shape` (B, C, h, w) and for all these noise levels at once."""
    transformer = model.transformer
    prompt = conditioning.joined().to(model.device, model.dtype).for_batch(shape[0])
    _check_prompt(model, prompt.tokens, prompt.pooled)
    layout = Layout((prompt.tokens.shape[1],), shape[2], shape[3])
    context = transformer.prepare(prompt.tokens, layout.ids())
    levels = sigmas[:-1].to(model.device)[:, None]  # the last one is only arrived at
    embedding = transformer.embed(levels, torch.tensor(guidance, device=model.device), prompt.pooled[None])
    txt = context.txt.expand(shape[0], -1, -1)
    indices = {sigma: index for index, sigma in enumerate(sigmas[:-1].tolist())}
    return Bound(Context(txt, context.rope), transformer.modulate(embedding), indices, layout)


def _check_prompt(model: FluxModel, tokens: Tensor, pooled: Tensor) -> None:
    params = model.params
    have, want = (tokens.shape[-1], pooled.shape[-1]), (params.context_in_dim, params.vec_in_dim)
    if have != want:
        raise FluxError(
            f"the text encoders give T5 tokens of {have[0]} and a CLIP vector of {have[1]} numbers, but this model reads "
            f"{want[0]} and {want[1]}: encode the prompt with the text encoders that belong to the model"
        )


def run_transformer(transformer: FluxTransformer) -> Callable[[Inputs], Tensor]:
    """The model as the loop sees it: a branch's inputs -> the velocity of the canvas."""

    def velocity(inputs: Inputs) -> Tensor:
        return inputs.layout.canvas(transformer(inputs.img, inputs.context, inputs.modulation))

    return velocity


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
    latents: Tensor,
    noise: Tensor | None,
    steps: int,
    sigmas: Sequence[float] | Tensor | None = None,
    start: float = 0.0,
    end: float = 1.0,
    guidance: float | None = None,
    true_cfg_scale: float = 1.0,
    noise_mask: Tensor | None = None,
    solver: Solver = solvers.euler,
    watch: Watcher | None = None,
) -> Tensor:
    """Draw: raw latents (B, C, h, w) -> raw latents in float32.

    `start` and `end` cut the schedule, as fractions of its steps: a later start keeps more of `latents`, an earlier
    end leaves noise in the result. `noise` None means that `latents` are already at the noise level of the start.
    `noise_mask` (B or 1, 1, any size), 1 where to draw, keeps the rest. `watch` gets (step, x, clean estimate) as
    model-space latents (B, C, h, w) after every step, and may raise to stop.
    """
    _check_latents(model, latents)
    height, width = latents.shape[2:]
    levels = cut(model.sigmas(steps, height, width, sigmas), start, end)
    source = _tokens(model, model.latent.to_model(latents.float()))
    fresh = None if noise is None else _tokens(model, noise)
    x = source if fresh is None else _start(source, fresh, levels[0].item())
    guide = _guide(model, positive, negative, latents.shape, levels, guidance, true_cfg_scale)
    constraints = () if noise_mask is None else (_keep(source, fresh, noise_mask, height, width),)
    observe = None if watch is None else _unpacked(watch, height, width)
    model_call = run_transformer(model.transformer)
    x = denoise(model_call, x, levels.tolist(), guide, solver=solver, constraints=constraints, watch=observe)
    return model.latent.to_raw(unpack(x, height, width).float())


def _check_latents(model: FluxModel, latents: Tensor) -> None:
    want = model.latent.channels
    if latents.ndim != 4 or latents.shape[1] != want:
        raise FluxError(f"FLUX.1 draws latents of shape (batch, {want}, height, width); got {tuple(latents.shape)}")
    if model.params.in_channels != 4 * want:
        raise FluxError(
            f"a {model.variant.name} model reads {model.params.in_channels} channels, of which the canvas fills only "
            f"{4 * want}: it needs its control or fill image beside the prompt; for a prompt alone load dev or schnell"
        )


def _tokens(model: FluxModel, latents: Tensor) -> Tensor:
    return pack(latents.to(model.device, model.dtype))


def _start(source: Tensor, noise: Tensor, sigma: float) -> Tensor:
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
    strength = _guidance(model, positive, guidance)
    branch = bind(model, positive, shape, sigmas, strength)
    if negative is None or true_cfg_scale <= 1:
        return Plain(branch)
    return Cfg(branch, bind(model, negative, shape, sigmas, strength), true_cfg_scale)


def _guidance(model: FluxModel, conditioning: Conditioning, override: float | None) -> float:
    """The override, else what the conditioning asks for, else what the model's makers recommend."""
    asked = conditioning.guidance if override is None else override
    if asked and not model.params.guidance_embed:
        log.warning("%s has no guidance embedding: the guidance of %g has no effect", model.variant.name, asked)
    return model.variant.guidance if asked is None else asked


def _keep(source: Tensor, noise: Tensor | None, mask: Tensor, height: int, width: int) -> KeepOutside:
    if noise is None:
        raise FluxError("a masked latent needs fresh noise: switch `add_noise` on, or remove the mask")
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    fitted = F.interpolate(mask, size=(height, width), mode="nearest").to(source)
    channels = source.shape[-1] // 4
    return KeepOutside(source, noise, pack(fitted.expand(-1, channels, -1, -1)))


def _unpacked(watch: Watcher, height: int, width: int) -> Watcher:
    def observe(step: Step, x: Tensor, clean: Tensor) -> None:
        watch(step, unpack(x, height, width), unpack(clean, height, width))

    return observe
