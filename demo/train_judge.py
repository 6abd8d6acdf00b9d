"""Trains the judge's eye on rendered scenes only; it never sees a generated picture.

    python -m fluxcanvas.demo.train_judge --steps 3000 --out judge.safetensors

So that "there" means a well-formed thing, some things are badly deformed in training and must be called absent, others
a little and must still be seen; some scenes hold a thing twice, and it must be called doubled.
"""

import argparse
import random
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from .drawing import render
from .judge_model import EYE, SIDE, Answers, Eye, save_eye, to_eye
from .scenes import BACKGROUNDS, COLOR_NAMES, KINDS, Scene, sample_scene
from .train_tools import half_precision

BATCH, PEAK_RATE, WARMUP, COUNTING_RATE = 32, 4e-3, 50, 0.1
IGNORED = -100


@dataclass(frozen=True)
class Truth:
    """What the eye should answer; `known` marks the things whose colour, scale and place can be asked for."""

    background: Tensor
    paper: Tensor
    there: Tensor
    doubled: Tensor
    known: Tensor
    color: Tensor
    scale: Tensor
    place: Tensor


def train(steps: int, seed: int = 3, out: Path = EYE) -> Eye:
    """Train for `steps` batches of 32 fresh scenes and store the eye at `out`; the same seed gives the same weights."""
    torch.manual_seed(seed)
    rng, noise = random.Random(seed), torch.Generator().manual_seed(seed)
    eye = Eye().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(eye.parameters(), PEAK_RATE, weight_decay=1e-3)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = PEAK_RATE * min(1, (step + 1) / WARMUP) * max(0.01, 1 - step / steps)
        pictures, truth = batch(rng, noise)
        with half_precision(torch.device("cpu")):
            answers = eye(pictures.contiguous(memory_format=torch.channels_last))
        loss = loss_of(answers, truth)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if (step + 1) % 200 == 0 or step + 1 == steps:
            print(f"judge: step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
            save_eye(eye, out)
    return teach_counting(eye, rng, noise, max(1, steps // 6), out)


def teach_counting(eye: Eye, rng: random.Random, noise: torch.Generator, steps: int, out: Path) -> Eye:
    """Last, with the rest of the eye as it is, it learns to tell one thing from two of a kind."""
    eye.eval().requires_grad_(False).counter.requires_grad_(True)
    optimiser = torch.optim.Adam(eye.counter.parameters(), COUNTING_RATE)
    for step in range(steps):
        optimiser.param_groups[0]["lr"] = COUNTING_RATE * max(0.01, 1 - step / steps)
        pictures, truth = batch(rng, noise, doubled=0.5)
        there = truth.there > 0
        logits = eye(pictures).doubled[there]
        loss = F.binary_cross_entropy_with_logits(logits, truth.doubled[there])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            print(f"judge: counting, step {step + 1} of {steps}, loss {loss.item():.3f}", flush=True)
    save_eye(eye, out)
    return eye


def batch(rng: random.Random, noise: torch.Generator, doubled: float = 0.16) -> tuple[Tensor, Truth]:
    """Fresh scenes, spoilt in the ways a generator spoils them, and the truth about them.

    The share `doubled` of those with several things shows one kind twice.
    """
    scenes = [_perhaps_doubled(rng, sample_scene(rng), doubled) for _ in range(BATCH)]
    pictures, gone = spoil(to_eye([render(scene) for scene in scenes]), scenes, rng, noise)
    return pictures, truth_of(scenes, gone)


def _perhaps_doubled(rng: random.Random, scene: Scene, share: float) -> Scene:
    if len(scene.things) == 1 or rng.random() > share:
        return scene
    first, second = rng.sample(range(len(scene.things)), 2)
    things = list(scene.things)
    things[second] = replace(
        things[second], kind=things[first].kind, color=rng.choice((things[first].color, things[second].color))
    )
    return replace(scene, things=tuple(things))


def spoil(
    pictures: Tensor, scenes: list[Scene], rng: random.Random, noise: torch.Generator
) -> tuple[Tensor, set[tuple[int, str]]]:
    """Deform one thing in some pictures, then blur, noise, brightness; returns also (picture, kind) of the ruined."""
    axis = (torch.arange(SIDE) + 0.5) / (SIDE / 2) - 1
    straight = torch.cartesian_prod(axis, axis).flip(1).reshape(SIDE, SIDE, 2)
    grid, gone = straight.repeat(len(scenes), 1, 1, 1), set()
    for index, scene in enumerate(scenes):
        fate = rng.random()
        if fate > 0.45:
            continue
        thing, ruined = rng.choice(scene.things), fate < 0.25
        strength = rng.uniform(0.07, 0.12) if ruined else rng.uniform(0, 0.016)
        grid[index] += strength * _warp(thing.box, noise)
        if ruined:
            gone.add((index, thing.kind))
    pictures = F.grid_sample(pictures, grid, padding_mode="border", align_corners=False)
    if rng.random() < 0.6:
        share = rng.uniform(0, 0.6)
        soft = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
        pictures = pictures.lerp(soft, share)
    grain = torch.randn(pictures.shape, generator=noise) * rng.uniform(0, 0.05)
    return pictures + grain + rng.uniform(-0.06, 0.06), gone


def _warp(box: tuple[float, float, float, float], noise: torch.Generator) -> Tensor:
    """A smooth random field of displacements (H, W, 2) around the box, zero elsewhere."""
    coarse = torch.randn(1, 2, 12, 12, generator=noise)
    field = F.interpolate(coarse, size=(SIDE, SIDE), mode="bicubic")[0].permute(1, 2, 0)
    x0, y0, x1, y1 = (int(edge * SIDE) for edge in box)
    mask = torch.zeros(SIDE, SIDE, 1)
    mask[max(0, y0 - 4) : y1 + 4, max(0, x0 - 4) : x1 + 4] = 1
    return field * mask


def truth_of(scenes: list[Scene], gone: set[tuple[int, str]]) -> Truth:
    """A doubled thing has no one colour or place; a ruined one does not count."""
    count, kinds = len(scenes), len(KINDS)
    truth = Truth(
        torch.tensor([BACKGROUNDS.index(scene.background) for scene in scenes]),
        torch.tensor([COLOR_NAMES.index(scene.paper) if scene.paper else IGNORED for scene in scenes]),
        torch.zeros(count, kinds),
        torch.zeros(count, kinds),
        torch.zeros(count, kinds, dtype=torch.bool),
        torch.full((count, kinds), IGNORED),
        torch.zeros(count, kinds),
        torch.zeros(count, kinds, 2),
    )
    for index, scene in enumerate(scenes):
        for thing in scene.things:
            kind = KINDS.index(thing.kind)
            copies, ruined = sum(other.kind == thing.kind for other in scene.things), (index, thing.kind) in gone
            truth.there[index, kind] = float(copies > ruined)
            truth.doubled[index, kind] = float(copies - ruined == 2)
            truth.known[index, kind] = copies == 1 and not ruined
            truth.color[index, kind], truth.scale[index, kind] = COLOR_NAMES.index(thing.color), thing.scale
            truth.place[index, kind] = torch.tensor([thing.x, thing.y])
    return truth


def loss_of(answers: Answers, truth: Truth) -> Tensor:
    """The sum of all questions, each only over what can be asked."""
    known = truth.known
    loss = F.cross_entropy(answers.background, truth.background)
    loss = loss + 6 * F.binary_cross_entropy_with_logits(answers.there, truth.there)
    loss = loss + F.cross_entropy(answers.color[known], truth.color[known])
    loss = loss + 8 * (answers.place[known] - truth.place[known]).abs().mean()
    loss = loss + 2 * (answers.scale[known] - truth.scale[known]).abs().mean()
    if (truth.paper >= 0).any():
        loss = loss + 0.5 * F.cross_entropy(answers.paper, truth.paper, ignore_index=IGNORED)
    return loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000, help="batches of 32 scenes")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=EYE)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.steps, args.seed, args.out)


if __name__ == "__main__":
    main()
