"""The one exception a user is meant to read, and the check that no picture is made of numbers that are none."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class FluxError(ValueError):
    """Something the user can mend: the message names the thing and the remedy, in a sentence."""


def check_finite(result: Tensor, what: str) -> None:
    """Refuse what `what` made where it holds NaN or infinity, which would be shown as black."""
    if result.isfinite().all():
        return
    kind = str(result.dtype).removeprefix("torch.")
    remedy = "look for damage in its weights, its LoRAs and what it was given"
    if kind == "float16":
        remedy = "load it as bfloat16 or float32"
    raise FluxError(f"{what} made numbers that are not finite, in {kind}; {remedy}")
