"""Weights of GGUF files: kept as the file has them, made into numbers when a layer is used."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import FluxError
from .gguf_blocks import FORMATS
from .packed import Packed

# Numbers unpacked at a time: what they take in float32 fits a processor's cache, or a small part of a GPU's memory.
CPU_CHUNK = 1 << 20
GPU_CHUNK = 1 << 23


class Gguf(Packed):
    """A weight in the blocks of a GGUF file: `kind` is ggml's name of their type, such as `Q4_K`."""

    reader = "gguf"

    def __init__(self, weight: Tensor, kind: str, shape: tuple[int, ...]) -> None:
        super().__init__()
        levels = FORMATS[kind].levels
        self.register_buffer("weight", weight)
        self.register_buffer(
            "levels", None if levels is None else torch.tensor(levels, dtype=torch.float32, device=weight.device), False
        )
        self.kind = kind
        self.shape = shape
        self.scheme = f"GGUF {kind}"

    @classmethod
    def from_stored(
        cls, weight: Tensor, sides: Mapping[str, Tensor], shape: tuple[int, ...], facts: Mapping[str, Any]
    ) -> Gguf:
        """From bytes (rows, bytes of a row) and the fact `type`; the rows of `shape` need not be whole blocks."""
        kind = facts.get("type")
        form = FORMATS.get(kind) if isinstance(kind, str) else None
        if form is None:
            raise FluxError(f"a GGUF weight of type {str(kind)[:40]} is not read; {', '.join(FORMATS)} are")
        numbers = math.prod(shape)
        if weight.dtype != torch.uint8 or weight.numel() * form.numbers != numbers * form.size:
            raise FluxError(
                f"a GGUF weight of shape {list(shape)} as {kind} does not go into {list(weight.shape)} "
                f"{str(weight.dtype).removeprefix('torch.')}; the file is damaged"
            )
        return cls(weight, kind, tuple(shape))

    def stored(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        form = FORMATS[self.kind]
        blocks = self.weight.reshape(-1, form.size)
        out = torch.empty(self.shape, dtype=dtype, device=blocks.device)
        numbers = out.view(-1, form.numbers)
        levels = () if self.levels is None else (self.levels,)
        step = (CPU_CHUNK if blocks.device.type == "cpu" else GPU_CHUNK) // form.numbers
        for start in range(0, len(blocks), step):
            form.unpack(blocks[start : start + step], numbers[start : start + step], *levels)
        return out
