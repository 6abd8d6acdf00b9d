"""How far training is: pictures of held-out captions as a grid, and the judge's figures for them."""

from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image
from torch import nn

from ..flux_runtime.flux import Flux, FluxModel
from ..flux_runtime.model.vae import AutoEncoder
from ..flux_runtime.recipes import text_to_image
from ..flux_runtime.schedule import Schedule
from ..flux_runtime.text.encoders import TextEncoders
from ..flux_runtime.vae import Vae
from ..flux_runtime.variants import VARIANTS
from ..flux_runtime.weights.report import Report
from .evaluation import figures, held_out, judge_pictures
from .train_text import Text

STEPS, TOKENS = 12, 64
TRAINING_HELD_OUT = "captions held out to watch training"


def looker(
    path: Path,
    vae: AutoEncoder,
    text: Text,
    sizes: Sequence[int],
    count: int = 32,
    guidance: float = 3.5,
    cfg: float = 1.0,
) -> Callable[[nn.Module, int], str]:
    """A function (transformer, step) that writes PATH-STEP-SIZE.png for each size and returns the judge's figures."""
    captions = [told for _, told in held_out(count, TRAINING_HELD_OUT)]

    def look(transformer: nn.Module, step: int) -> str:
        flux = assemble(transformer, vae, text)
        lines = []
        for size in sizes:
            draw = Drawn(flux, size, guidance, cfg)
            lines.append(f"{size} px: {figures(judge_pictures(draw, captions, batch=16)).line()}")
            grid(draw.images).save(f"{path}-{step:06d}-{size}.png")
        return "\n  ".join(lines)

    return look


class Drawn:
    """Draws prompts and keeps the pictures."""

    def __init__(self, flux: Flux, size: int, guidance: float, cfg: float) -> None:
        self.flux, self.size, self.guidance, self.cfg = flux, size, guidance, cfg
        self.images: list[Image.Image] = []

    def __call__(self, texts: list[str], seed: int) -> list[Image.Image]:
        negative = [""] * len(texts) if self.cfg > 1 else None
        drawn = text_to_image(
            self.flux,
            texts,
            negative_prompt=negative,
            true_cfg_scale=self.cfg,
            guidance=self.guidance,
            seed=seed,
            width=self.size,
            height=self.size,
            steps=STEPS,
            max_sequence_length=TOKENS,
        )
        self.images += drawn
        return drawn


def assemble(transformer: nn.Module, vae: AutoEncoder, text: Text) -> Flux:
    """The parts in training as the model that recipes take."""
    handle, dev = Vae(vae), VARIANTS["dev"]
    encoders = TextEncoders(text.clip, text.t5, text.clip_tokenizer, text.t5_tokenizer)
    model = FluxModel(transformer, dev, Schedule(dynamic=False, shift=1.0), handle.latent_format, handle)
    return Flux(model, encoders, handle, Report("training", (), dev.name))


def grid(images: Sequence[Image.Image], columns: int = 8) -> Image.Image:
    """The pictures side by side, row by row."""
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for index, image in enumerate(images):
        sheet.paste(image, (index % columns * width, index // columns * height))
    return sheet
