"""Draws a scene with Pillow: the same scene gives the same picture, at any size."""

import math
import random
from collections.abc import Callable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from .scenes import COLORS, EXTENT, Scene, Thing

Rgb = tuple[int, int, int]
Point = tuple[float, float]
SKY = {
    "meadow": ((120, 190, 245), (214, 238, 252)),
    "night": ((14, 18, 56), (42, 52, 110)),
    "sunset": ((246, 120, 84), (255, 212, 130)),
    "sea": ((150, 208, 246), (224, 242, 250)),
    "snow": ((176, 194, 216), (222, 232, 242)),
}
GROUND = {
    "meadow": (126, 200, 92),
    "night": (30, 66, 58),
    "sunset": (122, 92, 62),
    "sea": (38, 110, 178),
    "snow": (246, 249, 252),
}
SUPERSAMPLING = 3


def render(scene: Scene, size: int = 128) -> Image.Image:
    """The scene as an RGB picture of `size` x `size` pixels."""
    side = size * SUPERSAMPLING
    image = _background(scene, side)
    draw = ImageDraw.Draw(image)
    for thing in sorted(scene.things, key=lambda thing: thing.row == "bottom"):
        if scene.background != "plain" and thing.row == "bottom":
            _footing(draw, thing, scene.background, side)
        pen = Pen(draw, thing, side)
        DRAWERS[thing.kind](pen, COLORS[thing.color], thing)
    return image.reduce(SUPERSAMPLING)


def darker(color: Rgb, factor: float) -> Rgb:
    """The colour multiplied by `factor` (0..1)."""
    return tuple(int(value * factor) for value in color)


def paler(color: Rgb, share: float) -> Rgb:
    """The colour mixed with `share` (0..1) of white."""
    return tuple(int(value + (255 - value) * share) for value in color)


# ---------------------------------------------------------------- backgrounds
def _background(scene: Scene, side: int) -> Image.Image:
    if scene.background == "plain":
        return Image.new("RGB", (side, side), paler(COLORS[scene.paper], 0.35))
    rng = random.Random(scene.seed)
    image = _sky(scene, side)
    draw = ImageDraw.Draw(image)
    if scene.background == "night":
        _dots(draw, rng, side, 14, scene.horizon * 0.95, (0.004, 0.008), (236, 236, 214))
    phase = rng.random() * 2 * math.pi
    _ground(draw, scene, side, phase)
    if scene.background == "sea":
        _waves(draw, scene, side, phase)
    if scene.background == "snow":
        _dots(draw, rng, side, 18, 0.62, (0.007, 0.007), (252, 253, 255))
    return image


def _sky(scene: Scene, side: int) -> Image.Image:
    top, low = (np.array(color, np.float32) for color in SKY[scene.background])
    share = np.clip(np.linspace(0, 1, side) / scene.horizon, 0, 1)[:, None]
    column = (top + (low - top) * share).astype(np.uint8)[:, None]
    return Image.fromarray(column).resize((side, side), Image.Resampling.NEAREST)


def _ground(draw: ImageDraw.ImageDraw, scene: Scene, side: int, phase: float) -> None:
    color, sea = GROUND[scene.background], scene.background == "sea"
    height, swing = scene.horizon - (0.06 if sea else 0), 0.0 if sea else 0.03
    _hill(draw, side, lambda x: height + swing * math.sin(phase + 4 * x), color)
    if not sea:
        _hill(draw, side, lambda x: scene.horizon + 0.2 + swing * math.sin(phase + 2 + 3 * x), darker(color, 0.93))


def _hill(draw: ImageDraw.ImageDraw, side: int, height: Callable[[float], float], color: Rgb) -> None:
    line = [(i / 24 * side, height(i / 24) * side) for i in range(25)]
    draw.polygon([*line, (side, side), (0, side)], fill=color)


def _waves(draw: ImageDraw.ImageDraw, scene: Scene, side: int, phase: float) -> None:
    for wave in range(3):
        y = scene.horizon + 0.02 + 0.125 * wave
        line = [(i / 48 * side, (y + 0.008 * math.sin(phase + 2 * wave + 0.8 * i)) * side) for i in range(49)]
        draw.line(line, fill=(98, 164, 218), width=max(1, int(0.012 * side)))


def _dots(
    draw: ImageDraw.ImageDraw,
    rng: random.Random,
    side: int,
    count: int,
    lowest: float,
    radii: tuple[float, float],
    color: Rgb,
) -> None:
    for _ in range(count):
        x, y, radius = rng.random() * side, rng.random() * side * lowest, rng.uniform(*radii) * side
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)


def _footing(draw: ImageDraw.ImageDraw, thing: Thing, background: str, side: int) -> None:
    """What a thing needs to stand where it does not belong: an island in the sea, a pond on land."""
    swims = thing.kind in ("boat", "fish")
    width, height = EXTENT[thing.kind]
    x, y = thing.x * side, (thing.y + height * thing.scale / 2 - 0.015) * side
    if background == "sea" and thing.kind in ("house", "tree", "car", "flower"):
        reach = (width * 0.72 * thing.scale + 0.02) * side
        draw.ellipse((x - reach, y - 0.03 * side, x + reach, y + 0.07 * side), fill=(238, 214, 150))
    elif background != "sea" and swims:
        reach = (width * 0.66 * thing.scale + 0.02) * side
        y -= (0.02 if thing.kind == "boat" else 0.03) * side
        draw.ellipse((x - reach, y - 0.05 * side, x + reach, y + 0.06 * side), fill=(84, 156, 214))


# ---------------------------------------------------------------- things
class Pen:
    """Draws in a thing's own coordinates: (0, 0) is its middle, its extent is given in fractions of the picture."""

    def __init__(self, draw: ImageDraw.ImageDraw, thing: Thing, side: int) -> None:
        self.draw, self.x, self.y, self.unit = draw, thing.x * side, thing.y * side, thing.scale * side
        self.mirror = -1 if thing.flipped else 1
        self.outline_width = max(1, round(0.011 * side))
        self.outline_share = self.outline_width / self.unit

    def at(self, x: float, y: float) -> Point:
        return self.x + self.mirror * x * self.unit, self.y + y * self.unit

    def polygon(self, points: Sequence[Point], fill: Rgb, outline: Rgb | None = None) -> None:
        corners = [self.at(*point) for point in points]
        self.draw.polygon(corners, fill=fill)
        if outline:
            self.draw.line([*corners, *corners[:2]], fill=outline, width=self.outline_width, joint="curve")

    def box(self, x0: float, y0: float, x1: float, y1: float, fill: Rgb, outline: Rgb | None = None) -> None:
        self.polygon([(x0, y0), (x1, y0), (x1, y1), (x0, y1)], fill, outline)

    def oval(self, x: float, y: float, rx: float, ry: float, fill: Rgb, outline: Rgb | None = None) -> None:
        cx, cy = self.at(x, y)
        rx, ry = rx * self.unit, ry * self.unit
        self.draw.ellipse(
            (cx - rx, cy - ry, cx + rx, cy + ry), fill=fill, outline=outline, width=self.outline_width if outline else 1
        )

    def disc(self, x: float, y: float, radius: float, fill: Rgb, outline: Rgb | None = None) -> None:
        self.oval(x, y, radius, radius, fill, outline)

    def line(self, points: Sequence[Point], fill: Rgb, width: float) -> None:
        self.draw.line(
            [self.at(*point) for point in points], fill=fill, width=max(1, int(width * self.unit)), joint="curve"
        )


def _house(pen: Pen, color: Rgb, thing: Thing) -> None:
    dark = darker(color, 0.55)
    roof = (94, 72, 92) if thing.color in ("red", "orange", "pink") else (176, 62, 50)
    pen.box(0.05, -0.15, 0.095, -0.04, darker(roof, 0.7))
    pen.box(-0.12, -0.03, 0.12, 0.16, color, dark)
    pen.polygon([(-0.155, -0.02), (0, -0.16), (0.155, -0.02)], roof, darker(roof, 0.6))
    pen.box(-0.075, 0.05, -0.015, 0.16, (108, 66, 44))
    pen.box(0.025, 0.025, 0.09, 0.09, (255, 236, 150), dark)


def _tree(pen: Pen, color: Rgb, thing: Thing) -> None:
    pen.box(-0.028, 0.02, 0.028, 0.18, (116, 76, 46), (78, 50, 32))
    crown = [(-0.065, 0, 0.07), (0.065, 0, 0.07), (0, -0.09 - 0.01 * thing.variation, 0.085), (0, -0.01, 0.085)]
    for x, y, radius in crown:
        pen.disc(x, y, radius, darker(color, 0.6))
    for x, y, radius in crown:
        pen.disc(x, y, radius - pen.outline_share, color)
    pen.disc(-0.03, -0.1, 0.022, paler(color, 0.3))


def _car(pen: Pen, color: Rgb, thing: Thing) -> None:
    dark, glass = darker(color, 0.55), (206, 232, 248)
    pen.polygon([(-0.10, -0.01), (-0.065, -0.095), (0.055, -0.095), (0.105, -0.01)], color, dark)
    pen.polygon([(-0.075, -0.015), (-0.05, -0.075), (-0.008, -0.075), (-0.008, -0.015)], glass)
    pen.polygon([(0.012, -0.015), (0.012, -0.075), (0.045, -0.075), (0.078, -0.015)], glass)
    pen.polygon(
        [(-0.16, 0.055), (-0.155, -0.005), (-0.14, -0.018), (0.13, -0.018), (0.158, 0.01), (0.16, 0.055)], color, dark
    )
    for x in (-0.085, 0.085):
        pen.disc(x, 0.058, 0.042, (42, 42, 50))
        pen.disc(x, 0.058, 0.017, (200, 200, 205))


def _flower(pen: Pen, color: Rgb, thing: Thing) -> None:
    pen.line([(0, -0.04), (0, 0.16)], (52, 124, 56), 0.02)
    pen.polygon([(0, 0.10), (0.06, 0.05), (0.075, 0.075), (0.02, 0.125)], (70, 150, 70), (44, 100, 48))
    for petal in range(6):
        angle = thing.variation + petal * math.pi / 3
        pen.disc(0.062 * math.cos(angle), -0.07 + 0.062 * math.sin(angle), 0.036, color, darker(color, 0.65))
    pen.disc(0, -0.07, 0.034, (120, 76, 40) if thing.color in ("yellow", "orange") else (252, 214, 70))


def _boat(pen: Pen, color: Rgb, thing: Thing) -> None:
    pen.line([(0, -0.155), (0, 0.07)], (104, 68, 42), 0.014)
    pen.polygon([(0.014, -0.15), (0.014, 0.035), (0.125, 0.035)], (252, 250, 244), (150, 150, 150))
    pen.polygon([(-0.014, -0.11), (-0.014, 0.035), (-0.095, 0.035)], (240, 236, 226), (150, 150, 150))
    pen.polygon([(-0.155, 0.055), (0.155, 0.055), (0.105, 0.155), (-0.105, 0.155)], color, darker(color, 0.55))
    pen.line([(-0.14, 0.075), (0.14, 0.075)], paler(color, 0.45), 0.014)


def _fish(pen: Pen, color: Rgb, thing: Thing) -> None:
    dark, fin = darker(color, 0.55), darker(color, 0.85)
    pen.polygon([(-0.06, 0), (-0.16, -0.075), (-0.14, 0), (-0.16, 0.075)], fin, dark)
    pen.polygon([(-0.03, -0.06), (0.02, -0.1), (0.05, -0.055)], fin, dark)
    pen.oval(0.03, 0, 0.12, 0.07, color, dark)
    pen.line([(0.005, -0.045), (0.02, 0), (0.005, 0.045)], paler(color, 0.45), 0.016)
    pen.disc(0.095, -0.02, 0.017, (255, 255, 255))
    pen.disc(0.1, -0.02, 0.009, (20, 20, 26))


def _polar(radius: float, angle: float) -> Point:
    return radius * math.cos(angle), radius * math.sin(angle)


def _sun(pen: Pen, color: Rgb, thing: Thing) -> None:
    for ray in range(10):
        angle = thing.variation * 0.6 + 2 * math.pi * ray / 10
        pen.polygon([_polar(0.16, angle), _polar(0.1, angle + 0.22), _polar(0.1, angle - 0.22)], darker(color, 0.93))
    pen.disc(0, 0, 0.1, color, darker(color, 0.8))


def _moon(pen: Pen, color: Rgb, thing: Thing) -> None:
    pen.mirror = -1  # always a waning moon, like the letter C
    angles = [math.pi * (i / 24 - 0.5) for i in range(25)]
    outer = [(0.14 * math.cos(a) - 0.04, 0.14 * math.sin(a)) for a in angles]
    inner = [(0.065 * math.cos(a) - 0.04, 0.14 * math.sin(a)) for a in reversed(angles)]
    color = (253, 238, 160) if thing.color == "yellow" else color
    pen.polygon(outer + inner, color, darker(color, 0.75))


def _star(pen: Pen, color: Rgb, thing: Thing) -> None:
    points = [_polar(0.062 if i % 2 else 0.14, (i / 5 - 0.5) * math.pi) for i in range(10)]
    pen.polygon(points, color, darker(color, 0.65))


def _cloud(pen: Pen, color: Rgb, thing: Thing) -> None:
    puffs = [(-0.105, 0.03, 0.062), (-0.03, -0.02, 0.075), (0.06, 0, 0.075), (0.12, 0.04, 0.055)]
    for inset, fill in ((0, darker(color, 0.78)), (pen.outline_share, color)):
        for x, y, radius in puffs:
            pen.disc(x, y, radius - inset, fill)
        pen.box(-0.105, 0.03, 0.12, 0.095 - inset, fill)


def _balloon(pen: Pen, color: Rgb, thing: Thing) -> None:
    dark, stripe = darker(color, 0.6), paler(color, 0.5)
    for side in (-1, 1):
        pen.line([(0.06 * side, 0.03), (0.022 * side, 0.12)], (96, 66, 44), 0.009)
    pen.polygon([(-0.105, -0.02), (-0.03, 0.085), (0.03, 0.085), (0.105, -0.02)], color, dark)
    pen.disc(0, -0.055, 0.115, color, dark)
    pen.oval(0, -0.055, 0.05, 0.112, stripe)
    pen.polygon([(-0.045, -0.01), (-0.012, 0.08), (0.012, 0.08), (0.045, -0.01)], stripe)
    pen.box(-0.03, 0.115, 0.03, 0.165, (150, 100, 58), (92, 60, 36))


def _heart(pen: Pen, color: Rgb, thing: Thing) -> None:
    angles = [2 * math.pi * i / 40 for i in range(40)]
    pen.polygon(
        [
            (
                0.13 * math.sin(a) ** 3,
                -0.0085 * (13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a)) - 0.015,
            )
            for a in angles
        ],
        color,
        darker(color, 0.65),
    )
    pen.disc(-0.055, -0.06, 0.02, paler(color, 0.45))


DRAWERS: dict[str, Callable[[Pen, Rgb, Thing], None]] = {
    "house": _house,
    "tree": _tree,
    "car": _car,
    "flower": _flower,
    "boat": _boat,
    "fish": _fish,
    "sun": _sun,
    "moon": _moon,
    "star": _star,
    "cloud": _cloud,
    "balloon": _balloon,
    "heart": _heart,
}
