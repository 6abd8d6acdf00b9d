"""bitsandbytes' weights: 4 bits (nf4, fp4) in blocks with a scale each, and 8 bits (LLM.int8) with a scale a row.

Everything is held in plain buffers under the names that bitsandbytes, diffusers and transformers give them in files;
the arithmetic is bitsandbytes' own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import FluxError
from .optional import need
from .packed import Packed

KINDS = ("nf4", "fp4")
BLOCKSIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE = "weight.quant_state.bitsandbytes__"  # and the kind: the name of the JSON beside a 4-bit weight
MAX_STATE = 4096  # bytes of that JSON; real ones have 200
FLOATS = ("float16", "bfloat16", "float32")
THRESHOLD = 6.0  # inputs from here on are multiplied in full precision by LLM.int8
AGAIN = "download the file again"


def _library() -> ModuleType:
    return need("bitsandbytes", "bitsandbytes", "a weight quantised with bitsandbytes")


@dataclass(frozen=True)
class FourBit:
    """How a 4-bit weight is packed; `nested_blocksize` is 0 unless the scales of its blocks are quantised as well."""

    kind: str
    shape: tuple[int, int]
    blocksize: int
    dtype: str  # of the weight before it was packed
    nested_blocksize: int = 0
    nested_dtype: str = "float32"
    offset: float = 0.0

    @classmethod
    def parse(cls, text: Tensor, nbytes: int) -> FourBit:
        """Read the JSON (uint8) beside a packed weight of so many bytes; a `FluxError` unless all of it makes sense."""
        raw = _json(text)
        state = cls(
            raw.get("quant_type"),
            tuple(raw["shape"]) if isinstance(raw.get("shape"), list) else (),
            raw.get("blocksize"),
            raw.get("dtype"),
            raw.get("nested_blocksize", 0),
            raw.get("nested_dtype", "float32"),
            raw.get("nested_offset", 0.0),
        )
        wrong = state._wrong(nbytes)
        if wrong:
            raise FluxError(f"bitsandbytes' description of it has {wrong}, which cannot be; {AGAIN}")
        return replace(state, offset=float(state.offset))

    def _wrong(self, nbytes: int) -> str:
        """What of it cannot be, with a weight of so many bytes; an empty text if nothing."""
        sizes = [size for size in self.shape if type(size) is int and 0 < size < 2**40]
        checks = (
            ("quant_type", self.kind, self.kind in KINDS),
            ("shape", self.shape, len(self.shape) == len(sizes) == 2 and math.prod(sizes) == 2 * nbytes),
            ("blocksize", self.blocksize, _is_one_of(self.blocksize, BLOCKSIZES)),
            ("dtype", self.dtype, self.dtype in FLOATS),
            ("nested_blocksize", self.nested_blocksize, _is_one_of(self.nested_blocksize, (0, *BLOCKSIZES))),
            ("nested_dtype", self.nested_dtype, self.nested_dtype in FLOATS),
            ("nested_offset", self.offset, _is_number(self.offset)),
        )
        return next((f"{name} {str(value)[:60]}" for name, value, good in checks if not good), "")

    @property
    def blocks(self) -> int:
        return -(-math.prod(self.shape) // self.blocksize)

    @property
    def sides(self) -> dict[str, tuple[int, tuple[torch.dtype, ...]]]:
        """The tensors that belong beside the weight: how many numbers each has, and in which types it may come."""
        floats = (torch.float32, torch.float16, torch.bfloat16)
        if not self.nested_blocksize:
            return {"weight.absmax": (self.blocks, floats), "weight.quant_map": (16, floats)}
        return {
            "weight.absmax": (self.blocks, (torch.uint8,)),
            "weight.quant_map": (16, floats),
            "weight.nested_absmax": (-(-self.blocks // self.nested_blocksize), floats),
            "weight.nested_quant_map": (256, floats),
        }


def _is_one_of(value: Any, choices: tuple[int, ...]) -> bool:
    return type(value) is int and value in choices


def _is_number(value: Any) -> bool:
    """Whether it is finite in float32, the type it is used in."""
    return type(value) in (int, float) and abs(value) < torch.finfo(torch.float32).max


def _json(text: Tensor) -> dict[str, Any]:
    if text.dtype != torch.uint8 or text.numel() > MAX_STATE:
        raise FluxError(f"bitsandbytes' description of it is no short text; {AGAIN}")
    try:
        raw = json.loads(bytes(text.flatten().tolist()))
    except (ValueError, RecursionError) as error:
        raise FluxError(f"bitsandbytes' description of it is not JSON; {AGAIN}") from error
    if not isinstance(raw, dict):
        raise FluxError(f"bitsandbytes' description of it is not a JSON object; {AGAIN}")
    return raw


class Bnb4(Packed):
    """A weight in nf4 or fp4: two numbers a byte, the first in the high half, each an index into a table."""

    reader = "bnb-4bit"

    def __init__(self, weight: Tensor, state: FourBit, sides: Mapping[str, Tensor]) -> None:
        """`weight` uint8 (out * in / 2, 1); `sides` as `FourBit.sides` lists them."""
        super().__init__()
        self.state = state
        self.shape = state.shape
        self.kind = state.kind
        self.scheme = f"bnb-{self.kind}"
        self.register_buffer("weight", weight)
        self.register_buffer("absmax", sides["weight.absmax"])
        self.register_buffer("code", sides["weight.quant_map"])
        self.register_buffer("nested_absmax", sides.get("weight.nested_absmax"))
        self.register_buffer("nested_code", sides.get("weight.nested_quant_map"))
        self.register_buffer("offset", torch.tensor(state.offset, device=weight.device))

    @classmethod
    def from_stored(
        cls, weight: Tensor, sides: Mapping[str, Tensor], shape: tuple[int, int], facts: Mapping[str, Any]
    ) -> Bnb4:
        names = [STATE + kind for kind in KINDS if STATE + kind in sides]
        if len(names) != 1:
            raise FluxError(
                f"a 4-bit weight needs one description by bitsandbytes beside it, not {len(names)}; {AGAIN}"
            )
        state = FourBit.parse(sides[names[0]], weight.nbytes)
        if state.shape != tuple(shape) or names[0] != STATE + state.kind:
            raise FluxError(f"bitsandbytes describes a {state.kind} weight of {list(state.shape)} in it; {AGAIN}")
        packed = weight.contiguous().view(-1).view(torch.uint8).view(-1, 1)
        return cls(packed, state, _checked(state, sides))

    def stored(self) -> dict[str, Tensor]:
        """bitsandbytes' own layout, as diffusers and transformers read it."""
        state = self._quant_state(getattr(torch, self.state.dtype), self.shape).as_dict(packed=True)
        return {"weight": self.weight, **{f"weight.{name}": tensor for name, tensor in state.items()}}

    @classmethod
    def quantise(cls, weight: Tensor, *, kind: str = "nf4", blocksize: int = 64, double: bool = False) -> Bnb4:
        """Pack a weight; `double` packs the scales of the blocks as well, which saves 0.4 of 4.5 bits a number."""
        _refuse_unfit(weight)
        if kind not in KINDS or blocksize not in BLOCKSIZES[1:]:
            raise FluxError(f"4 bits are {' or '.join(KINDS)} in blocks of 64 to 4096, not {kind} in {blocksize}")
        if weight.numel() % 2:
            raise FluxError(f"a weight of {list(weight.shape)} has an odd number of numbers: 4 bits need pairs")
        plain = weight if str(weight.dtype).removeprefix("torch.") in FLOATS else weight.float()
        packed, state = _library().functional.quantize_4bit(
            plain.contiguous(), blocksize=blocksize, compress_statistics=double, quant_type=kind
        )
        sides = {"weight.absmax": state.absmax, "weight.quant_map": state.code}
        nested: dict[str, Any] = {}
        if state.state2 is not None:
            sides |= {"weight.nested_absmax": state.state2.absmax, "weight.nested_quant_map": state.state2.code}
            nested = {"nested_blocksize": state.state2.blocksize, "offset": float(state.offset)}
        dtype = str(plain.dtype).removeprefix("torch.")
        return cls(packed, FourBit(kind, tuple(weight.shape), blocksize, dtype, **nested), sides)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        # The CPU kernel reads wrong scales where a row does not hold whole blocks; as one long row it is right.
        whole = self.shape[1] % self.state.blocksize == 0
        flat = self._quant_state(dtype, self.shape if whole else (1, math.prod(self.shape)))
        return _library().functional.dequantize_4bit(self.weight, flat).reshape(self.shape)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """bitsandbytes' kernel on a GPU; on the CPU it does no more than unpack and multiply, with the fault above."""
        known = self.shape[1] % self.state.blocksize == 0 and self.state.nested_blocksize in (0, 256)
        if x.device.type == "cpu" or not known:
            return super().linear(x, bias)
        return self.multiply(x, bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """bitsandbytes' own product (..., in) -> (..., out); rows must hold whole blocks."""
        state = self._quant_state(x.dtype, self.shape)
        bias = None if bias is None else bias.to(x.dtype)
        return _library().matmul_4bit(x, self.weight.t(), quant_state=state, bias=bias)

    def _quant_state(self, dtype: torch.dtype, shape: tuple[int, int]) -> Any:
        """bitsandbytes' object for these buffers, unpacking into a type and shape."""
        make, nested = _library().functional.QuantState, None
        if self.state.nested_blocksize:
            nested = make(
                absmax=self.nested_absmax,
                blocksize=self.state.nested_blocksize,
                code=self.nested_code,
                dtype=getattr(torch, self.state.nested_dtype),
            )
        return make(
            absmax=self.absmax,
            shape=torch.Size(shape),
            code=self.code,
            blocksize=self.state.blocksize,
            quant_type=self.state.kind,
            dtype=dtype,
            offset=self.offset if nested else None,
            state2=nested,
        )


def _checked(state: FourBit, sides: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors beside a 4-bit weight, each of the size its description asks for: kernels read by it unchecked."""
    lost = [name for name in state.sides if name not in sides]
    if lost:
        raise FluxError(f"a {state.kind} weight lacks {', '.join(lost)} beside it; {AGAIN}")
    found = {}
    for name, (count, dtypes) in state.sides.items():
        tensor = sides[name]
        if tensor.numel() != count or tensor.dtype not in dtypes:
            raise FluxError(f"{name} has {tensor.numel()} numbers of {tensor.dtype} where {count} were due; {AGAIN}")
        plain = tensor.contiguous().view(-1)
        if tensor.is_floating_point():
            plain = plain.float()
            if not plain.isfinite().all():
                raise FluxError(f"{name} holds NaN or infinity; {AGAIN}")
        found[name] = plain
    table = _library().functional.get_4bit_type(state.kind, device=found["weight.quant_map"].device)
    if not torch.allclose(found["weight.quant_map"], table, atol=1e-3):
        raise FluxError(
            f"weight.quant_map is not bitsandbytes' table of {state.kind}, the only one it unpacks; {AGAIN}"
        )
    return found


def _refuse_unfit(weight: Tensor) -> None:
    if weight.ndim != 2 or not weight.is_floating_point():
        raise FluxError(f"only a matrix of plain numbers can be quantised, not {list(weight.shape)} of {weight.dtype}")
    if not weight.isfinite().all():
        raise FluxError("a weight holds NaN or infinity and cannot be quantised; download the model again")


class Bnb8(Packed):
    """A weight in int8 with the largest number of each row (`SCB`) as its scale: number = int8 * SCB / 127."""

    reader = "bnb-8bit"
    scheme = "bnb-int8"

    def __init__(self, weight: Tensor, scale: Tensor, threshold: float = THRESHOLD) -> None:
        """`weight` int8 (out, in), `scale` float32 (out,); inputs from `threshold` on are never rounded."""
        super().__init__()
        self.shape = (weight.shape[0], weight.shape[1])
        self.threshold = threshold
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @classmethod
    def from_stored(
        cls, weight: Tensor, sides: Mapping[str, Tensor], shape: tuple[int, int], facts: Mapping[str, Any]
    ) -> Bnb8:
        if weight.dtype != torch.int8 or weight.ndim != 2 or tuple(weight.shape) != tuple(shape):
            raise FluxError(f"{list(weight.shape)} of {weight.dtype} is no int8 matrix of {list(shape)}; {AGAIN}")
        scale, layout = sides.get("SCB"), sides.get("weight_format")
        if scale is None or scale.numel() != shape[0] or not scale.is_floating_point() or not scale.isfinite().all():
            raise FluxError(f"an int8 weight of {shape[0]} rows needs as many finite numbers in SCB; {AGAIN}")
        if layout is not None and (layout.numel() != 1 or int(layout) != 0):
            raise FluxError(
                "an int8 weight is stored in an order made for one GPU (weight_format is not 0); "
                "save the model again with a newer bitsandbytes, or use another file of it"
            )
        threshold = facts.get("threshold", THRESHOLD)
        if not _is_number(threshold) or threshold < 0:
            raise FluxError(f"{str(threshold)[:40]} is no size from which inputs are not rounded; {AGAIN}")
        _library()
        return cls(weight.contiguous(), scale.float().reshape(-1), threshold)

    def stored(self) -> dict[str, Tensor]:
        """bitsandbytes' own layout, as diffusers and transformers read it."""
        return {"weight": self.weight, "SCB": self.scale, "weight_format": torch.zeros((), dtype=torch.uint8)}

    @classmethod
    def quantise(cls, weight: Tensor, *, threshold: float = THRESHOLD) -> Bnb8:
        """Round each row of a weight, by way of float16 as bitsandbytes does."""
        half = weight.to(torch.float16).contiguous()
        _refuse_unfit(half)
        packed, scale, _ = _library().functional.int8_vectorwise_quant(half)
        return cls(packed, scale.float(), threshold)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        return _library().functional.int8_vectorwise_dequant(self.weight, self.scale).to(dtype)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """LLM.int8 on a GPU; on the CPU the weight is unpacked, which does not round the input (half the error)."""
        return super().linear(x, bias) if x.device.type == "cpu" or not x.numel() else self.multiply(x, bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """LLM.int8, (..., in) -> (..., out): each row of the input is rounded to int8, columns with large numbers not.

        The steps of `bitsandbytes.matmul`, which says at every call that it casts to float16.
        """
        rows = x.reshape(-1, self.shape[1])
        quantise = _library().functional.int8_vectorwise_quant
        rounded, scale, outliers = quantise(rows.to(torch.float16), threshold=self.threshold)
        bias = None if bias is None else bias.to(x.dtype)
        out, _ = torch.ops.bitsandbytes.int8_mixed_scaled_mm(
            rows, rounded, self.weight, scale, self.scale, outliers, bias
        )
        return out.view(*x.shape[:-1], self.shape[0])
