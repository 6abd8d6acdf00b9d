"""Weights as torchao has them (weight only): int8 or float8 with a float32 scale for each row, or each group of a row.

The library quantises; multiplying is torch's own matrix product over unpacked numbers, which takes as long as the
library's and is nearer to the exact result in bfloat16. So a file that is packed already needs no library at all.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import FluxError
from .optional import need
from .packed import Packed

if TYPE_CHECKING:
    from ..weights.files import LazyTensor

EXTRA = "torchao"

# What files call them beside the linear layer's name; the header's metadata names the type under `<layer>.weight`.
MAIN = "_weight_qdata"
RECOGNISED = {MAIN: ("_weight_scale", "_weight_zero_point")}
TYPES = ("Int8Tensor", "Float8Tensor")
INPUT_SCALE = "_weight_act_pre_scale"  # multiplies the input: not read

_KINDS = {torch.int8: "int8", torch.float8_e4m3fn: "float8", torch.float8_e5m2: "float8"}


class TorchAo(Packed):
    """Bytes (out, in), minus a zero point where there is one, times a scale (out, groups of a row), or one for all."""

    reader = "torchao"

    def __init__(self, data: Tensor, scale: Tensor, zero_point: Tensor | None = None) -> None:
        super().__init__()
        self.register_buffer("data", data)
        self.register_buffer("scale", scale)
        self.register_buffer("zero_point", zero_point)
        self.shape = tuple(data.shape)
        self.kind = _KINDS[data.dtype]
        self.scheme = f"torchao-{self.kind}"
        self._centred = zero_point is None or not zero_point.any().item()

    @classmethod
    def from_stored(
        cls, weight: Tensor, sides: Mapping[str, Tensor], shape: tuple[int, int], facts: Mapping[str, Any]
    ) -> TorchAo:
        """`facts` may name the library's `type` of tensor."""
        if facts.get("type", TYPES[0]) not in TYPES:
            raise FluxError(
                f"a torchao weight of type {str(facts['type'])[:40]} is not read; {' and '.join(TYPES)} are: "
                "load the bf16 file and quantise it to torchao-int8 or torchao-float8"
            )
        scale, zero_point = sides.get("_weight_scale"), sides.get("_weight_zero_point")
        fits = weight.dtype in _KINDS and weight.dim() == 2 and tuple(weight.shape) == tuple(shape)
        fits = fits and scale is not None and scale.is_floating_point() and _divides(scale, weight)
        if not fits or (zero_point is not None and zero_point.numel() != scale.numel()):
            raise FluxError(
                f"a torchao weight of shape {list(shape)} does not go with {list(weight.shape)} "
                f"{str(weight.dtype).removeprefix('torch.')} and its scales; the file is damaged"
            )
        return cls(weight, scale, zero_point)

    def stored(self) -> dict[str, Tensor]:
        tensors = {MAIN: self.data, "_weight_scale": self.scale, "_weight_zero_point": self.zero_point}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        rows, groups = self.scale.shape
        numbers = self.data.to(dtype).view(rows, groups, -1)
        if not self._centred:
            numbers = numbers - self.zero_point.view(rows, groups, 1).to(dtype)
        return numbers.mul_(self.scale[..., None]).view(self.shape)  # rounded once, from the float32 scale

    @classmethod
    def quantise(cls, weight: Tensor, kind: str = "int8") -> TorchAo:
        """Quantise a weight (out, in) as the library does, a scale for each row: `int8` or `float8`."""
        library = need("torchao", EXTRA, "quantising with torchao").quantization
        name = {"int8": "Int8Tensor", "float8": "Float8Tensor"}[kind]
        if not hasattr(library, name):
            raise FluxError(f'this torchao is too old to have {name}: pip install --upgrade "fluxcanvas[{EXTRA}]"')
        packed = getattr(library, name).from_hp(weight.detach(), granularity=library.PerRow())
        scale = packed.scale.view(len(weight), 1)
        # Rows of zeros become 0 / 0 in float8; all bits zero is zero in both kinds.
        packed.qdata.view(torch.uint8).masked_fill_(scale == 0, 0)
        return cls(packed.qdata, scale, getattr(packed, "zero_point", None))


def _divides(scale: Tensor, weight: Tensor) -> bool:
    """Whether there is a scale for the whole weight, for each row, or for each of equal groups of a row."""
    if scale.dim() != 2 or 0 in scale.shape or 0 in weight.shape:
        return False
    rows, groups = scale.shape
    return (rows == weight.shape[0] and weight.shape[1] % groups == 0) or (rows, groups) == (1, 1)


def gathered(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> dict[str, LazyTensor]:
    """A file's tensors with torchao's put together, as `<layer>.weight`."""
    from ..weights.files import LazyTensor, Packing, Stored

    left, whole = dict(tensors), {}
    for name in (n for n in tensors if n.endswith(f".{MAIN}")):
        layer = name.removesuffix(f".{MAIN}")
        data = left.pop(name).sources[0]
        if f"{layer}.{INPUT_SCALE}" in left:
            raise FluxError(f"{layer} scales its input as torchao's AWQ does, which is not read; use the bf16 file")
        sides = {side: left.pop(f"{layer}.{side}").sources[0] for side in RECOGNISED[MAIN] if f"{layer}.{side}" in left}
        packing = Packing("torchao", sides, _facts(metadata.get(f"{layer}.weight", "")))
        whole[f"{layer}.weight"] = LazyTensor.whole(Stored(name, data.dtype, data.shape, data.file, packing))
    return {**left, **whole}


def _facts(text: str) -> dict[str, Any]:
    """The type that the header gives a weight, if it does."""
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    kind = raw.get("_type") if isinstance(raw, dict) else None
    return {"type": kind} if isinstance(kind, str) else {}
