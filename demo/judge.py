"""Judges pictures against captions, independently of what drew them: its eye has only ever seen rendered scenes.

    python -m fluxcanvas.demo.judge --captions 200 --size 128 --json figures.json

draws held-out captions with the demo model and prints how many were followed, beside the judge's own accuracy on real
renders and the chance level, which is what real renders of other captions get.
"""
import argparse
import json
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from PIL import Image

from . import WEIGHTS
from .captions import Caption, caption
from .drawing import render
from .facts import Facts, Relation, ThingFacts
from .judge_model import Answers, Eye, load_eye, to_eye
from .reading import facts_of
from .scenes import BACKGROUNDS, COLOR_NAMES, KINDS, sample_scene

HELD_OUT = "held-out captions"
MAIN = ("background", "there", "color", "place", "relation")
QUESTIONS = ("background", "there", "color", "size", "place", "relation", "nothing else")
LARGEST_SMALL, SMALLEST_LARGE = .88, 1.1
ACROSS = {"left": (0.0, .4), "middle": (.36, .64), "right": (.6, 1.0)}
DOWN = {"top": (0.0, .45), "mid": (.33, .67), "bottom": (.55, 1.0)}


@dataclass(frozen=True)
class SeenThing:
    """A thing as the judge sees it: x and y in fractions of the picture, scale 1 for the usual size."""
    color: str
    x: float
    y: float
    scale: float
    doubled: bool


@dataclass(frozen=True)
class Seen:
    """What the judge sees in a picture; paper is meaningful on a plain background only."""
    background: str
    paper: str
    things: Mapping[str, SeenThing]


@dataclass(frozen=True)
class Grade:
    """Answers per question, only over what the caption states, and a reason for every wrong one."""
    answers: Mapping[str, tuple[bool, ...]]
    reasons: tuple[str, ...]

    @property
    def right(self) -> bool:
        """Background, things, colours, places and relations are all as stated (sizes and extras are counted apart)."""
        return all(all(self.answers[question]) for question in MAIN)


@dataclass(frozen=True)
class Verdict:
    """Whether a picture follows a prompt, and what is wrong where it does not."""
    ok: bool
    reasons: tuple[str, ...]


@lru_cache(maxsize=1)
def load() -> Eye:
    """The trained eye."""
    return load_eye()


@torch.no_grad()
def look(images: Sequence[Image.Image]) -> list[Seen]:
    """What the judge sees in each picture, of any size."""
    seen = []
    for start in range(0, len(images), 32):
        answers = load()(to_eye(images[start:start + 32]))
        seen += [_seen(answers, index) for index in range(len(answers.there))]
    return seen


def _seen(answers: Answers, index: int) -> Seen:
    things = {}
    for position, kind in enumerate(KINDS):
        if answers.there[index, position] <= 0:
            continue
        x, y = answers.place[index, position].tolist()
        things[kind] = SeenThing(COLOR_NAMES[int(answers.color[index, position].argmax())], x, y,
                                 answers.scale[index, position].item(), bool(answers.doubled[index, position] > 0))
    return Seen(BACKGROUNDS[int(answers.background[index].argmax())], COLOR_NAMES[int(answers.paper[index].argmax())],
                things)


def follows(image: Image.Image, prompt: str) -> Verdict:
    """Does the picture show what the prompt states, and nothing else? Sizes are not held against it."""
    grade_given = grade(look([image])[0], facts_of(prompt))
    reasons = tuple(reason for reason in grade_given.reasons if not reason.startswith("size"))
    return Verdict(not reasons, reasons)


# ---------------------------------------------------------------- grading
def grade(seen: Seen, facts: Facts) -> Grade:
    """Compare what is seen with what is stated."""
    checks = _Checks()
    if facts.background:
        _check_background(checks, seen, facts)
    for stated in facts.things:
        _check_thing(checks, seen.things.get(stated.kind), stated)
    for relation in facts.relations:
        _check_relation(checks, seen, facts, relation)
    kinds = {stated.kind for stated in facts.things}
    extra = [kind for kind, thing in seen.things.items() if kind not in kinds or thing.doubled]
    checks.note("nothing else", not extra, f"nothing else: also shows {', '.join(extra)}")
    return Grade({question: tuple(checks.answers[question]) for question in QUESTIONS}, tuple(checks.reasons))


class _Checks:
    def __init__(self) -> None:
        self.answers: dict[str, list[bool]] = {question: [] for question in QUESTIONS}
        self.reasons: list[str] = []

    def note(self, question: str, right: bool, reason: str) -> None:
        self.answers[question].append(right)
        if not right:
            self.reasons.append(reason)


def _check_background(checks: _Checks, seen: Seen, facts: Facts) -> None:
    shows = f"plain {seen.paper}" if seen.background == "plain" else seen.background
    wanted = f"plain {facts.paper}" if facts.background == "plain" else facts.background
    checks.note("background", shows == wanted, f"background: {shows} instead of {wanted}")


def _check_thing(checks: _Checks, thing: SeenThing | None, stated: ThingFacts) -> None:
    kind = stated.kind
    checks.note("there", thing is not None, f"there: no well-formed {kind}")
    if stated.color:
        found = thing.color if thing else "no"
        checks.note("color", found == stated.color, f"color: {found} {kind} instead of {stated.color}")
    if stated.size:
        right = thing and (thing.scale < LARGEST_SMALL if stated.size == "small" else thing.scale > SMALLEST_LARGE)
        checks.note("size", bool(right), f"size: the {kind} is not {stated.size}")
    if stated.place:
        checks.note("place", _within(thing and thing.x, ACROSS[stated.place]), f"place: {kind} not {stated.place}")
    if stated.row:
        checks.note("place", _within(thing and thing.y, DOWN[stated.row]), f"place: {kind} not at the {stated.row}")


def _within(value: float | None, limits: tuple[float, float]) -> bool:
    return value is not None and limits[0] < value < limits[1]


def _check_relation(checks: _Checks, seen: Seen, facts: Facts, relation: Relation) -> None:
    kinds = [facts.things[index].kind for index in (relation.first, relation.second)]
    first, second = (seen.things.get(kind) for kind in kinds)
    right = False
    if first and second:
        dx, dy = second.x - first.x, second.y - first.y
        right = {"beside": abs(dx) > .15 and abs(dy) < .25, "left": dx > .12, "right": dx < -.12, "above": dy > .12,
                 "below": dy < -.12}[relation.kind]
    checks.note("relation", right, f"relation: {kinds[0]} not {relation.kind} {kinds[1]}")


# ---------------------------------------------------------------- figures
@dataclass(frozen=True)
class Figures:
    """Share of right answers per question, in per cent, with their numbers; `all` is the share of pictures all right."""
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
    return Figures(len(grades), shares, {question: len(found) for question, found in pooled.items() if found},
                   100 * sum(one.right for one in grades) / len(grades))


def held_out(count: int, seed: str = HELD_OUT) -> list[tuple[Image.Image, Caption]]:
    """Captions kept out of training, with a real 128 px render of the scene that each was made for."""
    rng = random.Random(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    return [(render(scene), caption(scene, rng)) for scene in scenes]


def by_group(grades: Sequence[Grade], captions: Sequence[Caption]) -> dict[str, float]:
    """Per cent all right by the number of things, and per cent there by kind."""
    groups: dict[str, list[bool]] = {}
    for one, told in zip(grades, captions, strict=True):
        groups.setdefault(f"{len(told.facts.things)} things", []).append(one.right)
        for relation in {relation.kind for relation in told.facts.relations}:
            groups.setdefault(f"relation {relation}", []).append(one.right)
        for stated, there in zip(told.facts.things, one.answers["there"], strict=True):
            groups.setdefault(stated.kind, []).append(there)
    return {name: round(100 * sum(found) / len(found), 1) for name, found in sorted(groups.items())}


Draw = Callable[[list[str], int], list[Image.Image]]


def judge_pictures(draw: Draw, captions: Sequence[Caption], batch: int = 20) -> list[Grade]:
    """Draw the captions with `draw(texts, seed)` and grade what comes."""
    images: list[Image.Image] = []
    for start in range(0, len(captions), batch):
        images += draw([told.text for told in captions[start:start + batch]], start)
    return [grade(seen, told.facts) for seen, told in zip(look(images), captions, strict=True)]


def _model(weights: Path, size: int, steps: int, guidance: float, tokens: int | None) -> Draw:
    from ..flux_runtime.recipes import text_to_image
    from ..flux_runtime.weights.load import load_flux

    flux = load_flux(weights)

    def draw(texts: list[str], seed: int) -> list[Image.Image]:
        return text_to_image(flux, texts, width=size, height=size, steps=steps, guidance=guidance, seed=seed,
                             max_sequence_length=tokens)

    return draw


def measure(args: argparse.Namespace) -> dict[str, object]:
    """All figures of the command line: judge, chance and model."""
    real = held_out(args.captions)
    images, captions = [image for image, _ in real], [told for _, told in real]
    seen = look(images)
    grades = [grade(one, told.facts) for one, told in zip(seen, captions, strict=True)]
    others = [grade(one, told.facts) for one, told in zip(seen[1:] + seen[:1], captions, strict=True)]
    began = time.monotonic()
    drawn = judge_pictures(_model(args.weights, args.size, args.steps, args.guidance, args.tokens), captions)
    seconds = (time.monotonic() - began) / args.captions
    return {"real renders": vars(figures(grades)), "renders of other captions": vars(figures(others)),
            "model": vars(figures(drawn)), "model by group": by_group(drawn, captions), "size": args.size,
            "steps": args.steps, "guidance": args.guidance, "seconds a picture": round(seconds, 3),
            "lines": {"real renders": figures(grades).line(), "renders of other captions": figures(others).line(),
                      f"model at {args.size} px": figures(drawn).line()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--captions", type=int, default=200)
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


if __name__ == "__main__":
    main()
