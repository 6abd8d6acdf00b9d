"""The schemes that weights can be quantised by when they are loaded, or by a node: one table."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import FluxError
from .fp8 import supports_matmul
from .optional import need
from .packed import Packed


@dataclass(frozen=True)
class Scheme:
    """How a linear layer's weight is stored; `bits` a number counts its scales too."""

    name: str
    title: str
    bits: float
    maker: tuple[str, str]  # module of this package and class
    options: Mapping[str, Any] = field(default_factory=dict)
    library: str = ""  # what it needs beside torch
    extra: str = ""  # of this package, that brings it
    multiplies_fp8: bool = False

    def require(self, device: torch.device | str = "cpu") -> None:
        """A `FluxError` with the remedy where the library is missing or the device cannot compute with it."""
        if self.library:
            need(self.library, self.extra, f"quantising to {self.name}")
        if self.multiplies_fp8 and not supports_matmul(torch.device(device)):
            raise FluxError(
                f"{self.name} needs a GPU that multiplies float8 (NVIDIA Ada, Hopper or newer), and {device} is none; "
                "use fp8, which stores the same weights and computes in the model's own type"
            )

    def unsuitable(self, shape: tuple[int, int]) -> str:
        """Why a weight (out, in) of this shape is to stay as it is; an empty text where it need not."""
        if 0 in shape:
            return "it is empty"
        if self.extra == "quanto":
            from .quanto import unsuitable

            return unsuitable(shape, self.options["kind"])
        return ""

    def make(self, weight: Tensor) -> Packed:
        """Quantise a weight (out, in) where it is; it is not written to."""
        module, name = self.maker
        maker: type[Packed] = getattr(importlib.import_module(f".{module}", __package__), name)
        with torch.no_grad():
            return maker.quantise(weight.detach(), **self.options)


def _bnb(name: str, title: str, bits: float, maker: str, **options: Any) -> Scheme:
    return Scheme(name, title, bits, ("bnb", maker), options, "bitsandbytes", "bitsandbytes")


def _quanto(kind: str, bits: float) -> Scheme:
    name = f"quanto-{kind}"
    return Scheme(
        name, f"optimum-quanto {kind}", bits, ("quanto", "Quanto"), {"kind": kind}, "optimum.quanto", "quanto"
    )


def _torchao(kind: str) -> Scheme:
    name = f"torchao-{kind}"
    return Scheme(name, f"torchao {kind}, weights only", 8, ("ao", "TorchAo"), {"kind": kind}, "torchao", "torchao")


_TABLE = (
    Scheme("fp8", "float8 with a scale", 8, ("fp8", "Fp8")),
    Scheme(
        "fp8-matmul", "float8 with a scale, multiplied as float8", 8, ("fp8", "Fp8"), {"matmul": True},
        multiplies_fp8=True,
    ),
    _bnb("bnb-int8", "bitsandbytes 8 bit", 8, "Bnb8"),
    _bnb("bnb-nf4", "bitsandbytes 4 bit, normal floats", 4.5, "Bnb4", kind="nf4"),
    _bnb("bnb-fp4", "bitsandbytes 4 bit, floats", 4.5, "Bnb4", kind="fp4"),
    _quanto("float8", 8),
    _quanto("int8", 8),
    _quanto("int4", 4.25),
    _torchao("int8"),
    _torchao("float8"),
)  # fmt: skip

SCHEMES: dict[str, Scheme] = {scheme.name: scheme for scheme in _TABLE}


def scheme(name: str) -> Scheme:
    """The scheme of that name."""
    if name not in SCHEMES:
        raise FluxError(f"there is no quantisation {str(name)[:40]!r}; use one of {', '.join(SCHEMES)}")
    return SCHEMES[name]
