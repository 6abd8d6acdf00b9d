"""Which class reads which packing; a scheme's module is imported when a file needs it."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

import torch

from ..errors import FluxError
from .packed import Packed

if TYPE_CHECKING:
    from ..weights.files import Stored

READERS = {
    "gguf": ("gguf", "Gguf"),
    "fp8": ("fp8", "Fp8"),
    "bnb-4bit": ("bnb", "Bnb4"),
    "bnb-8bit": ("bnb", "Bnb8"),
    "quanto": ("quanto", "Quanto"),
    "torchao": ("ao", "TorchAo"),
}


def unpack(stored: Stored, device: torch.device | str = "cpu") -> Packed:
    """A packed tensor of a file as a weight that a linear layer can hold; errors name the file and the tensor."""
    module, name = READERS[stored.packing.scheme]
    reader: type[Packed] = getattr(importlib.import_module(f".{module}", __package__), name)
    weight = stored.read()
    sides = {side: tensor.read() for side, tensor in stored.packing.sides.items()}
    try:
        return reader.from_stored(weight, sides, stored.shape, stored.packing.facts).to(device)
    except FluxError as error:
        raise FluxError(f"{stored.file.path}: {stored.name}: {error}") from error
