"""What all recipes share: their common options, the order in which random numbers are drawn, and the drawing itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from . import solvers
from .adapters import IPAdapter
from .conditioning import Conditioning
from .conditions import Condition, ImagePromptCondition
from .errors import FluxError
from .flux import Flux
from .generate import Watcher, sample
from .image import ImageLike, by_size, drawable, to_pil
from .layout import pack, unpack
from .sampling import Solver
from .vae import Vae

log = logging.getLogger("fluxcanvas")

Output = Literal["pil", "numpy", "tensor", "latent"]
Pictures = list[Image.Image] | np.ndarray | Tensor
Texts = str | Sequence[str]
Generator = torch.Generator | Sequence[torch.Generator]
Shape = tuple[int, int, int, int]


class Common(TypedDict, total=False):
    """The options that every recipe takes, all optional.

    Sides are floored to multiples of 16 and default to the checkpoint's size; `steps`, `guidance` and
    `max_sequence_length` default to what the model's makers recommend. The noise comes from `latents` (packed tokens or
    (B, 16, H/8, W/8)), from `generator` (one, or one a picture), or from `seed`, which is a CPU generator with that
    seed; without any of them a random seed is drawn, and logged. `conditions` are added to the recipe's own. With
    `soft_mask` the greys of a mask say from when on a pixel is redrawn, instead of being made black or white. An
    IP-Adapter, or several, takes part as `adapter` with its `adapter_image` (each one picture, or a list that makes one
    prompt together).
    """

    prompt_2: Texts | None
    negative_prompt: Texts | Conditioning | None
    negative_prompt_2: Texts | None
    true_cfg_scale: float
    height: int | None
    width: int | None
    steps: int | None
    sigmas: Sequence[float] | None
    guidance: float | None
    max_sequence_length: int | None
    images_per_prompt: int
    seed: int | None
    generator: Generator | None
    latents: Tensor | None
    output: Output
    watch: Watcher | None
    solver: Solver
    conditions: Sequence[Condition]
    soft_mask: bool
    adapter: IPAdapter | Sequence[IPAdapter]
    adapter_image: ImageLike | Sequence[ImageLike]
    negative_adapter_image: ImageLike | Sequence[ImageLike]
    adapter_scale: float | Sequence[float | Sequence[float]]
    adapter_start: float
    adapter_end: float


@dataclass(frozen=True)
class Job:
    """One call of a recipe: its conditionings, its size, and its generators, asked in the order of the oracle."""

    flux: Flux
    options: Common
    positive: Conditioning
    negative: Conditioning | None
    batch: int
    width: int
    height: int
    generators: tuple[torch.Generator, ...]

    @property
    def shape(self) -> Shape:
        latent = self.flux.model.latent
        return self.batch, latent.channels, self.height // latent.factor, self.width // latent.factor

    @property
    def generator(self) -> torch.Generator | list[torch.Generator]:
        return self.generators[0] if len(self.generators) == 1 else list(self.generators)

    def encode(self, images: Tensor, *, sampled: bool = True) -> Tensor:
        """(b, H, W, 3) -> raw latents, a sample of their distribution or its mean, repeated in turn for the batch."""
        vae, times = vae_of(self.flux), self._times(len(images))
        if not sampled:
            raw = vae.encode(images)
        elif len(self.generators) == 1:
            raw = vae.encode(images, self.generators[0])
        else:
            raw = vae.encode(images, list(self.generators[: len(images)]))
        return raw.repeat(times, 1, 1, 1)

    def encode_batch(self, images: Tensor) -> Tensor:
        """The same, but for control images: repeated for the batch first, so that each picture draws its own sample."""
        return vae_of(self.flux).encode(self.for_each(images), self.generator)

    def for_each(self, images: Tensor) -> Tensor:
        """One control image for all pictures, or one for each prompt, as one for each picture."""
        repeats = self.batch if len(images) == 1 else self.options.get("images_per_prompt", 1)
        every = images.repeat_interleave(repeats, dim=0)
        if len(every) != self.batch:
            raise FluxError(
                f"{len(images)} control images do not fit {self.batch} pictures; give 1, or one for each prompt"
            )
        return every

    def skip(self, count: int) -> None:
        """Draw and throw away `count` pictures' noise where the oracle encodes something that it never uses."""
        dtype = vae_of(self.flux).dtype
        for generator in self.generators[:1] if len(self.generators) == 1 else self.generators[:count]:
            rows = count if len(self.generators) == 1 else 1
            _draw((rows, *self.shape[1:]), generator, dtype)

    def noise(self) -> Tensor:
        """(B, 16, h, w) in the model's dtype: given, or drawn now."""
        given, dtype = self.options.get("latents"), self.flux.model.dtype
        if given is not None:
            return _given_noise(given, self.shape)
        if len(self.generators) == 1:
            return _draw(self.shape, self.generators[0], dtype)
        return torch.cat([_draw((1, *self.shape[1:]), g, dtype) for g in self.generators])

    def draw(
        self,
        noise: Tensor,
        conditions: Sequence[Condition] = (),
        *,
        source: Tensor | None = None,
        strength: float = 1.0,
        mask: Tensor | None = None,
    ) -> Pictures:
        """Run the loop and decode. `mask` (B, H, W) is 1 where to redraw.

        `source` are raw latents to start from; without them the noise alone is.
        """
        options, sigmas = self.options, self.options.get("sigmas")
        steps = self._steps(sigmas)
        raw = sample(
            self.flux.model,
            self.positive.plus(*conditions),
            self.negative,
            latents=source,
            noise=noise,
            steps=steps,
            sigmas=sigmas,
            start=first_step(steps, strength) / steps,
            guidance=options.get("guidance"),
            true_cfg_scale=options.get("true_cfg_scale", 1.0),
            noise_mask=None if mask is None else mask[:, None],
            soft_mask=options.get("soft_mask", False),
            solver=options.get("solver", solvers.euler),
            watch=options.get("watch"),
        )
        return pictures(self.flux, raw, options.get("output", "pil"))

    def _steps(self, sigmas: Sequence[float] | None) -> int:
        if sigmas is not None:
            return len(sigmas)
        steps = self.options.get("steps")
        return self.flux.model.variant.steps if steps is None else steps

    def _times(self, count: int) -> int:
        """How often so many pictures are repeated for the batch."""
        if self.batch % count:
            raise FluxError(
                f"{count} pictures cannot be shared out among {self.batch}; give 1 or a divisor of {self.batch}"
            )
        return self.batch // count


def begin(flux: Flux, prompt: Texts | Conditioning, options: Common, size: tuple[int, int] | None = None) -> Job:
    """Check the options and encode the prompts. `size` is (width, height) where the recipe sets it."""
    unknown = set(options) - set(Common.__annotations__)
    if unknown:
        raise TypeError(f"unknown option {', '.join(sorted(unknown))}; there are {', '.join(Common.__annotations__)}")
    width, height = size or _size(flux, options)
    positive, negative = _conditionings(flux, prompt, options)
    batch = _batch(positive, options.get("images_per_prompt", 1))
    extra = (*options.get("conditions", ()), *_image_prompts(options, width, height, negative is not None))
    return Job(flux, options, positive.plus(*extra), negative, batch, width, height, _generators(options, batch))


def _batch(positive: Conditioning, images_per_prompt: int) -> int:
    if images_per_prompt < 1:
        raise FluxError(f"{images_per_prompt} images per prompt draw nothing; use 1 or more")
    return max(len(prompt.tokens) for prompt in positive.prompts) * images_per_prompt


def first_step(steps: int, strength: float) -> int:
    """The step an image-to-image run begins with: `strength` is the share of the steps that are drawn."""
    if not 0 <= strength <= 1:
        raise FluxError(f"a strength of {strength} is not possible; use 0 (keep the picture) to 1 (draw anew)")
    first = int(max(steps - min(steps * strength, steps), 0))
    if first >= steps:
        raise FluxError(f"no step of {steps} is left at a strength of {strength}; use more steps or a higher strength")
    return first


def vae_of(flux: Flux) -> Vae:
    if flux.vae is None:
        raise FluxError('this checkpoint has no VAE; load one with load_parts(vae=...), or use output="latent"')
    return flux.vae


def pictures(flux: Flux, raw: Tensor, output: Output) -> Pictures:
    """Raw latents as what was asked for: "latent" gives the packed model-space tokens (B, N, 64)."""
    if output == "latent":
        return pack(flux.model.latent.to_model(raw)).to(flux.model.dtype)
    if output not in ("pil", "numpy", "tensor"):
        raise FluxError(f"output {output!r} is unknown; use pil, numpy, tensor or latent")
    images = vae_of(flux).decode(raw)
    if output == "pil":
        return to_pil(images)
    return images.numpy() if output == "numpy" else images.permute(0, 3, 1, 2)


def _size(flux: Flux, options: Common) -> tuple[int, int]:
    default = flux.vae.params.sample_size if flux.vae else 1024
    width, height = options.get("width"), options.get("height")
    sides = default if width is None else width, default if height is None else height
    return drawable(*sides, flux.model.latent.multiple)


def _conditionings(
    flux: Flux, prompt: Texts | Conditioning, options: Common
) -> tuple[Conditioning, Conditioning | None]:
    positive, negative = _encoded(flux, prompt, options.get("prompt_2"), options), options.get("negative_prompt")
    if negative is not None:
        return positive, _encoded(flux, negative, options.get("negative_prompt_2"), options)
    if options.get("negative_prompt_2"):
        raise FluxError("a negative_prompt_2 goes with a negative_prompt; give both, or the latter alone")
    return positive, None


def _encoded(flux: Flux, prompt: Texts | Conditioning, prompt_2: Texts | None, options: Common) -> Conditioning:
    if isinstance(prompt, Conditioning):
        if prompt_2:
            raise FluxError("a second prompt goes with a text, and this prompt is encoded already; leave it out")
        return prompt
    if flux.text is None:
        raise FluxError("this checkpoint has no text encoders; load it with load_parts(clip=..., t5=...)")
    return Conditioning((flux.text.encode(prompt, prompt_2, max_tokens=options.get("max_sequence_length")),))


def _image_prompts(options: Common, width: int, height: int, negative: bool) -> tuple[ImagePromptCondition, ...]:
    """One condition for each adapter; without a negative image the negative pass sees a black one."""
    adapters = _listed(options.get("adapter"))
    images = _listed(options.get("adapter_image"), len(adapters))
    black = Image.new("RGB", (width, height))
    negatives = _listed(options.get("negative_adapter_image"), len(adapters)) or [black] * len(adapters)
    scales = options.get("adapter_scale", 1.0)
    scales = list(scales) if isinstance(scales, Sequence) and len(adapters) > 1 else [scales] * len(adapters)
    for what, given in (("images", images), ("negative images", negatives), ("scales", scales)):
        if len(given) != len(adapters):
            raise FluxError(f"{len(given)} adapter {what} were given for {len(adapters)} adapters; give one for each")
    span = options.get("adapter_start", 0.0), options.get("adapter_end", 1.0)
    return tuple(
        ImagePromptCondition(
            adapter,
            _embedded(adapter, image),
            _embedded(adapter, other) if negative else None,
            tuple(scale) if isinstance(scale, Sequence) else scale,
            *span,
        )
        for adapter, image, other, scale in zip(adapters, images, negatives, scales, strict=True)
    )


def _embedded(adapter: IPAdapter, images: ImageLike) -> Tensor:
    """(1, n, D): all pictures together are one prompt, whatever their sizes."""
    return torch.cat([adapter.embed(alike) for alike in by_size(images)], dim=1)


def _listed(value: object, count: int | None = None) -> list:
    """None, one thing or several -> a list; for one adapter a list of images is one prompt."""
    if value is None:
        return []
    if count == 1 or not isinstance(value, (list, tuple)):
        return [value]
    return list(value)


def _generators(options: Common, batch: int) -> tuple[torch.Generator, ...]:
    generator, seed = options.get("generator"), options.get("seed")
    if generator is not None and seed is not None:
        raise FluxError("a seed and a generator both say where the noise comes from; give one of them")
    if generator is None:
        generator = torch.Generator().manual_seed(_random_seed() if seed is None else seed)
    every = (generator,) if isinstance(generator, torch.Generator) else tuple(generator)
    if len(every) not in (1, batch):
        raise FluxError(f"{len(every)} generators cannot draw {batch} pictures; give one, or one for each")
    return every


def _random_seed() -> int:
    seed = torch.Generator().seed() % 2**32
    log.info("drawing with the random seed %d", seed)
    return seed


def _draw(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=dtype, device=generator.device)


def _given_noise(latents: Tensor, shape: Shape) -> Tensor:
    batch, channels, height, width = shape
    if tuple(latents.shape) == (batch, height * width // 4, channels * 4):
        return unpack(latents, height, width)
    if tuple(latents.shape) != shape:
        raise FluxError(
            f"latents of shape {tuple(latents.shape)} do not fit this picture; it needs {shape}, or them packed"
        )
    return latents
