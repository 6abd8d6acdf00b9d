"""How well a model follows captions: figures of the judge, beside its own accuracy and the level of chance.

    python -m fluxcanvas.demo.judge --captions 200 --size 128 --json figures.json

draws captions kept out of training and prints how many were followed. The judge's own accuracy is what it says of real
renders of these captions; chance is what it says of real renders of other ones.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

from . import WEIGHTS
from .captions import Caption, caption
from .drawing import render
from .judge import QUESTIONS, Grade, grade, look
from .scenes import sample_scene
from .words import RELATIONS

HELD_OUT = "held-out captions"
GROUPS = (*(f"{count} things" for count in (1, 2, 3)), *(f"relation {kind}" for kind in RELATIONS))


@dataclass(frozen=True)
class Figures:
    """Share of right answers per question, in per cent, and how many; `all` is the share of pictures all right."""

    pictures: int
    shares: Mapping[str, float]
    counts: Mapping[str, int]
    all: float

    def line(self) -> str:
        parts = [f"{question} {share:.1f} ({self.counts[question]})" for question, share in self.shares.items()]
        return ", ".join(parts) + f" | all right {self.all:.1f} % of {self.pictures}"


def figures(grades: Sequence[Grade]) -> Figures:
    """Sum up the grades of many pictures."""
    pooled = {question: [answer for one in grades for answer in one.answers[question]] for question in QUESTIONS}
    shares = {question: 100 * sum(found) / len(found) for question, found in pooled.items() if found}
    return Figures(
        len(grades),
        shares,
        {question: len(found) for question, found in pooled.items() if found},
        100 * sum(one.right for one in grades) / len(grades),
    )


def held_out(
    count: int, seed: str = HELD_OUT, main_words: bool = False, group: str | None = None
) -> list[tuple[Image.Image, Caption]]:
    """Captions kept out of training, with a real 128 px render of the scene that each was made for; all or of a group
    (`groups`)."""
    rng, found = random.Random(seed), []
    while len(found) < count:
        scene = sample_scene(rng)
        told = caption(scene, rng, main_words)
        if group is None or group in groups(told):
            found.append((render(scene), told))
    return found


def groups(told: Caption) -> list[str]:
    """What sorts of caption it belongs to: "3 things", "relation beside"."""
    return [f"{len(told.facts.things)} things", *sorted({f"relation {one.kind}" for one in told.facts.relations})]


def by_group(grades: Sequence[Grade], captions: Sequence[Caption]) -> dict[str, float]:
    """Per cent all right by group, and per cent there by kind."""
    answers: dict[str, list[bool]] = {}
    for one, told in zip(grades, captions, strict=True):
        for group in groups(told):
            answers.setdefault(group, []).append(one.right)
        for stated, there in zip(told.facts.things, one.answers["there"], strict=True):
            answers.setdefault(stated.kind, []).append(there)
    return {name: round(100 * sum(found) / len(found), 1) for name, found in sorted(answers.items())}


Draw = Callable[[list[str], int], list[Image.Image]]


def judge_pictures(draw: Draw, captions: Sequence[Caption], batch: int = 20) -> list[Grade]:
    """Draw the captions with `draw(texts, seed)` and grade what comes."""
    images: list[Image.Image] = []
    for start in range(0, len(captions), batch):
        images += draw([told.text for told in captions[start : start + batch]], start)
    return [grade(seen, told.facts) for seen, told in zip(look(images), captions, strict=True)]


def _model(weights: Path, size: int, steps: int, guidance: float, tokens: int | None) -> Draw:
    from ..flux_runtime.recipes import text_to_image
    from ..flux_runtime.weights.load import load_flux

    flux = load_flux(weights)

    def draw(texts: list[str], seed: int) -> list[Image.Image]:
        return text_to_image(
            flux, texts, width=size, height=size, steps=steps, guidance=guidance, seed=seed, max_sequence_length=tokens
        )

    return draw


def measure(args: argparse.Namespace) -> dict[str, object]:
    """All figures of the command line: judge, chance and model."""
    real = held_out(args.captions, main_words=args.main_words, group=args.group)
    images, captions = [image for image, _ in real], [told for _, told in real]
    seen = look(images)
    grades = [grade(one, told.facts) for one, told in zip(seen, captions, strict=True)]
    others = [grade(one, told.facts) for one, told in zip(seen[1:] + seen[:1], captions, strict=True)]
    began = time.monotonic()
    drawn = judge_pictures(_model(args.weights, args.size, args.steps, args.guidance, args.tokens), captions)
    seconds = (time.monotonic() - began) / args.captions
    return {
        "real renders": vars(figures(grades)),
        "renders of other captions": vars(figures(others)),
        "model": vars(figures(drawn)),
        "model by group": by_group(drawn, captions),
        "size": args.size,
        "steps": args.steps,
        "guidance": args.guidance,
        "seconds a picture": round(seconds, 3),
        "lines": {
            "real renders": figures(grades).line(),
            "renders of other captions": figures(others).line(),
            f"model at {args.size} px": figures(drawn).line(),
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=200)
    parser.add_argument("--main-words", action="store_true", help="captions without the rarer synonyms")
    parser.add_argument("--group", choices=GROUPS, help="captions of this sort alone")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--tokens", type=int, help="T5 tokens; the checkpoint's own by default")
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the figures there too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found = measure(args)
    for name, line in found["lines"].items():
        print(f"{name}: {line}")
    print("model by group:", found["model by group"], f"| {found['seconds a picture']} s a picture")
    if args.json:
        args.json.write_text(json.dumps(found, indent=2) + "\n")
