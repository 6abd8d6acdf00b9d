"""The widgets a node's input can have: each declares itself to the canvas and finds fault with a value.

One rule serves twice: a default that a widget faults is an error when the pack loads, a value that it faults is an
error when the node runs. The second is needed because a graph need not come from the canvas, and because no host
compares NaN with a range.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

SEED_MAX = 2**64 - 1
_SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True, kw_only=True)
class Widget:
    """Base of all widgets.

    `optional` is for a widget that was appended to a published node: API files saved before do not name it.
    """

    optional: bool = False

    def declare(self, kind: type) -> tuple[Any, dict[str, Any]]:
        """The canvas's type and options for a parameter annotated with `kind`."""
        raise NotImplementedError

    def fault(self, value: Any, kind: type) -> str:
        """What is wrong with `value`, as the end of a sentence; "" when nothing is."""
        raise NotImplementedError

    def malformed(self, kind: type) -> str:
        """What is wrong with the widget itself on a parameter annotated with `kind`; "" when nothing is."""
        raise NotImplementedError


@dataclass(frozen=True)
class Range(Widget):
    """A whole (`int`) or real (`float`) number from `low` to `high`, both included; `step` is the arrow keys' step."""

    low: float
    high: float
    step: float = 1

    def declare(self, kind: type) -> tuple[Any, dict[str, Any]]:
        return ("INT" if kind is int else "FLOAT"), {"min": self.low, "max": self.high, "step": self.step}

    def fault(self, value: Any, kind: type) -> str:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            return f"is {value!r}, which is not a number"
        if not math.isfinite(value) or not self.low <= value <= self.high:
            return f"is {value}; it must be from {self.low} to {self.high}"
        return f"is {value}; it must be a whole number" if kind is int and value != int(value) else ""

    def malformed(self, kind: type) -> str:
        if kind not in (int, float):
            return f"has a Range but is a {kind.__name__}, not an int or float"
        return "has an empty range or step" if not (self.low < self.high and self.step > 0) else ""


@dataclass(frozen=True)
class Seed(Range):
    """A seed, with the canvas's own choice of what happens to it after each run."""

    low: float = 0
    high: float = SEED_MAX

    def declare(self, kind: type) -> tuple[Any, dict[str, Any]]:
        return "INT", {"min": self.low, "max": self.high, "control_after_generate": True}


@dataclass(frozen=True)
class Flag(Widget):
    """A switch."""

    def declare(self, kind: type) -> tuple[Any, dict[str, Any]]:
        return "BOOLEAN", {}

    def fault(self, value: Any, kind: type) -> str:
        return "" if isinstance(value, bool) else f"is {value!r}; it must be true or false"

    def malformed(self, kind: type) -> str:
        return "" if kind is bool else f"has a Flag but is a {kind.__name__}, not a bool"


@dataclass(frozen=True)
class Text(Widget):
    """A text; `dynamic` lets the canvas choose from {one|two} at random."""

    multiline: bool = False
    dynamic: bool = False
    placeholder: str = ""
    longest: int = 100_000

    def declare(self, kind: type) -> tuple[Any, dict[str, Any]]:
        options: dict[str, Any] = {"multiline": self.multiline, "dynamicPrompts": self.dynamic}
        return "STRING", options | ({"placeholder": self.placeholder} if self.placeholder else {})

    def fault(self, value: Any, kind: type) -> str:
        if not isinstance(value, str):
            return f"is {value!r}, which is not a text"
        if half := _SURROGATE.search(value):  # no tokenizer takes it, and a cut emoji leaves it behind
            return f"has half a character at place {half.start() + 1}, as a cut emoji leaves behind; delete it"
        return f"has {len(value):,} characters; shorten it to {self.longest:,}" if len(value) > self.longest else ""

    def malformed(self, kind: type) -> str:
        return "" if kind is str else f"has a Text but is a {kind.__name__}, not a str"


@dataclass(frozen=True)
class Choice(Widget):
    """One of several names; a function is asked for them each time the canvas reads the node, so it must be cheap."""

    options: Sequence[str] | Callable[[], Sequence[str]]

    def declare(self, kind: type) -> tuple[Any, dict[str, Any]]:
        return list(self.options() if callable(self.options) else self.options), {}

    def fault(self, value: Any, kind: type) -> str:
        if not isinstance(value, str):
            return f"is {value!r}, which is not one of the names to choose from"
        known = callable(self.options) or value in self.options
        return "" if known else f"is {value!r}; choose one of {', '.join(self.options)}"

    def malformed(self, kind: type) -> str:
        if kind is not str:
            return f"has a Choice but is a {kind.__name__}, not a str"
        return "offers nothing to choose from" if not (callable(self.options) or self.options) else ""
