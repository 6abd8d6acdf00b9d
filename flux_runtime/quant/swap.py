"""Quantising a model: a copy of it that shares every tensor but the linear layers' weights, which are packed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import FluxError
from .fp8 import Fp8
from .packed import Packed, PackedLinear
from .schemes import Scheme
from .schemes import scheme as scheme_of

# What stays as it is unless asked for: name or pattern -> why. Together 1 in 200 of FLUX.1's weights; packing them too
# multiplied the velocity's error by 10 (nf4, random weights of width 1536) and by 1.2 (the demo model, width 192).
KEPT: dict[str, str] = {
    "img_in": "all of the canvas passes through it, and it is tiny",
    "txt_in": "all of the text passes through it",
    "time_in": "steers every modulation",
    "guidance_in": "steers every modulation",
    "vector_in": "steers every modulation",
    "final_layer": "nothing behind it evens out its errors, and it is tiny",
}
OVERFLOWS = "*.wo"  # T5's second feed-forward matrix: its products exceed float16, where it must stay float32


@dataclass(frozen=True)
class Summary:
    """What became of a model's linear layers; errors are of the weights, ||packed - plain|| / ||plain||."""

    scheme: str
    layers: int = 0
    already: int = 0  # layers that were stored so before
    kept: Mapping[str, str] = field(default_factory=dict)  # name -> why it is as it was
    bytes_before: int = 0  # of the weights of the layers that were packed
    bytes_after: int = 0
    mean_error: float = 0.0
    largest_error: float = 0.0
    largest: str = ""  # the layer that has it

    def __str__(self) -> str:
        from ..weights.report import human

        parts = [f"{self.layers} linear layers as {self.scheme}"] if self.layers or not self.already else []
        if self.layers:
            parts += [f"{human(self.bytes_before, 'B', 1000)} -> {human(self.bytes_after, 'B', 1000)}"]
            parts += [f"weight error {self.mean_error:.4f}, at most {self.largest_error:.4f} ({self.largest})"]
        if self.already:
            parts.append(f"{self.already} were {self.scheme} before")
        if self.kept:
            parts.append(f"{len(self.kept)} kept")
        return ", ".join(parts)


class Quantiser:
    """Packs weights one at a time and keeps account of them; also what a loader calls for each linear layer."""

    def __init__(
        self,
        scheme: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        *,
        keep: Iterable[str] = KEPT,
        part: str = "model",
    ) -> None:
        """`device` and `dtype` are what the model will compute on and in; `keep` are names or patterns of layers.

        `part` is what errors call the model.
        """
        self.scheme: Scheme = scheme_of(scheme)
        self.scheme.require(device)
        self.dtype = dtype
        self.keep = tuple(keep)
        self.part = part
        self._kept: dict[str, str] = {}
        self._errors: dict[str, float] = {}
        self._already = self._before = self._after = 0

    def __call__(self, name: str, weight: Callable[[], Tensor]) -> Packed | None:
        """Pack the weight (out, in) of a linear layer; None where it is to stay plain."""
        reason = self._reason(name)
        plain = None if reason else weight()
        reason = reason or self.scheme.unsuitable(tuple(plain.shape))
        if reason:
            self._kept[name] = reason
            return None
        packed, error = self._packed(name, plain)
        self._errors[name] = error
        self._before += plain.nbytes
        self._after += packed.nbytes
        return packed

    def _packed(self, name: str, weight: Tensor) -> tuple[Packed, float]:
        try:
            packed = self.scheme.make(weight)
        except FluxError as error:
            raise FluxError(f"{name}: {error}") from error
        error = relative_error(weight, packed)
        if math.isnan(error):
            raise FluxError(f"{name} holds NaN or infinity and cannot be quantised; download the model again")
        return packed, error

    def layer(self, name: str, linear: nn.Module) -> nn.Module:
        """A linear layer packed; the layer itself where it is to stay, or is packed so already."""
        if isinstance(linear, PackedLinear) and not self._reason(name):
            packs = [_in_scheme(pack, self.scheme) for pack in linear.packs]
            if None not in packs:
                self._already += 1
                return linear if packs == list(linear.packs) else PackedLinear(packs, linear.bias)
        packed = self(name, lambda: self._weight(linear))
        return linear if packed is None else PackedLinear([packed], linear.bias)

    def _weight(self, linear: nn.Module) -> Tensor:
        return linear.dequantise(self.dtype) if isinstance(linear, PackedLinear) else linear.weight

    def refuse(self, name: str, linear: nn.Module) -> None:
        """A `FluxError` for a layer that is packed by a scheme from which packing anew would lose too much.

        fp8 is not one of them: it is how many files hold plain numbers.
        """
        if not isinstance(linear, PackedLinear) or self._reason(name):
            return
        foreign = [p for p in linear.packs if not isinstance(p, Fp8) and _in_scheme(p, self.scheme) is None]
        if foreign:
            raise FluxError(
                f"the {self.part} is already stored as {foreign[0].scheme} ({name}); load its bf16 file to quantise "
                f"it to {self.scheme.name}, or choose none for the {self.part}"
            )

    def _reason(self, name: str) -> str:
        if self.dtype == torch.float16 and fnmatchcase(name, OVERFLOWS):
            return "it would overflow float16"
        hit = next((k for k in self.keep if name.startswith(f"{k}.") or fnmatchcase(name, k)), None)
        return "" if hit is None else KEPT.get(hit, "asked for")

    @property
    def summary(self) -> Summary:
        errors = self._errors
        largest = max(errors, key=errors.get, default="")
        return Summary(
            self.scheme.name, len(errors), self._already, dict(self._kept), self._before, self._after,
            sum(errors.values()) / max(len(errors), 1), errors.get(largest, 0.0), largest,
        )  # fmt: skip


def relative_error(weight: Tensor, packed: Packed) -> float:
    """||packed - weight|| / ||weight||, both in float32; NaN where either is not finite."""
    plain = weight.detach().float()
    size = torch.linalg.vector_norm(plain)
    error = torch.linalg.vector_norm(packed.dequantise(torch.float32).sub_(plain))
    if not torch.isfinite(size + error):
        return float("nan")
    return (error / size).item() if size > 0 else error.item()


def _in_scheme(pack: Packed, wanted: Scheme) -> Packed | None:
    """The same numbers under the wanted scheme, if they need no packing anew."""
    if pack.scheme == wanted.name:
        return pack
    if isinstance(pack, Fp8) and wanted.maker == ("fp8", "Fp8"):
        matmul = bool(wanted.options.get("matmul"))
        return Fp8(pack.weight, pack.scale, pack.input_scale, matmul=matmul, allows_matmul=pack.allows_matmul)
    return None


def quantise(
    module: nn.Module,
    scheme: str,
    *,
    keep: Iterable[str] = KEPT,
    part: str = "model",
    progress: Callable[[float], None] | None = None,
) -> tuple[nn.Module, Summary]:
    """A copy of a model with its linear layers packed by the scheme of that name; all else is the same memory.

    `keep` are names or patterns of layers that stay plain, `part` is what errors call the model. `progress` is told
    the fraction done. The model itself stays as it is. Raises `FluxError` where the scheme cannot be had, or the model
    is packed otherwise already.
    """
    first = next(module.parameters())
    pack = Quantiser(scheme, first.device, getattr(module, "dtype", first.dtype), keep=keep, part=part)
    layers = {n: m for n, m in module.named_modules() if type(m) is nn.Linear or isinstance(m, PackedLinear)}
    for name, layer in layers.items():
        pack.refuse(name, layer)
    total, done = max(sum(map(_numbers, layers.values())), 1), 0
    packed = {}
    for name, layer in layers.items():
        made = pack.layer(name, layer)
        if made is not layer:
            packed[name] = made
        done += _numbers(layer)
        if progress:
            progress(done / total)
    return sharing_copy(module, packed), pack.summary


def _numbers(linear: nn.Module) -> int:
    return linear.in_features * linear.out_features


def sharing_copy(module: nn.Module, replaced: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of the tree of modules over the same tensors, some modules (by name) replaced.

    Moving or casting either leaves the other where it is; what was one tensor under two names still is.
    """
    return _copy(module, replaced, "", {})


def _copy(module: nn.Module, replaced: Mapping[str, nn.Module], name: str, seen: dict[int, Any]) -> nn.Module:
    if name in replaced:
        return replaced[name]
    if id(module) in seen:
        return seen[id(module)]
    twin = seen[id(module)] = module.__class__.__new__(module.__class__)
    # Its own tables of hooks, buffers and so on: what is added to one module is not added to the other.
    twin.__dict__.update({k: v.copy() if isinstance(v, dict) else v for k, v in module.__dict__.items()})
    for key, parameter in module._parameters.items():
        if parameter is not None and id(parameter) not in seen:
            seen[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
        twin._parameters[key] = seen.get(id(parameter))
    for key, child in module._modules.items():
        path = f"{name}.{key}" if name else key
        twin._modules[key] = None if child is None else _copy(child, replaced, path, seen)
    return twin
