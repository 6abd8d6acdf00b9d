"""What several nodes check in the same way."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..flux_runtime.errors import FluxError


def forward(remedy: str) -> Callable[..., bool | str]:
    """A `validate` that judges `start` and `end` of a part of the run before anything is loaded.

    A linked value is None, and is judged when it is known.
    """

    def judge(start: float | None, end: float | None) -> bool | str:
        for name, value in (("start", start), ("end", end)):
            if value is not None and not 0 <= value <= 1:
                return f"{name} is {value}; it must be from 0 to 1"
        if start is None or end is None or start < end:
            return True
        return f"start ({start:g}) must lie before end ({end:g}): {remedy}"

    return judge


def numbers(text: str, name: str) -> tuple[float, ...]:
    """The numbers of a text such as "1, 0.5, 0"; none of an empty one."""
    words = text.replace(",", " ").replace(";", " ").split()
    try:
        found = tuple(float(word) for word in words)
    except ValueError:
        found = (math.nan,)
    if not all(math.isfinite(number) for number in found):
        raise FluxError(f"{name} is {text[:80]!r}; write numbers with commas between them, such as 1, 0.5, 0")
    return found
