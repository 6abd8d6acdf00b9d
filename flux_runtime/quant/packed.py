"""A linear layer whose weight is stored in fewer bits: nothing else of the model knows that it is.

A `Packed` is one stored weight under some scheme; a `PackedLinear` stands where a `nn.Linear` stood and holds one, or
several below each other (q, k and v of a file that keeps them apart, joined without being packed anew).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Packed(nn.Module):
    """A weight (out, in) under some scheme. Its tensors are buffers: they move between devices and are never cast."""

    scheme: str = ""  # what reports call it
    shape: tuple[int, int]
    reader: ClassVar[str] = ""  # its key among the readers of files, which `stored` is written for

    @classmethod
    def from_stored(
        cls, weight: Tensor, sides: Mapping[str, Tensor], shape: tuple[int, int], facts: Mapping[str, Any]
    ) -> Packed:
        """Make one of what a file holds: the weight as stored, the tensors beside it by name, and facts of its header.

        Raises `FluxError` when they do not fit each other.
        """
        raise NotImplementedError

    def stored(self) -> dict[str, Tensor]:
        """What a file holds of it: name endings (`weight`, `scale_weight`, ...) and tensors."""
        raise NotImplementedError

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The weight (out, in) as plain numbers."""
        raise NotImplementedError

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out), in the type of x; schemes with a kernel of their own do better."""
        return F.linear(x, self.dequantise(x.dtype), bias)

    @property
    def nbytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        """Follow the module to another device, not to another type: these numbers mean nothing in any other."""
        for name, buffer in self._buffers.items():
            if buffer is not None:
                moved = fn(buffer)
                self._buffers[name] = moved if moved.dtype == buffer.dtype else buffer.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.scheme}, out={self.shape[0]}, in={self.shape[1]}"


class PackedLinear(nn.Module):
    """Takes the place of a `nn.Linear`: its weight is the packed ones below each other."""

    weight = None  # transformers asks its layers for it, to learn their dtype if it is a tensor

    def __init__(self, packs: Sequence[Packed], bias: Tensor | None = None) -> None:
        super().__init__()
        self.packs = nn.ModuleList(packs)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.in_features = packs[0].shape[1]
        self.out_features = sum(pack.shape[0] for pack in packs)

    def forward(self, x: Tensor) -> Tensor:
        return self.product(x, self.bias)

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x times the weight, plus a bias (out,) or none."""
        if len(self.packs) == 1:
            return self.packs[0].linear(x, bias)
        rows = [pack.shape[0] for pack in self.packs]
        biases = [None] * len(rows) if bias is None else bias.split(rows)
        return torch.cat([pack.linear(x, b) for pack, b in zip(self.packs, biases, strict=True)], dim=-1)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        """The whole weight (out, in) as plain numbers."""
        return torch.cat([pack.dequantise(dtype) for pack in self.packs])


def weight_of(linear: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) of a linear layer, plain or packed, as plain numbers."""
    return linear.dequantise(dtype) if isinstance(linear, PackedLinear) else linear.weight.detach().to(dtype)


def product(linear: nn.Module, x: Tensor) -> Tensor:
    """What a linear layer, plain or packed, makes of x without its bias."""
    return linear.product(x, None) if isinstance(linear, PackedLinear) else F.linear(x, linear.weight)
