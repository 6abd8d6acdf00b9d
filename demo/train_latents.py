"""Stage "latents": scenes drawn and encoded once, in shards that are read back in every epoch.

A shard holds latents alone. Its scenes are composed again from the shard's name, so they are always the same, and every
epoch can put new words to them.
"""

import os
import random
from collections.abc import Callable
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from .drawing import render
from .scenes import TRAINING, Scene, sample_scene

SHARD = 256
Encode = Callable[[Tensor], Tensor]
Draw = Callable[[Scene, int], Image.Image]


def shard_scenes(seed: int, size: int, index: int) -> list[Scene]:
    """The scenes of one shard."""
    rng = random.Random(f"{seed} {size} {index}")
    return [sample_scene(rng, TRAINING) for _ in range(SHARD)]


def shard_path(folder: Path, seed: int, size: int, index: int) -> Path:
    return folder / f"latents-{seed}-{size}-{index:04d}.safetensors"


def write_shards(encode: Encode, folder: Path, seed: int, size: int, count: int, draw: Draw = render) -> None:
    """Encode the shards that are not there yet; `encode` takes pictures (B, 3, size, size) in -1..1."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        path = shard_path(folder, seed, size, index)
        if path.exists():
            continue
        batches = _chunks(shard_scenes(seed, size, index), 16)
        parts = [encode(to_tensor(scenes, size, draw)).half().cpu() for scenes in batches]
        unfinished = path.with_suffix(".part")
        save_file({"latents": torch.cat(parts).contiguous()}, unfinished)
        os.replace(unfinished, path)
        print(f"latents: {size} px, shard {index + 1} of {count}", flush=True)


def to_tensor(scenes: list[Scene], size: int, draw: Draw = render) -> Tensor:
    """Scenes drawn as (B, 3, size, size) in -1..1."""
    pictures = [torch.frombuffer(bytearray(draw(scene, size).tobytes()), dtype=torch.uint8) for scene in scenes]
    return torch.stack(pictures).reshape(-1, size, size, 3).permute(0, 3, 1, 2).float() / 127.5 - 1


def _chunks(items: list[Scene], length: int) -> list[list[Scene]]:
    return [items[start : start + length] for start in range(0, len(items), length)]


class Latents:
    """All scenes of one picture size with their latents (n, 16, size / 8, size / 8), in float16."""

    def __init__(self, folder: Path, seed: int, size: int, count: int) -> None:
        self.scenes = [scene for index in range(count) for scene in shard_scenes(seed, size, index)]
        self.latents = torch.cat(
            [load_file(shard_path(folder, seed, size, index))["latents"] for index in range(count)]
        )

    def batch(self, rng: random.Random, count: int) -> tuple[Tensor, list[Scene]]:
        """`count` scenes at random, with their latents in float32."""
        chosen = [rng.randrange(len(self.scenes)) for _ in range(count)]
        return self.latents[chosen].float(), [self.scenes[index] for index in chosen]
