"""One order for the conditions of a picture, whatever the order in which they were wired."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .conditions import Condition


def in_order(conditions: Sequence[Condition]) -> list[Condition]:
    """By kind, and within a kind by what they hold: sums of floating-point numbers depend on their order.

    References that are placed by their number keep the order of the wiring, for there it is what the user says.
    """
    ordered: list[Condition] = []
    for kind in sorted({condition.kind for condition in conditions}):
        alike = [condition for condition in conditions if condition.kind == kind]
        told = all(getattr(condition, "method", "fixed") == "fixed" for condition in alike)
        ordered += sorted(alike, key=fingerprint) if len(alike) > 1 and told else alike
    return ordered


def fingerprint(thing: Any) -> str:
    """A text that tells things of different content apart: the numbers and names they hold; networks are left out."""
    if isinstance(thing, Tensor):
        numbers = thing.detach().to("cpu", torch.float32).contiguous().numpy()
        return f"{tuple(thing.shape)} {hashlib.sha256(numbers.tobytes()).hexdigest()}"
    if is_dataclass(thing):
        return "; ".join(fingerprint(getattr(thing, field.name)) for field in fields(thing))
    if isinstance(thing, (tuple, list)):
        return ", ".join(map(fingerprint, thing))
    return repr(thing) if isinstance(thing, (str, int, float, type(None))) else type(thing).__name__
