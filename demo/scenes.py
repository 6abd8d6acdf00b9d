"""A storybook world: what a scene is, and how a random one is composed (drawn by `drawing`, told by `captions`)."""

import math
import random
from dataclasses import dataclass, replace

COLORS = {
    "red": (214, 52, 48),
    "orange": (243, 140, 40),
    "yellow": (250, 212, 60),
    "green": (70, 160, 70),
    "blue": (52, 104, 208),
    "purple": (134, 70, 172),
    "pink": (245, 148, 188),
    "white": (248, 247, 242),
    "brown": (134, 86, 50),
}
COLOR_NAMES = tuple(COLORS)
SKY_KINDS = ("sun", "moon", "star", "cloud", "balloon", "heart")
GROUND_KINDS = ("house", "tree", "car", "flower", "boat", "fish")
KINDS = GROUND_KINDS + SKY_KINDS
BACKGROUNDS = ("meadow", "night", "sunset", "sea", "snow", "plain")
SIZES = {"small": 0.72, "": 1.0, "large": 1.32}
SLOTS = ("left", "middle", "right")
ROWS = {"top": 0.22, "mid": 0.5, "bottom": 0.72}

USUAL_COLOR = {"tree": "green", "sun": "yellow", "moon": "yellow", "star": "yellow", "cloud": "white", "heart": "red"}
ALLOWED_COLORS = {"sun": ("yellow", "orange", "red"), "moon": ("yellow", "white")}
EXTENT = {
    "house": (0.30, 0.32),
    "tree": (0.27, 0.36),
    "car": (0.33, 0.20),
    "flower": (0.20, 0.32),
    "boat": (0.32, 0.32),
    "fish": (0.32, 0.20),
    "sun": (0.32, 0.32),
    "moon": (0.22, 0.28),
    "star": (0.27, 0.27),
    "cloud": (0.36, 0.19),
    "balloon": (0.24, 0.34),
    "heart": (0.26, 0.25),
}
LIKELY = {
    "meadow": {"sun": 3, "cloud": 3, "house": 2, "tree": 2, "flower": 2, "balloon": 2},
    "night": {"moon": 5, "star": 3, "house": 2, "tree": 2},
    "sunset": {"sun": 3, "tree": 2, "house": 2, "balloon": 2},
    "sea": {"boat": 5, "fish": 5, "sun": 2, "cloud": 2, "moon": 2},
    "snow": {"house": 3, "tree": 3, "cloud": 2},
    "plain": {"heart": 3, "star": 2, "fish": 2},
}
COLUMNS = {
    1: {"left": 0.23, "middle": 0.5, "right": 0.77},
    2: {"left": 0.28, "right": 0.72},
    3: {"left": 0.19, "middle": 0.5, "right": 0.81},
}
GROUND_LINE, HORIZON = 0.87, 0.62


@dataclass(frozen=True)
class Thing:
    """One thing of a scene; `x`, `y` is its middle and `scale` its size, in fractions of the picture."""

    kind: str
    color: str
    size: str
    row: str
    slot: str = "middle"
    x: float = 0.5
    y: float = 0.5
    scale: float = 1.0
    variation: float = 0.0
    flipped: bool = False

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x0, y0, x1, y1 in fractions of the picture."""
        width, height = (extent * self.scale / 2 for extent in EXTENT[self.kind])
        return self.x - width, self.y - height, self.x + width, self.y + height


@dataclass(frozen=True)
class Scene:
    """A background (with the colour of the paper when it is plain) and one to three things, all of different kinds."""

    background: str
    paper: str | None
    things: tuple[Thing, ...]
    horizon: float = HORIZON
    seed: int = 0


@dataclass(frozen=True)
class Mixture:
    """How often what is drawn: weights of the backgrounds, of one, two and three things, of small, usual and large
    ones, factors per kind; how strictly kinds keep to the backgrounds where they are likely (0: not at all), the share
    of things on one line, the chance to be in the sky instead of on the ground or the other way round, and a factor on
    the chance of a kind's usual colour."""

    backgrounds: tuple[float, ...] = (5, 5, 4, 5, 4, 4)
    counts: tuple[float, float, float] = (4, 5, 3)
    sizes: tuple[float, float, float] = (1, 3, 1)
    factors: tuple[tuple[str, float], ...] = ()
    belonging: float = 1.0
    same_row: float = 0.0
    misplaced: float = 0.05
    usual_color: float = 1.0


USUAL = Mixture()
# What models are weakest at comes more often in training: what is seldom seen together, on plain paper, small, in a
# line, or in an unusual place or colour. Held-out captions are always drawn from USUAL.
TRAINING = Mixture(
    backgrounds=(4, 4, 3, 4, 4, 8),
    counts=(2, 5, 5),
    sizes=(3, 4, 2),
    factors=(("flower", 1.8), ("fish", 2.0), ("car", 2.0), ("boat", 1.2), ("heart", 1.3), ("star", 1.3)),
    belonging=0.5,
    same_row=0.2,
    misplaced=0.15,
    usual_color=0.7,
)


def sample_scene(rng: random.Random, mixture: Mixture = USUAL) -> Scene:
    """A random scene; every choice comes from `rng`."""
    background = rng.choices(BACKGROUNDS, mixture.backgrounds)[0]
    paper = rng.choice(COLOR_NAMES) if background == "plain" else None
    kinds = _kinds(rng, background, mixture)
    things = [_thing(rng, kind, paper, mixture) for kind in kinds]
    if background == "plain":
        things = _free_rows(rng, things)
    things = _place(rng, things, background)
    if len(things) == 2 and things[0].row != things[1].row and rng.random() < 0.45:  # stacked: "above" is exact
        things[1] = replace(things[1], x=things[0].x, slot=things[0].slot)
    return Scene(background, paper, tuple(things), HORIZON + 0.04 * (rng.random() - 0.5), rng.randrange(1 << 30))


def _kinds(rng: random.Random, background: str, mixture: Mixture) -> list[str]:
    count = rng.choices((1, 2, 3), mixture.counts)[0]
    pool: tuple[str, ...] = KINDS
    if count > 1 and rng.random() < mixture.same_row:
        pool = rng.choice((SKY_KINDS, GROUND_KINDS))
    factors, likely, kinds = dict(mixture.factors), LIKELY[background], []
    weights = [likely.get(kind, 1) ** mixture.belonging * factors.get(kind, 1) for kind in pool]
    while len(kinds) < count:
        kind = rng.choices(pool, weights)[0]
        if kind not in kinds:
            kinds.append(kind)
    return kinds


def _thing(rng: random.Random, kind: str, paper: str | None, mixture: Mixture) -> Thing:
    usual = USUAL_COLOR.get(kind)
    often = 0.5 if kind in ("tree", "star", "cloud", "heart") else 0.8
    if usual and usual != paper and rng.random() < often * mixture.usual_color:
        color = usual
    else:
        allowed = ALLOWED_COLORS.get(kind, COLOR_NAMES)
        color = rng.choice([name for name in allowed if name != paper])
    row = "top" if kind in SKY_KINDS else "bottom"
    if rng.random() < (0.4 if kind == "heart" else mixture.misplaced):
        row = "bottom" if row == "top" else "top"
    size = rng.choices(tuple(SIZES), mixture.sizes)[0]
    return Thing(kind, color, size, row, variation=rng.random(), flipped=rng.random() < 0.5)


def _free_rows(rng: random.Random, things: list[Thing]) -> list[Thing]:
    """On plain paper nothing stands on the ground: one row in the middle, or two rows."""
    if len(things) == 1:
        return [replace(things[0], row=rng.choices(("top", "mid", "bottom"), (1, 3, 1))[0])]
    if rng.random() < 0.5 or len({thing.row for thing in things}) == 1:
        things = [replace(thing, row="mid") for thing in things]
    if len(things) == 2 and rng.random() < 0.35:
        things = [replace(thing, row=row) for thing, row in zip(things, rng.sample(("top", "bottom"), 2), strict=True)]
    return things


def _place(rng: random.Random, things: list[Thing], background: str) -> list[Thing]:
    """Spread the things of each row over its slots; few places with little jitter, so that shapes are learnt soon."""
    placed: dict[str, Thing] = {}
    for row in ROWS:
        line = [thing for thing in things if thing.row == row]
        rng.shuffle(line)
        slots = {0: (), 1: rng.choices(SLOTS, (3, 4, 3)), 2: ("left", "right"), 3: SLOTS}[len(line)]
        for thing, slot in zip(line, slots, strict=True):
            placed[thing.kind] = _at(rng, thing, slot, len(line), background)
    return [placed[thing.kind] for thing in things]


def _at(rng: random.Random, thing: Thing, slot: str, in_row: int, background: str) -> Thing:
    crowded = 0.86 if in_row == 3 else 1.0
    scale = SIZES[thing.size] * crowded * (1 + 0.06 * (rng.random() - 0.5))
    x = COLUMNS[in_row][slot] + 0.03 * (rng.random() - 0.5)
    jitter = 0.03 * (rng.random() - 0.5)
    half = EXTENT[thing.kind][1] * scale / 2
    y = ROWS[thing.row] + jitter
    if thing.row == "bottom" and background != "plain":
        floats = 0.06 if background == "sea" and thing.kind == "boat" else 0.0
        y = GROUND_LINE + jitter - half - floats
    if thing.row == "top":
        y = max(y, half + 0.03)
    return replace(thing, slot=slot, x=x, y=y, scale=scale)


def cells(low: float, high: float, count: int) -> tuple[int, int]:
    """First and one-past-last of `count` cells along a side that the span low..high (fractions) touches."""
    return max(0, int(low * count)), min(count, math.ceil(high * count))
