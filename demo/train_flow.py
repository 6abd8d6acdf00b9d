"""Stages "flow" and "distil": a rectified flow on latents, then its guidance folded into the guidance embedding."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flux_runtime.layout import Layout, pack
from ..flux_runtime.model.transformer import FluxTransformer
from ..flux_runtime.variants import FluxParams
from .captions import caption
from .scenes import COLOR_NAMES, KINDS, Scene, cells
from .train_latents import Latents
from .train_text import Text
from .train_tools import Course, Muon, Plan, half_precision, moved

TINY = FluxParams(
    vec_in_dim=128,
    context_in_dim=128,
    hidden_size=192,
    num_heads=6,
    mlp_hidden=768,
    depth=2,
    depth_single=4,
    axes_dim=(4, 14, 14),
)
NOTHING, UNASKED = len(KINDS), -100
GUIDANCE = (1.0, 5.0)
UNHEARD = 0.08  # the share of captions that the distilled model is not told


@dataclass(frozen=True)
class Diet:
    """What the transformer is fed: picture sizes with weights and batches, T5 lengths with weights (long ones in the
    distillation too, so that prompts padded to 512 tokens work), and what counts how much."""

    sizes: tuple[int, ...] = (128, 256)
    size_weights: tuple[float, ...] = (1, 1)
    batches: tuple[int, ...] = (40, 12)
    lengths: tuple[int, ...] = (32, 48, 64)
    length_weights: tuple[float, ...] = (2, 5, 3)
    long_lengths: tuple[int, ...] = (128, 256, 512)
    long_share: float = 0.04
    empty: float = 0.1
    object_weight: float = 3.0
    aid: float = 0.1
    rate: float = 0.015
    adam_rate: float = 1.5e-3


@dataclass(frozen=True)
class Meal:
    """One batch: clean tokens (B, N, 64), captions, what each token shows, the latent side and the T5 length."""

    clean: Tensor
    texts: list[str]
    shown: "Shown"
    side: int
    length: int


@dataclass(frozen=True)
class Shown:
    """Per token: kind (B, N), NOTHING for the background, color (B, N), place inside the thing (B, N, 2) in -1..1."""

    kind: Tensor
    color: Tensor
    place: Tensor


@dataclass(frozen=True)
class Question:
    """What is mixed into a batch, and how much: noise like its clean tokens, sigma (B,) and guidance (B,)."""

    noise: Tensor
    sigma: Tensor
    guidance: Tensor

    @classmethod
    def about(cls, meal: Meal, generator: torch.Generator) -> "Question":
        count = len(meal.clean)
        sigma = noise_levels(count, meal.side, generator)
        noise = torch.randn(meal.clean.shape, generator=generator)
        low, high = GUIDANCE
        return cls(noise, sigma, low + (high - low) * torch.rand(count, generator=generator))

    def noisy(self, clean: Tensor) -> Tensor:
        share = self.sigma[:, None, None]
        return (1 - share) * clean + share * self.noise


@dataclass(frozen=True)
class Larder:
    """Makes batches, on the CPU, from the cached latents, with new words every time."""

    latents: Mapping[int, Latents]
    diet: Diet

    def flow(self, rng: random.Random, generator: torch.Generator) -> tuple[Meal, Question]:
        """A batch for the flow, in which some captions are empty."""
        meal = self.meal(rng, self.diet.empty)
        return meal, Question.about(meal, generator)

    def distil(self, rng: random.Random, generator: torch.Generator) -> tuple[Meal, Question, Tensor]:
        """A batch for the distillation, and which of its captions (B,) the student does not hear."""
        meal = self.meal(rng, 0.0)
        asked = Question.about(meal, generator)
        return meal, asked, torch.tensor([rng.random() < UNHEARD for _ in meal.texts])

    def meal(self, rng: random.Random, empty: float) -> Meal:
        """Some scenes of one size; each caption is empty with this chance."""
        diet = self.diet
        size = rng.choices(diet.sizes, diet.size_weights)[0]
        count, length = diet.batches[diet.sizes.index(size)], rng.choices(diet.lengths, diet.length_weights)[0]
        if rng.random() < diet.long_share:
            length = rng.choice(diet.long_lengths)
            canvas = (size // 16) ** 2
            count = max(2, count * (canvas + 64) // (canvas + length))
        latents, scenes = self.latents[size].batch(rng, count)
        texts = ["" if rng.random() < empty else caption(scene, rng).text for scene in scenes]
        return Meal(pack(latents), texts, shown(scenes, size // 16), size // 8, length)


@dataclass(frozen=True)
class Kitchen:
    """What the steps of a flow have in common: batches, and encoders for their words, on the device."""

    larder: Larder
    text: Text
    device: torch.device

    @property
    def diet(self) -> Diet:
        return self.larder.diet

    def words(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            return self.text(texts, length)


def shown(scenes: list[Scene], side: int) -> Shown:
    """What each of the side x side tokens is part of; used to weigh the loss and for the aid."""
    kind = torch.full((len(scenes), side, side), NOTHING)
    color, place = torch.full_like(kind, UNASKED), torch.zeros(*kind.shape, 2)
    ticks = (torch.arange(side) + 0.5) / side
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            x0, y0, x1, y1 = thing.box
            columns, rows = slice(*cells(x0, x1, side)), slice(*cells(y0, y1, side))
            kind[index, rows, columns] = KINDS.index(thing.kind)
            color[index, rows, columns] = COLOR_NAMES.index(thing.color)
            place[index, rows, columns, 0] = ((ticks - thing.x) / ((x1 - x0) / 2))[columns]
            place[index, rows, columns, 1] = ((ticks - thing.y) / ((y1 - y0) / 2))[rows, None]
    return Shown(*(part.flatten(1, 2) for part in (kind, color, place)))


class Aid(nn.Module):
    """A throw-away head on the image tokens half-way: they must know what they are part of, which speeds learning."""

    def __init__(self, transformer: FluxTransformer) -> None:
        super().__init__()
        self.transformer = transformer
        self.head = nn.Linear(transformer.params.hidden_size, NOTHING + 1 + len(COLOR_NAMES) + 2)
        self._kept: Tensor | None = None
        middle = transformer.single_blocks[len(transformer.single_blocks) // 2]
        middle.register_forward_hook(lambda _module, _inputs, output: setattr(self, "_kept", output))

    def loss(self, truth: Shown) -> Tensor:
        """How badly the last forward pass's tokens know kind, colour and place."""
        tokens = truth.kind.shape[1]
        kind, color, place = self.head(self._kept[:, -tokens:].float()).split((NOTHING + 1, len(COLOR_NAMES), 2), -1)
        things = truth.kind != NOTHING
        count = things.sum().clamp(min=1)
        loss = F.cross_entropy(kind.flatten(0, 1), truth.kind.flatten())
        off = F.cross_entropy(color.flatten(0, 1), truth.color.flatten(), ignore_index=UNASKED, reduction="sum")
        return loss + off / count + ((place - truth.place).abs().mean(-1) * things).sum() / count


def new_transformer(params: FluxParams, seed: int) -> FluxTransformer:
    """Random weights; modulations, output and guidance start at zero, so that every block starts as identity."""
    torch.manual_seed(seed)
    model = FluxTransformer(params)
    silent = ("mod.lin", "modulation.lin", "adaLN_modulation", "final_layer.linear", "guidance_in.out_layer")
    for name, parameter in model.named_parameters():
        if any(part in name for part in silent):
            nn.init.zeros_(parameter)
    return model


def velocity(
    model: FluxTransformer, noisy: Tensor, sigma: Tensor, guidance: Tensor, words: tuple[Tensor, Tensor], side: int
) -> Tensor:
    """The model's velocity for canvas tokens (B, N, 64) at sigma (B,), for latents of side x side; in float32."""
    tokens, pooled = words
    context = model.prepare(tokens, Layout((tokens.shape[1],), side, side).ids())
    return model(noisy, context, model.modulate(model.embed(sigma, guidance, pooled))).float()


def noise_levels(count: int, side: int, generator: torch.Generator) -> Tensor:
    """Mostly logit-normal, leaning to the noisy side, where the layout is decided; more so in larger pictures."""
    lean = 0.6 if side <= 16 else 1.0
    leaning = torch.sigmoid(lean + torch.randn(count, generator=generator))
    even = torch.rand(count, generator=generator)
    return torch.where(torch.rand(count, generator=generator) < 0.2, even, leaning)


def weighted_error(predicted: Tensor, wanted: Tensor, truth: Shown, object_weight: float) -> Tensor:
    """Squared error in which tokens of things count more than the background."""
    weight = 1 + object_weight * (truth.kind != NOTHING)
    return ((predicted - wanted).square().mean(2) * weight).sum() / weight.sum()


def flow_error(
    model: FluxTransformer, kitchen: Kitchen, meal: Meal, asked: Question, guidance: float | None = None
) -> Tensor:
    """How far the velocities are from those of a batch on the device; guidance None: the question's own."""
    told = asked.guidance if guidance is None else torch.full_like(asked.guidance, guidance)
    words = kitchen.words(meal.texts, meal.length)
    with half_precision(kitchen.device):
        found = velocity(model, asked.noisy(meal.clean), asked.sigma, told, words, meal.side)
    return weighted_error(found, asked.noise - meal.clean, meal.shown, kitchen.diet.object_weight)


def train_flow(
    model: FluxTransformer,
    kitchen: Kitchen,
    plan: Plan,
    folder: Path,
    look: Callable[[nn.Module, int], str] | None = None,
    until: int | None = None,
) -> FluxTransformer:
    """Train the flow; the aid fades out over the stage."""
    diet, device = kitchen.diet, kitchen.device
    torch.manual_seed(plan.seed)
    aided = Aid(model.to(device)).to(device)

    def loss_of(batch: tuple[Meal, Question]) -> Tensor:
        meal, asked = moved(batch, device)
        fading = 1 - course.step / plan.steps
        return flow_error(model, kitchen, meal, asked) + diet.aid * fading * aided.loss(meal.shown)

    optimiser = Muon(aided.named_parameters(), diet.rate, diet.adam_rate, is_matrix)
    course = Course(plan, aided, optimiser, folder)
    course.run(kitchen.larder.flow, loss_of, look and (lambda _, step: look(model, step)), until)
    return model


def is_matrix(name: str) -> bool:
    """Which of the transformer's parameters Muon trains: the matrices of the blocks."""
    return "_blocks." in name and ".norm" not in name


def train_distil(
    teacher: FluxTransformer,
    student: FluxTransformer,
    kitchen: Kitchen,
    plan: Plan,
    folder: Path,
    look: Callable[[nn.Module, int], str] | None = None,
    until: int | None = None,
) -> FluxTransformer:
    """Teach the student to give in one pass what the teacher gives with true CFG at the guidance in the embedding.

    For an empty prompt it keeps the teacher's plain answer, so that true CFG goes on working with it.
    """
    device, diet = kitchen.device, replace(kitchen.diet, long_share=0.12)
    larder = replace(kitchen.larder, diet=diet)
    teacher, student = teacher.to(device).eval().requires_grad_(False), student.to(device)

    def loss_of(batch: tuple[Meal, Question, Tensor]) -> Tensor:
        unheard = batch[2].tolist()
        meal, asked, empty = moved(batch, device)
        wanted = _guided(teacher, kitchen, meal, asked, empty)
        heard = ["" if blank else text for blank, text in zip(unheard, meal.texts, strict=True)]
        words = kitchen.words(heard, meal.length)
        with half_precision(device):
            found = velocity(student, asked.noisy(meal.clean), asked.sigma, asked.guidance, words, meal.side)
        return weighted_error(found, wanted, meal.shown, diet.object_weight)

    optimiser = Muon(student.named_parameters(), diet.rate * 0.2, diet.adam_rate * 0.5, is_matrix)
    course = Course(plan, student, optimiser, folder, decay=0.995)
    course.run(larder.distil, loss_of, look and (lambda _, step: look(student, step)), until)
    return student


@torch.no_grad()
def _guided(teacher: FluxTransformer, kitchen: Kitchen, meal: Meal, asked: Question, empty: Tensor) -> Tensor:
    """The teacher's answer at its usual text length: unconditional + guidance * (conditional - unconditional)."""
    length = min(meal.length, max(kitchen.diet.lengths))
    words = kitchen.words(meal.texts + [""] * len(meal.texts), length)
    twice = [torch.cat([part, part]) for part in (asked.noisy(meal.clean), asked.sigma, asked.guidance)]
    with half_precision(kitchen.device):
        told, untold = velocity(teacher, *twice, words, meal.side).chunk(2)
    scale = asked.guidance[:, None, None]
    return torch.where(empty[:, None, None], untold, untold + scale * (told - untold))
