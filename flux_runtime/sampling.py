"""The denoise loop. There is one; a pipeline is a choice of the small objects that are handed to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One step of a run: its number, how many there are, and the noise levels it goes between."""

    index: int
    count: int
    sigma: float
    sigma_next: float

    def within(self, start: float, end: float) -> bool:
        """Whether the whole step lies between two fractions of the run."""
        return self.index / self.count >= start and (self.index + 1) / self.count <= end


class Branch(Protocol):
    """A prompt with its conditions, bound to a canvas: makes what the model reads in one call."""

    def __call__(self, x: Tensor, sigma: float, step: Step) -> Any: ...


class Guide(Protocol):
    """Combines the predictions of its branches into one velocity."""

    def __call__(self, predict: Callable[[Branch], Tensor]) -> Tensor: ...


class Solver(Protocol):
    """Goes one step: (x at sigma_next, clean estimate)."""

    def __call__(self, velocity: Callable[[Tensor, float], Tensor], x: Tensor, step: Step) -> tuple[Tensor, Tensor]: ...


class Constraint(Protocol):
    """Corrects x after a step, at noise level sigma_next."""

    def __call__(self, x: Tensor, step: Step) -> Tensor: ...


class Watch(Protocol):
    """Sees x and the clean estimate after each step; may raise to stop the run."""

    def __call__(self, step: Step, x: Tensor, clean: Tensor) -> None: ...


def steps(sigmas: Sequence[float]) -> Iterator[Step]:
    count = len(sigmas) - 1
    for index in range(count):
        yield Step(index, count, sigmas[index], sigmas[index + 1])


def denoise(
    model: Callable[[Any], Tensor],
    x: Tensor,
    sigmas: Sequence[float],
    guide: Guide,
    *,
    solver: Solver,
    constraints: Sequence[Constraint] = (),
    watch: Watch | None = None,
) -> Tensor:
    """Carry x (B, canvas tokens, C) from the first sigma to the last; `model` makes a branch's inputs a velocity."""
    for step in steps(sigmas):

        def velocity(x: Tensor, sigma: float, step: Step = step) -> Tensor:
            return guide(lambda branch: model(branch(x, sigma, step)))

        x, clean = solver(velocity, x, step)
        for constrain in constraints:
            x = constrain(x, step)
        if watch is not None:
            watch(step, x, clean)
    return x
