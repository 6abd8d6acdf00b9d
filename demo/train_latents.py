"""Stage "latents": scenes drawn and encoded once, in shards that are read back in every epoch.

A shard holds latents alone. Its scenes are composed again from the shard's name, so they are always the same, and every
epoch can put new words to them.
"""

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from zlib import crc32

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from .drawing import render
from .scenes import TRAINING, Scene, sample_scene
from .train_tools import ahead

SHARD, CHUNK = 256, 16
Encode = Callable[[Tensor], Tensor]
Draw = Callable[[Scene, int], Image.Image]


@lru_cache(maxsize=2)
def shard_scenes(seed: int, size: int, index: int) -> tuple[Scene, ...]:
    """The scenes of one shard."""
    rng = random.Random(f"{seed} {size} {index}")
    return tuple(sample_scene(rng, TRAINING) for _ in range(SHARD))


def shard_path(folder: Path, seed: int, size: int, index: int) -> Path:
    """Named after the mixture too: with another one the same seed composes other scenes."""
    return folder / f"latents-{crc32(repr(TRAINING).encode()):08x}-{seed}-{size}-{index:04d}.safetensors"


@dataclass(frozen=True)
class _Drawn:
    """Draws the n-th chunk of pictures (CHUNK, size, size, 3) of some shards, in bytes."""

    seed: int
    size: int
    shards: tuple[int, ...]
    draw: Draw

    def __call__(self, index: int) -> Tensor:
        shard, chunk = divmod(index, SHARD // CHUNK)
        scenes = shard_scenes(self.seed, self.size, self.shards[shard])
        return to_bytes(scenes[chunk * CHUNK : (chunk + 1) * CHUNK], self.size, self.draw)


def write_shards(
    encode: Encode, folder: Path, seed: int, size: int, count: int, draw: Draw = render, workers: int = 0
) -> None:
    """Encode the shards that are not there yet; `encode` takes pictures (B, 3, size, size) in -1..1.

    So many worker processes draw ahead (0: this one draws).
    """
    folder.mkdir(parents=True, exist_ok=True)
    missing = tuple(index for index in range(count) if not shard_path(folder, seed, size, index).exists())
    per_shard = SHARD // CHUNK
    chunks = ahead(_Drawn(seed, size, missing, draw), range(len(missing) * per_shard), workers)
    for index in missing:
        path = shard_path(folder, seed, size, index)
        parts = [encode(to_pixels(chunk)).half().cpu() for chunk in islice(chunks, per_shard)]
        unfinished = path.with_suffix(".part")
        save_file({"latents": torch.cat(parts).contiguous()}, unfinished)
        os.replace(unfinished, path)
        print(f"latents: {size} px, shard {index + 1} of {count}", flush=True)


def to_tensor(scenes: Sequence[Scene], size: int) -> Tensor:
    """Scenes drawn as (B, 3, size, size) in -1..1."""
    return to_pixels(to_bytes(scenes, size))


def to_bytes(scenes: Sequence[Scene], size: int, draw: Draw = render) -> Tensor:
    """Scenes drawn as (B, size, size, 3) in 0..255."""
    pictures = [torch.frombuffer(bytearray(draw(scene, size).tobytes()), dtype=torch.uint8) for scene in scenes]
    return torch.stack(pictures).reshape(-1, size, size, 3)


def to_pixels(pictures: Tensor) -> Tensor:
    """Bytes (B, H, W, 3) as (B, 3, H, W) in -1..1."""
    return pictures.permute(0, 3, 1, 2).float() / 127.5 - 1


class Latents:
    """All scenes of one picture size with their latents (n, 16, size / 8, size / 8), in float16."""

    def __init__(self, folder: Path, seed: int, size: int, count: int) -> None:
        self.scenes = [scene for index in range(count) for scene in shard_scenes(seed, size, index)]
        self.latents = torch.cat(
            [load_file(shard_path(folder, seed, size, index))["latents"] for index in range(count)]
        )

    def batch(self, rng: random.Random, count: int) -> tuple[Tensor, list[Scene]]:
        """`count` scenes at random, with their latents in float32."""
        chosen = rng.choices(range(len(self.scenes)), k=count)
        return self.latents[chosen].float(), [self.scenes[index] for index in chosen]
