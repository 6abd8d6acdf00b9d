"""The sizes that Kontext draws at: as asked, the source's own, one it was trained on, or a given area."""

from __future__ import annotations

from dataclasses import dataclass

from .errors import FluxError
from .image import MAX_SIDE

MODES = ("exact", "source", "preferred", "area")
MAX_AREA = 1024**2  # pixels

_UPRIGHT = (
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248), (880, 1184), (944, 1104),
)  # fmt: skip
# (width, height), all of about a megapixel, from the narrowest to the widest.
PREFERRED = (*_UPRIGHT, (1024, 1024), *((height, width) for width, height in reversed(_UPRIGHT)))


@dataclass(frozen=True)
class Size:
    """A size in pixels, and a sentence that says why it is this one."""

    width: int
    height: int
    why: str


def kontext_size(
    mode: str, source: tuple[int, int] | None = None, width: int = 0, height: int = 0,
    max_area: int = 0, multiple: int = 16,
) -> Size:  # fmt: skip
    """Choose the size to draw at. `source` is the (width, height) of the picture to edit.

    "exact" takes width and height as they are asked; "source" the source's size, made smaller only where it exceeds a
    `max_area` that is given; "preferred" the trained size nearest to the source's shape, else to the one asked for;
    "area" gives the shape asked for (else the source's) an area of `max_area`, by default a megapixel, which is what
    diffusers does. All are floored to the multiple.
    """
    if mode not in MODES:
        raise FluxError(f"the size mode {mode!r} is unknown; use {', '.join(MODES)}")
    asked = (width, height) if width and height else None
    if mode == "exact":
        return _floored(_needed(asked, mode, "a width and a height"), multiple, "the size asked for")
    if mode == "source":
        return _source(_needed(source, mode, "a picture to edit"), max_area, multiple)
    if mode == "preferred":
        return _preferred(source, asked)
    shape = _needed(asked or source, mode, "a width and a height, or a picture to edit")
    fitted = area_size(*shape, max_area or MAX_AREA, multiple)
    return _checked(*fitted, f"{_told(shape)} has the area of {_told(fitted)} at {(max_area or MAX_AREA) / 1e6:.2f} MP")


def preferred_size(width: int, height: int) -> tuple[int, int]:
    """The trained size whose ratio of width to height is nearest; of two as near, the narrower."""
    ratio = width / height
    return min(PREFERRED, key=lambda size: (abs(ratio - size[0] / size[1]), size[0]))


def reference_size(mode: str, width: int, height: int, multiple: int = 16) -> tuple[int, int]:
    """The (width, height) to look at a picture at: "source" its own, floored; "preferred" the trained one nearest.

    The oracle, too, takes a picture's shape from the floored size.
    """
    if mode not in ("source", "preferred"):
        raise FluxError(f"the reference size {mode!r} is unknown; use source or preferred")
    own = tuple(max(side // multiple, 1) * multiple for side in (width, height))
    return preferred_size(*own) if mode == "preferred" else own


def area_size(width: int, height: int, max_area: int = MAX_AREA, multiple: int = 16) -> tuple[int, int]:
    """The shape of width x height with an area of `max_area` pixels, floored to the multiple."""
    ratio = width / height
    sides = round((max_area * ratio) ** 0.5), round((max_area / ratio) ** 0.5)
    return sides[0] // multiple * multiple, sides[1] // multiple * multiple


def _source(source: tuple[int, int], max_area: int, multiple: int) -> Size:
    if max_area and source[0] * source[1] > max_area:
        return _checked(
            *area_size(*source, max_area, multiple), f"the source's {_told(source)}, reduced to {max_area / 1e6:.2f} MP"
        )
    return _floored(source, multiple, "the source's size")


def _preferred(source: tuple[int, int] | None, asked: tuple[int, int] | None) -> Size:
    shape = _needed(source or asked, "preferred", "a picture to edit, or a width and a height")
    whose = "the source's" if source else "the asked"
    return _checked(*preferred_size(*shape), f"the trained size nearest to {whose} {_told(shape)}")


def _floored(size: tuple[int, int], multiple: int, name: str) -> Size:
    width, height = size[0] // multiple * multiple, size[1] // multiple * multiple
    cut = "" if (width, height) == size else f" {_told(size)}, floored to multiples of {multiple}"
    return _checked(width, height, name + cut)


def _checked(width: int, height: int, why: str) -> Size:
    if not (0 < width <= MAX_SIDE and 0 < height <= MAX_SIDE):
        raise FluxError(f"a picture of {width}x{height} ({why}) cannot be drawn; use sides of 16 to {MAX_SIDE} pixels")
    return Size(width, height, f"drawing {width}x{height}: {why}")


def _needed(size: tuple[int, int] | None, mode: str, what: str) -> tuple[int, int]:
    if size is None or min(size) <= 0:
        raise FluxError(f"the size mode {mode!r} needs {what}; give it, or choose another mode")
    return size


def _told(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
