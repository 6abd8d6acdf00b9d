"""Weights as optimum-quanto has them: float8 or int8 with a scale for each row, int4 and int2 with more for each group.

The library quantises. Multiplying is torch's own matrix product over unpacked numbers: the library does just that too,
but for its int8 kernel on CPUs, which takes three times as long for more than a few tokens, and its int4 unpacking,
which compiles C++ for a minute on first use. So a file that is packed already needs no library at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import FluxError
from .optional import need
from .packed import Packed

if TYPE_CHECKING:
    from ..weights.files import LazyTensor

EXTRA = "quanto"
GROUP = 128  # numbers that share scale and shift in int4, where the row divides into such groups

# What files call them beside the linear layer's name; input_scale and output_scale are 1 unless activations are packed.
BYTES, BITS = "weight._data", "weight._data._data"
RECOGNISED = {BYTES: ("weight._scale",), BITS: ("weight._scale", "weight._shift")}
SPARE = ("input_scale", "output_scale")

EMBEDDINGS = ("shared.weight", "encoder.embed_tokens.weight")  # of T5, as wide as the model
WIDE = (".o", ".wo")  # its layers that give the model's width; all others take it

_BYTE_TYPES = {torch.int8, torch.float8_e4m3fn, torch.float8_e5m2}


class Quanto(Packed):
    """Rows of bytes times a scale, or groups of a row in 4 (or 2) bits times a scale minus a shift.

    Groups lie below each other; a packed byte holds a number of the upper half of them in its low bits and one of the
    lower half in its high bits (of the four quarters, in 2 bits).
    """

    reader = "quanto"

    def __init__(self, data: Tensor, scale: Tensor, shift: Tensor | None, shape: tuple[int, int]) -> None:
        super().__init__()
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.shape = shape
        self.scheme = f"quanto-{self.kind}"

    @property
    def kind(self) -> str:
        if self.shift is not None:
            return f"int{self._bits}"
        return "int8" if self.data.dtype == torch.int8 else "float8"

    @property
    def _groups(self) -> int:
        return math.prod(self.shape) // self.data.shape[1]

    @property
    def _bits(self) -> int:
        return _bits(self._groups, self.data.shape[0])

    @classmethod
    def from_stored(
        cls, weight: Tensor, sides: Mapping[str, Tensor], shape: tuple[int, int], facts: Mapping[str, Any]
    ) -> Quanto:
        scale, shift = sides.get("weight._scale"), sides.get("weight._shift")
        packed = shift is not None
        fits = scale is not None and weight.dim() == 2 and 0 not in weight.shape
        if fits and packed:
            groups = math.prod(shape) // weight.shape[1]
            fits = (
                weight.dtype == torch.uint8
                and groups * weight.shape[1] == math.prod(shape)
                and groups % shape[0] == 0
                and weight.shape[0] in (math.ceil(groups / 2), math.ceil(groups / 4))
                and scale.numel() == shift.numel() == groups
            )
        elif fits:
            fits = weight.dtype in _BYTE_TYPES and tuple(weight.shape) == tuple(shape)
            fits = fits and scale.numel() in (1, shape[0])
        if not fits or not scale.is_floating_point():
            raise FluxError(
                f"a quanto weight of shape {list(shape)} does not go with {list(weight.shape)} "
                f"{str(weight.dtype).removeprefix('torch.')} and its scales; the file is damaged"
            )
        return cls(weight, scale, shift, tuple(shape))

    def stored(self) -> dict[str, Tensor]:
        if self.shift is None:
            return {BYTES: self.data, "weight._scale": self.scale}
        return {BITS: self.data, "weight._scale": self.scale, "weight._shift": self.shift}

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        if self.shift is None:
            return self.data.to(dtype).mul_(self.scale)  # rounded once, even where the scale has more digits
        shape = (self._groups, 1)
        numbers = self._unpacked().float().mul_(self.scale.view(shape)).sub_(self.shift.view(shape))
        return numbers.to(dtype).view(self.shape)

    def _unpacked(self) -> Tensor:
        """(groups, numbers of a group) of 0 to 15 (or 3)."""
        bits = self._bits
        parts = [(self.data >> shift) & (2**bits - 1) for shift in range(0, 8, bits)]
        return torch.cat(parts)[: self._groups]

    @classmethod
    def quantise(cls, weight: Tensor, kind: str = "float8") -> Quanto:
        """Quantise a weight (out, in) as the library does, in the weight's own dtype: `float8`, `int8` or `int4`."""
        library = need("optimum.quanto", EXTRA, "quantising with quanto")
        weight, shape = weight.detach(), tuple(weight.shape)
        qtype = library.qtypes[{"float8": "qfloat8"}.get(kind, f"q{kind}")]
        if kind == "int4":
            return cls._in_groups(library, weight, qtype, shape)
        scale = _above_zero(library.AbsmaxOptimizer()(weight, qtype=qtype, axis=0))
        packed = library.quantize_weight(weight, qtype=qtype, axis=0, scale=scale, optimized=False)
        return cls(packed._data, packed._scale, None, shape)

    @classmethod
    def _in_groups(cls, library: Any, weight: Tensor, qtype: Any, shape: tuple[int, int]) -> Quanto:
        group = group_size(shape)
        scale, shift = library.MaxOptimizer()(weight, qtype=qtype, axis=0, group_size=group)
        packed = library.quantize_weight(
            weight, qtype=qtype, axis=0, scale=_above_zero(scale), shift=shift, group_size=group, optimized=False
        )
        return cls(packed._data._data, packed._scale, packed._shift, shape)


def _bits(groups: int, rows: int) -> int:
    """Bits of a number, where so many groups lie in so many rows of bytes."""
    return 4 if rows == math.ceil(groups / 2) else 2


def group_size(shape: tuple[int, int]) -> int | None:
    """Numbers of a row that share a scale in int4, as the library chooses them; None: the whole row does."""
    columns = shape[1]
    sizes = range(GROUP, 0, -32) if columns > GROUP else ()
    return next((size for size in sizes if columns % size == 0), None)


def unsuitable(shape: tuple[int, int], kind: str) -> str:
    """Why the library cannot quantise a weight of this shape (well); an empty text where it can."""
    if shape[0] == 1:
        return "it has a single row"
    if kind == "int4" and shape[1] > GROUP and group_size(shape) is None:
        return f"its rows of {shape[1]} do not divide into groups for int4"
    return ""


def _above_zero(scale: Tensor) -> Tensor:
    """Rows of zeros would be 0 / 0; with any other scale they stay zeros."""
    return scale.masked_fill(scale == 0, 1)


def gathered(tensors: Mapping[str, LazyTensor]) -> dict[str, LazyTensor]:
    """A file's tensors with quanto's put together, as `<layer>.weight`."""
    from ..weights.files import LazyTensor, Packing, Stored

    left, whole = dict(tensors), {}
    for name in tensors:
        main = next((ending for ending in (BITS, BYTES) if name.endswith(f".{ending}")), None)
        if main is None:
            continue
        layer = name.removesuffix(f".{main}")
        data = left.pop(name).sources[0]
        sides = {side: left.pop(f"{layer}.{side}").sources[0] for side in RECOGNISED[main] if f"{layer}.{side}" in left}
        for spare in SPARE:
            left.pop(f"{layer}.{spare}", None)
        shape, kind = data.shape, "int8" if data.dtype == "I8" else "float8"
        if main == BITS and "weight._scale" in sides and len(data.shape) == 2:
            groups = sides["weight._scale"].parameters
            shape = _shape(layer, groups, groups * data.shape[1], tensors)
            kind = f"int{_bits(groups, data.shape[0])}"
        packing = Packing("quanto", sides, {"kind": kind})
        whole[f"{layer}.weight"] = LazyTensor.whole(Stored(name, data.dtype, shape, data.file, packing))
    return {**left, **whole}


def _shape(layer: str, groups: int, numbers: int, tensors: Mapping[str, LazyTensor]) -> tuple[int, int]:
    """The shape of a 4-bit weight, which its file does not tell: as many rows as its bias.

    T5 has no biases; there either rows or columns are the width of the model.
    """
    embedding = next((name for name in EMBEDDINGS if name in tensors), None)
    rows = groups
    if f"{layer}.bias" in tensors:
        rows = tensors[f"{layer}.bias"].shape[0]
    elif embedding and ".block." in layer:
        width = max(tensors[embedding].shape[-1], 1)
        rows = width if layer.endswith(WIDE) else numbers // width
    return rows, numbers // max(rows, 1)
