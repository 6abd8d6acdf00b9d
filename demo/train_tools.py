"""What every stage of training shares: the optimiser, averaged weights, and a loop that can be killed and resumed.

Whatever is random in step n is drawn from generators seeded by the stage, the seed and n. So a state needs no
generator: the step number is enough to go on exactly as if nothing had happened.
"""

import os
import random
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")

MOMENTUM, BETA1, BETA2 = 0.95, 0.9, 0.99
NEWTON = (3.4445, -4.7750, 2.0315)  # quintic of the Muon optimiser (Jordan et al., 2024)


class Muon:
    """Muon for the named matrices, Adam for everything else."""

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], rate: float, adam_rate: float, is_matrix: Callable[[str], bool]
    ) -> None:
        self.parameters = dict(named)
        self.rate, self.adam_rate, self.count = rate, adam_rate, 0
        self.first = {name: torch.zeros_like(p) for name, p in self.parameters.items()}
        self.matrices = {name for name, p in self.parameters.items() if p.ndim >= 2 and is_matrix(name)}
        self.second = {name: torch.zeros_like(p) for name, p in self.parameters.items() if name not in self.matrices}

    @torch.no_grad()
    def step(self, scale: float) -> None:
        """One step at `scale` times the learning rates; parameters without a gradient stay."""
        self.count += 1
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            move = self._muon if name in self.matrices else self._adam
            move(name, parameter, parameter.grad, scale)
            parameter.grad = None

    def _muon(self, name: str, parameter: Tensor, grad: Tensor, scale: float) -> None:
        average = self.first[name].lerp_(grad, 1 - MOMENTUM)
        matrix = grad.lerp(average, MOMENTUM).flatten(1)
        update = orthogonal(matrix) * max(1, matrix.shape[0] / matrix.shape[1]) ** 0.5
        parameter.sub_(update.reshape(parameter.shape), alpha=self.rate * scale)

    def _adam(self, name: str, parameter: Tensor, grad: Tensor, scale: float) -> None:
        mean, square = self.first[name].lerp_(grad, 1 - BETA1), self.second[name].lerp_(grad * grad, 1 - BETA2)
        size = (square / (1 - BETA2**self.count)).sqrt() + 1e-8
        parameter.sub_(mean / (1 - BETA1**self.count) / size, alpha=self.adam_rate * scale)

    def tensors(self) -> dict[str, Tensor]:
        return _prefixed("first", self.first) | _prefixed("second", self.second)


def orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with its singular values pushed to 1 in five steps of Newton-Schulz (in bfloat16 if that is fast)."""
    a, b, c = NEWTON
    x = matrix / (matrix.norm() + 1e-7)
    x = x.bfloat16() if fast_in_half(matrix.device) else x
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.T if tall else x).to(matrix.dtype)


def fast_in_half(device: torch.device) -> bool:
    """Whether products in bfloat16 are the faster ones; a CPU without AVX-512 takes ten times as long for them."""
    return device.type != "cpu" or torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def half_precision(device: torch.device) -> torch.autocast:
    """bfloat16 for the products of a step, where that is faster."""
    return torch.autocast(device.type, torch.bfloat16, enabled=fast_in_half(device))


class Average:
    """An exponential moving average of a model's parameters, with a short memory at first."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.model, self.decay = model, decay
        self.mean = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, parameter in self.model.named_parameters():
            self.mean[name].lerp_(parameter, 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the model's weights with the average; a second call undoes the first."""
        for name, parameter in self.model.named_parameters():
            kept = parameter.detach().clone()
            parameter.copy_(self.mean[name])
            self.mean[name] = kept

    def __enter__(self) -> nn.Module:
        self.swap()
        return self.model.eval()

    def __exit__(self, *_: object) -> None:
        self.swap()
        self.model.train()


@dataclass(frozen=True)
class Plan:
    """How long a stage runs and how often it speaks and saves, all in steps; and how many processes prepare batches."""

    stage: str
    steps: int
    seed: int = 1
    warmup: int = 60
    decay_from: float = 0.4
    save_every: int = 100
    print_every: int = 50
    look_every: int = 0
    workers: int = 0

    def scale(self, step: int) -> float:
        """Learning rate as a share of its peak: up, level, and down to two per cent."""
        falling = (1 - step / self.steps) / (1 - self.decay_from)
        return min(1, (step + 1) / self.warmup) * min(1, max(0.02, falling))

    def dice(self, step: int) -> tuple[random.Random, torch.Generator]:
        """The generators of one step."""
        rng = random.Random(f"{self.stage} {self.seed} {step}")
        return rng, torch.Generator().manual_seed(rng.getrandbits(62))


class _Made(Dataset):
    def __init__(self, make: Callable[[int], Any]) -> None:
        self.make = make

    def __getitem__(self, index: int) -> Any:
        return self.make(index)


def ahead(make: Callable[[int], T], indices: range, workers: int) -> Iterator[T]:
    """`make(index)` of each index, in their order; so many processes make the next ones meanwhile (0: none does)."""
    workers = min(workers, len(indices))
    if not workers:
        return map(make, indices)
    unused = torch.Generator()  # else the loader takes a number from the common one
    return iter(
        DataLoader(_Made(make), None, sampler=indices, num_workers=workers, collate_fn=_as_it_is, generator=unused)
    )


def _as_it_is(made: T) -> T:
    return made


def moved(value: T, device: torch.device) -> T:
    """A tensor, or a dataclass or tuple with tensors in it, on the device."""
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, tuple):
        return tuple(moved(part, device) for part in value)
    if not is_dataclass(value):
        return value
    return replace(value, **{field.name: moved(getattr(value, field.name), device) for field in fields(value)})


Prepare = Callable[[random.Random, torch.Generator], T]


@dataclass(frozen=True)
class _Prepared:
    """The batch of a step, from the step's own generators."""

    plan: Plan
    prepare: Prepare[Any]

    def __call__(self, step: int) -> Any:
        return self.prepare(*self.plan.dice(step))


class Course:
    """A model on its way through a stage: trains it step by step, from its saved state if there is one."""

    def __init__(self, plan: Plan, model: nn.Module, optimiser: Muon, folder: Path, decay: float = 0.998) -> None:
        self.plan, self.model, self.optimiser, self.step = plan, model, optimiser, 0
        self.average = Average(model, decay)
        self.path = folder / f"{plan.stage}-state.safetensors"
        folder.mkdir(parents=True, exist_ok=True)
        if self.path.exists():
            self._restore()

    def run(
        self,
        prepare: Prepare[T],
        loss_of: Callable[[T], Tensor],
        look: Callable[[nn.Module, int], str] | None = None,
        until: int | None = None,
    ) -> nn.Module:
        """Train to the end of the plan (or to step `until`) and return the model with averaged weights.

        `prepare(rng, generator)` makes a step's batch on the CPU, in another process if the plan has workers, and
        `loss_of(batch)` is its loss; `look(model, step)` shows how far the averaged model is.
        """
        began, first, losses = time.monotonic(), self.step, []
        stop = self.plan.steps if until is None else min(until, self.plan.steps)
        for batch in ahead(_Prepared(self.plan, prepare), range(first, stop), self.plan.workers):
            losses.append(self._advance(loss_of(batch)))
            if self.step % self.plan.print_every == 0 or self.step == stop:
                pace = (time.monotonic() - began) / (self.step - first)
                print(
                    f"{self.plan.stage}: step {self.step} of {self.plan.steps}, loss {torch.stack(losses).mean():.4f}, "
                    f"{pace:.2f} s a step",
                    flush=True,
                )
                losses = []
            if self.step % self.plan.save_every == 0 or self.step == stop:
                self.save()
            if look and self.plan.look_every and (self.step % self.plan.look_every == 0 or self.step == stop):
                with self.average as model:
                    print(f"{self.plan.stage}: {look(model, self.step)}", flush=True)
        self.average.swap()
        return self.model.eval()

    def _advance(self, loss: Tensor) -> Tensor:
        loss.backward()
        nn.utils.clip_grad_norm_(self.optimiser.parameters.values(), 1.0)
        self.optimiser.step(self.plan.scale(self.step))
        self.average.update(self.step)
        self.step += 1
        return loss.detach()  # no number yet: a GPU need not be waited for

    def save(self) -> None:
        """Write the whole state beside the old one, then put it in its place: a kill leaves one or the other whole."""
        tensors = (
            _prefixed("model", dict(self.model.named_parameters()))
            | _prefixed("average", self.average.mean)
            | self.optimiser.tensors()
        )
        unfinished = self.path.with_suffix(".part")
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in tensors.items()},
            unfinished,
            {"step": str(self.step), "count": str(self.optimiser.count)},
        )
        os.replace(unfinished, self.path)

    def _restore(self) -> None:
        with safe_open(self.path, "pt") as file:
            about = file.metadata()
            parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "first": {}, "second": {}}
            for key in file.keys():  # noqa: SIM118
                part, name = key.split(":", 1)
                parts[part][name] = file.get_tensor(key)
        self.step, self.optimiser.count = int(about["step"]), int(about["count"])
        mine = {
            "model": dict(self.model.named_parameters()),
            "average": self.average.mean,
            "first": self.optimiser.first,
            "second": self.optimiser.second,
        }
        with torch.no_grad():
            for part, tensors in mine.items():
                for name, tensor in tensors.items():
                    tensor.copy_(parts[part][name])


def _prefixed(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}:{name}": tensor for name, tensor in tensors.items()}
