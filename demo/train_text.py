"""Stage "text": tiny CLIP and T5 encoders that learn to understand captions.

Both are asked for the scene behind the words: which of the twelve things are there and, for each, its colour, size,
column and row, and the background. T5 answers through one attention query per thing, so that the tokens must gather
what belongs together; CLIP through its pooled vector. Encoders that exist already are taught further words: first only
the questions are learnt, then the encoders, held to their old answers for captions in the main words, so that a
transformer trained with them still understands.
"""

import copy
import random
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..flux_runtime.flux import Flux
from .captions import caption
from .facts import Facts
from .scenes import BACKGROUNDS, COLOR_NAMES, KINDS, ROWS, SIZES, SLOTS, TRAINING, Scene, sample_scene
from .train_tokenizers import make_tokenizers
from .train_tools import Course, Muon, Plan

ASKED = (("there", 2), ("color", len(COLOR_NAMES)), ("size", len(SIZES)), ("slot", len(SLOTS)), ("row", len(ROWS)))
PER_THING = sum(width for _, width in ASKED)
UNASKED, CLIP_TOKENS = -100, 64
LENGTHS = (32, 48, 64, 128, 256, 512)
LENGTH_WEIGHTS = (30, 40, 26, 2, 1, 1)


class Text(nn.Module):
    """The two tokenizers and encoders; padding is attended to, as in FLUX."""

    def __init__(self, clip: nn.Module, t5: nn.Module, clip_tokenizer: object, t5_tokenizer: object) -> None:
        super().__init__()
        self.clip, self.t5 = clip, t5
        self.clip_tokenizer, self.t5_tokenizer = clip_tokenizer, t5_tokenizer

    @property
    def width(self) -> int:
        return self.t5.config.d_model

    @property
    def device(self) -> torch.device:
        return self.t5.shared.weight.device

    def forward(self, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """T5 tokens (B, length, C) and CLIP's pooled vector (B, P)."""
        t5_ids = _ids(self.t5_tokenizer, texts, length).to(self.device)
        clip_ids = _ids(self.clip_tokenizer, texts, CLIP_TOKENS).to(self.device)
        return self.t5(t5_ids).last_hidden_state, self.clip(clip_ids).pooler_output


def text_of(flux: Flux) -> Text:
    """The text side of a loaded model, in float32."""
    old = flux.text
    return Text(old.clip.float(), old.t5.float(), old.clip_tokenizer, old.t5_tokenizer)


def _ids(tokenizer: object, texts: list[str], length: int) -> Tensor:
    return torch.tensor(tokenizer(texts, padding="max_length", max_length=length, truncation=True).input_ids)


def new_text(seed: int, width: int = 128, captions: int = 20000) -> Text:
    """New tokenizers, made from so many captions, and encoders with random weights that fit them."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip_tokenizer, t5_tokenizer = make_tokenizers(seed, captions)
    torch.manual_seed(seed)
    end = clip_tokenizer.eos_token_id
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            projection_dim=width,
            hidden_act="quick_gelu",
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=-(-len(t5_tokenizer) // 8) * 8,
            d_model=width,
            d_kv=width // 4,
            d_ff=2 * width,
            num_layers=3,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            pad_token_id=0,
            eos_token_id=1,
        )
    )
    _look_around(t5)
    return Text(clip, t5, clip_tokenizer, t5_tokenizer)


@torch.no_grad()
def _look_around(t5: nn.Module) -> None:
    """Start T5's only sense of order with heads that look near, one of them back and one ahead, as in ALiBi."""
    bias = t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    half = bias.shape[0] // 2
    distance = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 10, 13, 17, 22, 28, 36, 48], dtype=bias.dtype)
    bias.copy_(-0.3 * distance.repeat(2)[:, None].expand_as(bias))
    bias[:half, 1] -= 4
    bias[half:, 0] -= 4
    bias[:, 3] *= 0.1


class Questions(nn.Module):
    """Reads the scene off the encoders' output; thrown away after training."""

    def __init__(self, width: int, pooled: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.randn(len(KINDS) + 1, width) * 0.5)
        self.key, self.value = nn.Linear(width, width), nn.Linear(width, width)
        self.scene = nn.Linear(width, len(BACKGROUNDS) + len(COLOR_NAMES))
        self.thing = nn.Parameter(torch.zeros(len(KINDS), width, PER_THING))
        self.pooled = nn.Linear(pooled, len(BACKGROUNDS) + len(COLOR_NAMES) + len(KINDS) * PER_THING)

    def forward(self, tokens: Tensor, pooled: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Logits per question, in the order of `answers`: from the tokens, and from the pooled vector."""
        scores = self.query @ self.key(tokens).transpose(1, 2) / tokens.shape[-1] ** 0.5
        heard = scores.softmax(-1) @ self.value(tokens)
        things = torch.einsum("btw,twa->bta", heard[:, :-1], self.thing)
        scene, flat = self.pooled(pooled).split((self.scene.out_features, len(KINDS) * PER_THING), -1)
        return _split(self.scene(heard[:, -1]), things), _split(scene, flat.unflatten(-1, (len(KINDS), PER_THING)))


def _split(scene: Tensor, things: Tensor) -> list[Tensor]:
    logits = list(scene.split((len(BACKGROUNDS), len(COLOR_NAMES)), -1))
    for kind in range(len(KINDS)):
        logits += things[:, kind].split([width for _, width in ASKED], -1)
    return logits


def answers(scene: Scene) -> list[int]:
    """Background, paper, then for each kind: there, colour, size, column, row; UNASKED where there is nothing."""
    found = [BACKGROUNDS.index(scene.background), COLOR_NAMES.index(scene.paper) if scene.paper else UNASKED]
    by_kind = {thing.kind: thing for thing in scene.things}
    for kind in KINDS:
        thing = by_kind.get(kind)
        found += (
            [
                1,
                COLOR_NAMES.index(thing.color),
                list(SIZES).index(thing.size),
                SLOTS.index(thing.slot),
                list(ROWS).index(thing.row),
            ]
            if thing
            else [0] + [UNASKED] * 4
        )
    return found


def stated(facts: Facts) -> list[bool]:
    """Which of the answers the words themselves give."""
    known = [facts.background is not None, facts.paper is not None]
    by_kind = {thing.kind: thing for thing in facts.things}
    for kind in KINDS:
        thing = by_kind.get(kind)
        known += [
            True,
            *(
                thing is not None and value is not None
                for value in ((thing.color, thing.size, thing.place, thing.row) if thing else (None,) * 4)
            ),
        ]
    return known


@dataclass(frozen=True)
class Lesson:
    """A batch of captions with the answers behind them."""

    texts: list[str]
    answers: Tensor
    stated: Tensor


def lesson(rng: random.Random, count: int, main_words: bool = False) -> Lesson:
    scenes = [sample_scene(rng, TRAINING) for _ in range(count)]
    told = [caption(scene, rng, main_words) for scene in scenes]
    return Lesson(
        [one.text for one in told],
        torch.tensor([answers(scene) for scene in scenes]),
        torch.tensor([stated(one.facts) for one in told]),
    )


def question_loss(logits: list[Tensor], wanted: Tensor) -> Tensor:
    """Cross entropy over all questions, rarer ones a little louder."""
    total = logits[0].new_zeros(())
    for column, logit in enumerate(logits):
        asked = (wanted[:, column] >= 0).sum()
        error = F.cross_entropy(logit, wanted[:, column], ignore_index=UNASKED, reduction="sum")
        total = total + error / (asked.clamp(min=1) * len(wanted)).sqrt()
    return total / 20


def train_text(text: Text, folder: Path, plan: Plan, known: bool, batch: int = 48) -> None:
    """Teach both encoders; `known` says that they have been taught the main words before."""
    plan = replace(plan, save_every=200, look_every=200)
    torch.manual_seed(plan.seed)
    questions = Questions(text.width, text.clip.config.hidden_size).to(text.device)
    if known:
        before = replace(plan, stage="text-questions", steps=max(1, plan.steps // 2))
        optimiser = Muon(questions.named_parameters(), 0.01, 4e-3, _is_matrix)
        prepare = partial(_main_lesson, count=batch)
        Course(before, questions, optimiser, folder).run(prepare, lambda given: _asking(text, questions, *given))
    both = nn.ModuleDict({"text": text, "questions": questions})
    taught = text if known else both
    old = copy.deepcopy(text).eval().requires_grad_(False) if known else None
    questions.requires_grad_(not known)
    # Encoders that a transformer already listens to move slowly.
    optimiser = Muon(taught.named_parameters(), 0.003 if known else 0.01, 5e-4 if known else 2e-3, _is_matrix)
    course = Course(plan, taught, optimiser, folder)
    course.run(
        partial(_lesson_and_old, batch=batch, known=known),
        lambda given: _teaching(text, questions, old, *given),
        lambda _, step: score(text, questions),
    )


def _is_matrix(name: str) -> bool:
    return not any(part in name for part in ("shared", "embed", "relative", "questions", "query", "thing"))


def _main_lesson(rng: random.Random, _: torch.Generator, count: int) -> tuple[Lesson, int]:
    """A lesson in the main words and how many T5 tokens it takes."""
    return lesson(rng, count, main_words=True), rng.choice(LENGTHS[:2])


def _asking(text: Text, questions: Questions, task: Lesson, length: int) -> Tensor:
    """The encoders stand still while the questions are learnt."""
    with torch.no_grad():
        heard = text(task.texts, length)
    return _wrong(questions, heard, task)


def _lesson_and_old(rng: random.Random, _: torch.Generator, batch: int, known: bool) -> tuple[Lesson, int, list[str]]:
    """A lesson, how many T5 tokens it takes, and captions whose answers must stay if there are known ones."""
    length = rng.choices(LENGTHS, LENGTH_WEIGHTS)[0]
    count = max(8, batch * 48 // max(48, length))
    task = lesson(rng, count)
    return task, length, lesson(rng, count // 2, main_words=True).texts if known else []


def _teaching(text: Text, questions: Questions, old: Text | None, task: Lesson, length: int, kept: list[str]) -> Tensor:
    loss = _wrong(questions, text(task.texts, length), task)
    if old is not None:
        loss = loss + _drift(text, old, kept)
    return loss


def _wrong(questions: Questions, heard: tuple[Tensor, Tensor], task: Lesson) -> Tensor:
    """How badly both encoders' answers to a lesson are."""
    wanted = task.answers.to(heard[0].device)
    return sum(question_loss(logits, wanted) for logits in questions(*heard))


def _drift(text: Text, old: Text, texts: list[str]) -> Tensor:
    """How far the answers to captions in the main words have moved, relative to their size."""
    with torch.no_grad():
        was = old(texts, LENGTHS[0])
    now = text(texts, LENGTHS[0])
    return sum(4 * F.mse_loss(new, before) / before.square().mean() for new, before in zip(now, was, strict=True))


@torch.no_grad()
def score(text: Text, questions: Questions, count: int = 256, length: int = 64) -> str:
    """How many unseen captions are understood in everything that they state, in per cent."""
    task = lesson(random.Random("unseen captions"), count)
    found = []
    for name, logits in zip(("T5", "CLIP"), questions(*text(task.texts, length)), strict=True):
        right = torch.stack([logit.argmax(-1) for logit in logits], 1).cpu() == task.answers
        found.append(f"{name} {100 * (right | ~task.stated).all(1).float().mean():.1f} %")
    return "understood: " + ", ".join(found)
