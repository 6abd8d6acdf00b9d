"""What the canvas does to texts before it sends them: dynamic prompts and placeholders in file names."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

_COMMENT = re.compile(r"/\*.*?\*/|//[^\n]*", re.DOTALL)
_PLACEHOLDER = re.compile(r"%([^%]+)%")
_DATE_PART = re.compile(r"d{1,2}|M{1,2}|yyy?y?|h{1,2}|m{1,2}|s{1,2}")
_NOT_IN_NAMES = re.compile(r'[/?<>\\:*|"\x00-\x1f\x7f]')


def dynamic_prompt(text: str, rng: random.Random) -> str:
    """Take out comments and choose one of each `{a|b}`, which may be nested; `\\{` and `\\}` are plain braces."""
    stack: list[list[str]] = [[""]]  # of each open brace, the alternatives so far
    text = _COMMENT.sub("", text)
    index = 0
    while index < len(text):
        char = text[index]
        if char == "\\" and text[index + 1 : index + 2] in ("{", "}", "|"):
            index += 1
            stack[-1][-1] += text[index]
        elif char == "{":
            stack.append([""])
        elif char == "}" and len(stack) > 1:
            chosen = rng.choice(stack.pop())
            stack[-1][-1] += chosen
        elif char == "|" and len(stack) > 1:
            stack[-1].append("")
        else:
            stack[-1][-1] += char
        index += 1
    while len(stack) > 1:  # a brace that is never closed
        chosen = rng.choice(stack.pop())
        stack[-1][-1] += chosen
    return stack[0][0]


def file_name(text: str, widget_value: Callable[[str, str], Any], now: datetime) -> str:
    """Fill in `%node.widget%` and `%date:yyyy-MM-dd%`; what is unknown stays, for the node itself may know it.

    `widget_value` gives the value of a widget of the node with a name, or None.
    """

    def replaced(match: re.Match[str]) -> str:
        inner = match.group(1)
        if inner.startswith("date:"):
            return date_text(now, inner[5:])
        parts = inner.split(".")
        value = widget_value(*parts) if len(parts) == 2 else None
        return match.group(0) if value is None else _NOT_IN_NAMES.sub("_", plain(value))

    return _PLACEHOLDER.sub(replaced, text)


def date_text(now: datetime, pattern: str) -> str:
    """A date in the canvas's letters: yyyy yy M MM d dd h hh m mm s ss."""
    parts = {"d": now.day, "M": now.month, "h": now.hour, "m": now.minute, "s": now.second}

    def part(match: re.Match[str]) -> str:
        letters = match.group(0)
        if letters[0] == "y":
            return f"{now.year:04}"[-len(letters) :]
        return f"{parts[letters[0]]:0{len(letters)}}"

    return _DATE_PART.sub(part, pattern)


def plain(value: Any) -> str:
    """A value as the browser writes it: true, 1 for 1.0."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)
