"""Weights in eight-bit floats, as published files have them: plain numbers, or numbers to be multiplied by a scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from ..errors import FluxError
from .packed import Packed

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
LARGEST = 448.0  # of float8_e4m3fn; some versions of PyTorch make NaN of what lies beyond, so it is clamped first
SIDES = ("scale_weight", "scale_input")  # what may stand beside a weight
TINIEST = torch.finfo(torch.float32).tiny  # a smaller scale would lose its own digits
MULTIPLE = 16  # the fp8 product wants both sizes of the weight to be multiples of this


class Fp8(Packed):
    """A weight in fp8 e4m3 or e5m2, with no scale, one scale, or one for each row.

    It is unpacked in front of every product, unless `matmul` is set: then the input is rounded to fp8 as well and the
    product is the device's own in fp8, where it has one (`supports_matmul`). A file that allows this
    (`allows_matmul`) does not switch it on: it is faster and less exact.
    """

    reader = "fp8"

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor | None = None,
        input_scale: Tensor | None = None,
        *,
        matmul: bool = False,
        allows_matmul: bool | None = None,
    ) -> None:
        """`scale` is float32 (1, 1) or (out, 1), `input_scale` float32 (); None stands for one and for unknown."""
        super().__init__()
        self.shape = (weight.shape[0], weight.shape[1])
        self.matmul = matmul
        self.allows_matmul = allows_matmul
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("input_scale", input_scale)
        self._calibrated = input_scale is not None and float(input_scale) != 1.0

    @property
    def scheme(self) -> str:
        return "fp8-matmul" if self.matmul else "fp8"

    @classmethod
    def from_stored(
        cls, weight: Tensor, sides: Mapping[str, Tensor], shape: tuple[int, int], facts: Mapping[str, Any]
    ) -> Fp8:
        if weight.dtype not in FP8 or weight.ndim != 2 or tuple(weight.shape) != tuple(shape):
            raise FluxError(
                f"a weight {list(weight.shape)} of {weight.dtype} is no fp8 matrix of {list(shape)}; "
                "download the file again"
            )
        odd = ", ".join(name[:40] for name in sides if name not in SIDES)
        if odd:
            raise FluxError(
                f"an fp8 weight has {' and '.join(SIDES)} beside it and no {odd}: it is packed by another scheme; "
                "download the file again"
            )
        scale, input_scale = map(sides.get, SIDES)
        return cls(
            weight,
            None if scale is None else _column(scale, "scale_weight", shape[0]),
            None if input_scale is None else _column(input_scale, "scale_input", 1).reshape(()),
            allows_matmul=facts.get("matmul"),
        )

    def stored(self) -> dict[str, Tensor]:
        """ComfyUI's spelling; the `scaled_fp8` marker that goes with scales stands once in a file."""
        named = {"weight": self.weight, "scale_weight": self.scale, "scale_input": self.input_scale}
        if self.scale is not None and self.scale.numel() == 1:
            named["scale_weight"] = self.scale.reshape(())
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def quantise(cls, weight: Tensor, *, matmul: bool = False) -> Fp8:
        """Round a weight to e4m3 with one scale that puts its largest number at the type's largest."""
        amax = float(weight.abs().max()) if weight.numel() else 0.0
        if not math.isfinite(amax):
            raise FluxError("a weight holds NaN or infinity and cannot be quantised; download the model again")
        scale = torch.tensor([[max(amax / LARGEST, TINIEST) if amax else 1.0]], device=weight.device)
        return cls(_round(weight, scale), scale, matmul=matmul)

    def dequantise(self, dtype: torch.dtype) -> Tensor:
        weight = self.weight.to(dtype)  # exact: 16 bits hold every fp8 number
        # A matrix times a float32 matrix is computed in float32 and rounded once, in place.
        return weight if self.scale is None else weight.mul_(self.scale)

    @property
    def fits_matmul(self) -> bool:
        """Whether the sizes are such as the fp8 product takes."""
        return not (self.shape[0] % MULTIPLE or self.shape[1] % MULTIPLE)

    def linear(self, x: Tensor, bias: Tensor | None) -> Tensor:
        if self.matmul and self.fits_matmul and x.numel() and supports_matmul(x.device):
            return self.multiply(x, bias)
        return super().linear(x, bias)

    def multiply(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """(..., in) -> (..., out) with the input rounded to fp8: one scale for it, or one a row if the weight has them.

        The product comes out in the type of x, except that with scales for each row CUDA gives bfloat16 only; it adds
        a bias only to 16 bits. The CPU takes every combination (slowly: for tests).
        """
        rows = x.reshape(-1, self.shape[1])
        by_row = self.scale is not None and self.scale.numel() > 1
        input_scale = self._input_scale(rows, by_row)
        scale = torch.ones((1, 1), device=x.device) if self.scale is None else self.scale
        out_dtype = torch.bfloat16 if by_row else x.dtype
        fused = None if bias is None or out_dtype == torch.float32 else bias.to(out_dtype)
        out = torch._scaled_mm(
            _round(rows, input_scale),
            self.weight.t(),  # column-major, as it must be
            scale_a=input_scale,
            scale_b=scale.t() if by_row else scale.reshape(()),
            bias=fused,
            out_dtype=out_dtype,
            use_fast_accum=True,
        ).to(x.dtype)
        if bias is not None and fused is None:
            out += bias
        return out.view(*x.shape[:-1], self.shape[0])

    def _input_scale(self, rows: Tensor, by_row: bool) -> Tensor:
        """The file's scale; where it has none, or the 1 of an uncalibrated file, what the largest number asks for."""
        if self._calibrated:
            return self.input_scale.expand(rows.shape[0], 1).contiguous() if by_row else self.input_scale
        norm = torch.linalg.vector_norm
        largest = (
            norm(rows, math.inf, dim=1, keepdim=True, dtype=torch.float32)
            if by_row
            else norm(rows, math.inf, dtype=torch.float32)
        )
        return (largest / LARGEST).clamp_min(TINIEST)


def _round(numbers: Tensor, scale: Tensor) -> Tensor:
    """Numbers over their scale as e4m3; what lies beyond its range becomes its largest number."""
    return (numbers.float() / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)


def _column(scale: Tensor, name: str, rows: int) -> Tensor:
    """A stored scale, one or one for each row, as float32 (1, 1) or (rows, 1)."""
    if scale.numel() not in (1, rows) or not scale.is_floating_point():
        raise FluxError(
            f"{name} {list(scale.shape)} of {scale.dtype} is no scale for a weight of {rows} rows: "
            "one number, or one for each row, is needed; download the file again"
        )
    column = scale.float().reshape(-1, 1)
    if not column.isfinite().all():
        raise FluxError(f"{name} holds NaN or infinity; download the file again")
    return column


@cache
def supports_matmul(device: torch.device | str) -> bool:
    """Whether a device multiplies fp8 matrices itself: NVIDIA's since Ada and Hopper (compute capability 8.9)."""
    device = torch.device(device)
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return False
    return torch.cuda.get_device_capability(device) >= (8, 9)
