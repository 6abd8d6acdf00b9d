"""A LoRA file of any format as patches of native layers; its tensors stay in the mapped file.

Every tensor of a file ends in a patch, as a value, as an alpha, or by name in `unused`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FluxError
from ..weights.files import TensorFile
from ..weights.report import counted, listed
from . import foreign
from .alphas import Alphas, read_alphas
from .flavours import Found, build, checked_alpha
from .names import WHOLE, Name, format_of, take_apart
from .patches import Full, Hadamard, Instead, Kronecker, LowRank, Magnitude, NormChange, Patch

CHUNK = 1 << 24  # numbers looked at in one go

Layers = Mapping[str, Mapping[str, tuple[Patch, ...]]]  # part -> native linear's name -> its patches
Norms = Mapping[str, Mapping[str, NormChange]]  # part -> native name of a norm's weight or bias -> its change


@dataclass(frozen=True, eq=False)
class Lora:
    """What a LoRA file changes, ready to be applied to any model it fits."""

    name: str
    path: Path
    format: str  # in plain words: kohya, diffusers, XLabs ...
    layers: Layers
    norms: Norms = field(default_factory=dict)
    unused: tuple[str, ...] = ()
    in_channels: int = 0  # of the input that `img_in` reads (a control LoRA: 128), told by its patches; 0 without any
    notes: tuple[str, ...] = ()
    tensors: Mapping[str, Tensor] = field(default_factory=dict, repr=False)  # those used, under the file's own names
    total: int = 0  # tensors in the file

    def __post_init__(self) -> None:
        if not self.in_channels:
            patches = self.layers.get("transformer", {}).get("img_in", ())
            object.__setattr__(self, "in_channels", max((patch.shape[1] for patch in patches), default=0))

    @property
    def patches(self) -> tuple[Patch, ...]:
        """All of them, in the order of their layers."""
        return tuple(patch for layers in self.layers.values() for some in layers.values() for patch in some)

    @property
    def norm_changes(self) -> tuple[NormChange, ...]:
        return tuple(change for changes in self.norms.values() for change in changes.values())

    @property
    def differs(self) -> bool:
        """Whether it changes anything at all relative to what a model has."""
        relative = not all(isinstance(patch, Instead) for patch in self.patches)
        return relative or any(change.diff is not None for change in self.norm_changes)

    @property
    def counts(self) -> dict[str, int]:
        """Part of the model -> how many of its layers are changed."""
        return {part: len(layers) for part, layers in self.layers.items()}

    @property
    def flavours(self) -> tuple[str, ...]:
        """Which kinds of change occur, the most frequent first; a file of norms alone holds differences."""
        found = tuple(flavour for flavour, _ in Counter(map(_flavour, self.patches)).most_common())
        return found or (_flavour(Full()),)

    @property
    def ranks(self) -> tuple[int, ...]:
        """All ranks that occur, the lowest first; whole matrices have none."""
        return tuple(sorted({_rank(patch) for patch in self.patches} - {0}))

    def summary(self) -> str:
        """A few lines for people: format, flavour, what is changed, what was not used."""
        ranks = f"rank {_span(self.ranks)}" if self.ranks else ""
        parts = [f"{counted(count, 'layer')} of {_PARTS[part]}" for part, count in self.counts.items()]
        head = ", ".join(filter(None, [f"{self.format} {' + '.join(self.flavours)}", ranks, *parts]))
        lines = [f"{self.name}: {head}", f"  {self.total - len(self.unused)} of {self.total} tensors used"]
        whole = sum(change.whole is not None for change in self.norm_changes)
        added = sum(change.diff is not None for change in self.norm_changes)
        lines += [f"  {counted(added, 'tensor')} of norms changed by a difference"] if added else []
        lines += [f"  {counted(whole, 'tensor')} of norms set whole"] if whole else []
        if whole or any(isinstance(patch, Instead) for patch in self.patches):
            lines.append("  what is whole counts fully at every weight but 0")
        lines += [f"  reads {self.in_channels} channels of input"] if self.in_channels else []
        lines += [f"  {note}" for note in (*self.notes, *_alpha_notes(self.patches))]
        return "\n".join(lines + ([f"  unused: {listed(self.unused)}"] if self.unused else []))

    def check_numbers(self) -> None:
        """Read every number once and refuse infinite ones and NaNs; done when the LoRA is first applied."""
        if self._broken:
            raise FluxError(
                f"{self.path}: tensor {self._broken} holds numbers that are infinite or not numbers at all; the "
                "training failed or the file is damaged, so use another version of the LoRA"
            )

    @cached_property
    def _broken(self) -> str:
        return next((name for name, tensor in self.tensors.items() if not _finite(tensor)), "")


_PARTS = {"transformer": "the transformer", "clip": "CLIP", "t5": "T5"}


def _flavour(patch: Patch) -> str:
    if isinstance(patch, Magnitude):
        inner = _flavour(patch.change)
        return "DoRA" if inner == "LoRA" else f"{inner} with DoRA"
    return {LowRank: "LoRA", Kronecker: "LoKr", Hadamard: "LoHa", Full: "full difference", Instead: "whole weight"}[
        type(patch)
    ]


def _rank(patch: Patch) -> int:
    if isinstance(patch, Magnitude):
        return _rank(patch.change)
    if isinstance(patch, LowRank):
        return len(patch.down)
    if isinstance(patch, Hadamard):
        return len(patch.w1[1])
    if isinstance(patch, Kronecker):
        return next((f[0].shape[1] for f in (patch.w2, patch.w1) if len(f) == 2), 0)
    return 0


def _span(ranks: tuple[int, ...]) -> str:
    return ", ".join(map(str, ranks)) if len(ranks) < 5 else f"{ranks[0]} to {ranks[-1]}"


def _alpha_notes(patches: tuple[Patch, ...]) -> Iterator[str]:
    inner = [patch.change if isinstance(patch, Magnitude) else patch for patch in patches]
    without = [patch.alpha is None for patch in inner if _rank(patch)]
    if any(without) and not all(without):
        yield f"{sum(without)} of {len(without)} changes have no alpha; it is taken to be their rank"


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers are; the smallest and the largest tell it, for a NaN is both."""
    for chunk in tensor.reshape(-1).split(CHUNK):
        wide = chunk.float() if chunk.dtype.itemsize == 1 else chunk
        if wide.numel() and not all(torch.isfinite(edge) for edge in torch.aminmax(wide)):
            return False
    return True


def read_lora(path: Path, name: str | None = None) -> Lora:
    """Read any LoRA file; `FluxError` where it is none for FLUX.1, where it is damaged, or where tensors do not fit."""
    path = Path(path)
    file = TensorFile(path)
    try:
        return _Reader(file).read(name or path.stem)
    except FluxError as error:
        raise error if str(error).startswith(str(path)) else FluxError(f"{path}: {error}") from error


class _Reader:
    """Sorts one file's tensors by layer and has patches made of them."""

    def __init__(self, file: TensorFile) -> None:
        self.file = file
        self.names = {text: name for text in file.header.entries if (name := take_apart(text))}
        self.notes: list[str] = []
        self.used: dict[str, Tensor] = {}
        self.layers: dict[str, dict[str, tuple[Patch, ...]]] = {}

    def read(self, title: str) -> Lora:
        self._refuse_other_models()
        self.names = {text: name for text, name in self.names.items() if name.target}
        self._keep_one_telling()
        alphas = read_alphas(self.file.path, self.file.header.metadata)
        for base, found in self._by_layer().items():
            self._add(base, found, alphas)
        norms = self._norms()
        entries = self.file.header.entries
        unused = tuple(text for text in entries if text not in self.used)
        known = format_of([self.names[text] for text in self.used])
        lora = Lora(
            title,
            self.file.path,
            known,
            self.layers,
            norms,
            unused,
            notes=tuple(self.notes),
            tensors=self.used,
            total=len(entries),
        )
        if not lora.differs:  # whole tensors alone are no LoRA, but a model or a part of one
            raise FluxError(f"{self.file.path} is no LoRA for FLUX.1: {self._what_else()}")
        self._refuse_look_alikes()
        return lora

    def _refuse_other_models(self) -> None:
        model = foreign.other_model(self.file.tensors())
        if model and any(name.slot not in WHOLE for name in self.names.values()):
            raise FluxError(f"{self.file.path} is a LoRA for {model}, not for FLUX.1; use one made for FLUX.1")

    def _refuse_look_alikes(self) -> None:
        transformer = self.layers.get("transformer", {})
        model = foreign.look_alike((layer, patch.shape) for layer, some in transformer.items() for patch in some)
        if model:
            raise FluxError(f"{self.file.path} is by its sizes a LoRA for {model}; use one made for FLUX.1")

    def _what_else(self) -> str:
        return foreign.what_else(self.file.tensors(), str(self.file.path))

    def _keep_one_telling(self) -> None:
        """Some files tell the same LoRA twice, under the names of two programs: the fuller telling counts."""
        tellings: dict[tuple[str, str], set[tuple[str, str]]] = {}
        sizes = Counter(_telling(name) for name in self.names.values())
        for name in self.names.values():
            tellings.setdefault((name.target.part, name.target.layer), set()).add(_telling(name))
        best = {layer: max(some, key=lambda t: (sizes[t], t)) for layer, some in tellings.items()}
        kept = {t: n for t, n in self.names.items() if best[n.target.part, n.target.layer] == _telling(n)}
        twice = sum(len(some) > 1 for some in tellings.values())
        if twice:
            self.notes.append(
                f"{counted(twice, 'layer')} in the file under the names of two programs; one of them is used"
            )
        self.names = kept

    def _by_layer(self) -> dict[str, Found]:
        """The file's own name of a layer -> what it says of it; alphas are read, nothing else is."""
        found: dict[str, Found] = {}
        owner: dict[tuple[str, str, int | None], str] = {}
        for text, name in self.names.items():
            if name.target.norm or name.slot == "reshape_weight":
                continue
            place = (name.target.part, name.target.layer, name.target.above)
            if owner.setdefault(place, name.base) != name.base:
                raise FluxError(f"{owner[place]} and {name.base} are the same layer; keep one of them in the file")
            layer = found.setdefault(name.base, Found(name.target))
            if name.slot in layer.names:
                raise FluxError(f"{layer.names[name.slot]} and {text} say the same of a layer; keep one in the file")
            layer.names[name.slot] = text
            if name.slot == "alpha":
                layer.alpha = self._alpha(text)
            else:
                layer.tensors[name.slot] = self.file.read(text)
        return found

    def _alpha(self, text: str) -> float:
        tensor = self.file.read(text)
        if tensor.numel() != 1 or tensor.is_complex():
            raise FluxError(f"{text} should be one number and has shape {list(tensor.shape)}; the file is damaged")
        return checked_alpha(text, float(tensor.item()))

    def _add(self, base: str, found: Found, alphas: Alphas) -> None:
        patches, slots = build(found, partial(alphas.of, base))
        if not patches:
            return
        layers = self.layers.setdefault(found.target.part, {})
        layers[found.target.layer] = (*layers.get(found.target.layer, ()), *patches)
        self.used |= {found.names[slot]: self._read(found, slot) for slot in found.names if slot in slots}

    def _read(self, found: Found, slot: str) -> Tensor:
        return found.tensors[slot] if slot in found.tensors else self.file.read(found.names[slot])

    def _norms(self) -> dict[str, dict[str, NormChange]]:
        """What is said of norms; and the sizes of widened layers are read, which their matrices tell as well."""
        norms: dict[str, dict[str, NormChange]] = {}
        for text, name in self.names.items():
            native, kind = _norm_tensor(name)
            changes = norms.setdefault(name.target.part, {}) if native else {}
            change = changes.get(native, NormChange())
            if native and getattr(change, kind) is None:  # the first of two spellings counts, the other is unused
                self.used[text] = self._value(text)
                changes[native] = replace(change, **{kind: self.used[text]})
            elif name.slot == "reshape_weight" and name.target.layer in self.layers.get("transformer", {}):
                self.used[text] = self.file.read(text)
        return norms

    def _value(self, text: str) -> Tensor:
        tensor = self.file.read(text)
        if not tensor.is_floating_point() or not tensor.numel():
            raise FluxError(f"tensor {text} of shape {list(tensor.shape)} as {tensor.dtype} cannot be a model's")
        return tensor


def _telling(name: Name) -> tuple[str, str]:
    return name.origin, name.target.layout


# What a tensor is to a norm -> whether it is of its bias, and what it says of that or of its weight.
_OF_NORMS = {
    "whole": (False, "whole"), "set_weight": (False, "whole"), "whole_b": (True, "whole"),
    "diff": (False, "diff"), "w_norm": (False, "diff"), "diff_b": (True, "diff"), "b_norm": (True, "diff"),
}  # fmt: skip


def _norm_tensor(name: Name) -> tuple[str, str]:
    """The native tensor of a norm that a name speaks of, and what it says of it; empty where it is of no norm."""
    if not name.target.norm or name.slot not in _OF_NORMS:
        return "", ""
    of_bias, kind = _OF_NORMS[name.slot]
    return f"{name.target.layer}.{'bias' if of_bias else name.target.norm}", kind
