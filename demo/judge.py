"""Judges pictures against captions, independently of what drew them: its eye has only ever seen rendered scenes.

    python -m fluxcanvas.demo.judge --captions 200 --size 128

measures the demo model (see `evaluation`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from PIL import Image

from .facts import Facts, Relation, ThingFacts
from .judge_model import Answers, Eye, load_eye, to_eye
from .reading import facts_of
from .scenes import BACKGROUNDS, COLOR_NAMES, KINDS

MAIN = ("background", "there", "color", "place", "relation")
QUESTIONS = ("background", "there", "color", "size", "place", "relation", "nothing else")
LARGEST_SMALL, SMALLEST_LARGE = 0.88, 1.1
ACROSS = {"left": (0.0, 0.4), "middle": (0.36, 0.64), "right": (0.6, 1.0)}
DOWN = {"top": (0.0, 0.45), "mid": (0.33, 0.67), "bottom": (0.55, 1.0)}


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
        answers = load()(to_eye(images[start : start + 32]))
        seen += [_seen(answers, index) for index in range(len(answers.there))]
    return seen


def _seen(answers: Answers, index: int) -> Seen:
    things = {}
    for position, kind in enumerate(KINDS):
        if answers.there[index, position] <= 0:
            continue
        x, y = answers.place[index, position].tolist()
        things[kind] = SeenThing(
            COLOR_NAMES[int(answers.color[index, position].argmax())],
            x,
            y,
            answers.scale[index, position].item(),
            bool(answers.doubled[index, position] > 0),
        )
    return Seen(
        BACKGROUNDS[int(answers.background[index].argmax())], COLOR_NAMES[int(answers.paper[index].argmax())], things
    )


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
        right = {
            "beside": abs(dx) > 0.15 and abs(dy) < 0.25,
            "left": dx > 0.12,
            "right": dx < -0.12,
            "above": dy > 0.12,
            "below": dy < -0.12,
        }[relation.kind]
    checks.note("relation", right, f"relation: {kinds[0]} not {relation.kind} {kinds[1]}")


if __name__ == "__main__":
    from .evaluation import main

    main()
