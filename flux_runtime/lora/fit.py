"""Whether a LoRA goes with a model, layer by layer, before anything of it is touched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from ..errors import FluxError
from .apply import linear_at, norm_at
from .patches import Full, NormChange, Patch

if TYPE_CHECKING:
    from .formats import Lora

LABELS = {"transformer": "transformer", "clip": "CLIP", "t5": "T5"}


@dataclass(frozen=True)
class LoraFit:
    """What a model takes of a LoRA: layers and norms matched, those it does not have, and names nobody knows."""

    lora: Lora
    matched: Mapping[str, int]
    absent: tuple[str, ...]
    without: tuple[str, ...]  # parts that the LoRA changes and that were not given
    norms: int = 0  # tensors of norms

    def text(self) -> str:
        """A line or two for the node and the log."""
        from ..weights.report import counted, listed

        done = [counted(count, f"{LABELS[part]} layer") for part, count in self.matched.items() if count]
        done += [f"{counted(self.norms, 'tensor')} of norms"] if self.norms else []
        lines = [f"{self.lora.name} ({self.lora.format}): {', '.join(done)}"]
        if self.absent:
            lines.append(f"  not in this model: {listed(self.absent)}")
        if self.without:
            parts = " and ".join(LABELS[part] for part in self.without)
            lines.append(f"  its {parts} part is not applied: connect the text encoders too")
        if self.lora.unused:
            lines.append(f"  unused: {listed(self.lora.unused)}")
        return "\n".join(lines)


def fit(lora: Lora, models: Mapping[str, nn.Module]) -> LoraFit:
    """Compare a LoRA with the parts of a model; `FluxError` where sizes disagree, or where nothing matches at all."""
    matched, absent = {}, []
    for part, layers in lora.layers.items():
        if part in models:
            lacking = [name for name, patches in layers.items() if not _fits(models[part], name, patches, lora)]
            matched[part] = len(layers) - len(lacking)
            absent += lacking
    norms = [(part, name, change) for part, some in lora.norms.items() for name, change in some.items()]
    lacking = [
        name for part, name, change in norms if part in models and not _norm_fits(models[part], name, change, lora)
    ]
    absent += lacking
    count = sum(part in models for part, *_ in norms) - len(lacking)
    without = tuple(part for part in LABELS if part not in models and (lora.layers.get(part) or lora.norms.get(part)))
    if not count and not any(matched.values()):
        raise FluxError(f"the LoRA {lora.name} changes nothing of this model{_reason(absent, without)}")
    return LoraFit(lora, matched, tuple(absent), without, count)


def _reason(absent: Sequence[str], without: Sequence[str]) -> str:
    """Why a LoRA acts on nothing, and what to do."""
    from ..weights.report import listed

    lacking = f", which has none of its layers: {listed(absent)}" if absent else ""
    if without:
        parts = " and ".join(LABELS[part] for part in without)
        return f"{lacking}; its {parts} part needs the text encoders, so connect them too"
    return f"{lacking}; it is made for another model"


def _fits(model: nn.Module, name: str, patches: tuple[Patch, ...], lora: Lora) -> bool:
    place = linear_at(model, name)
    if place is None:
        return False
    linear = getattr(*place)
    for patch in patches:
        _check_size(patch, name, linear.out_features, linear.in_features, lora)
    return True


def _check_size(patch: Patch, name: str, out: int, into: int, lora: Lora) -> None:
    """A patch must cover its rows, and the layer's columns; the input layer alone may differ (canvas or control)."""
    start, stop = patch.rows or (0, out)
    rows, columns = patch.shape
    only_bias = isinstance(patch, Full) and patch.diff is None
    wide = name == "img_in" and columns in (into, lora.in_channels)
    if stop > out or rows != stop - start or not (only_bias or columns == into or wide):
        raise FluxError(
            f"the LoRA {lora.name} is made for another model: its layer {name} is {rows} x {columns} "
            f"and the model's {stop - start if stop <= out else out} x {into}; choose one for this model"
        )


def _norm_fits(model: nn.Module, name: str, change: NormChange, lora: Lora) -> bool:
    place = norm_at(model, name)
    if place is None:
        return False
    if change.shapes != {getattr(*place).shape}:
        raise FluxError(
            f"the LoRA {lora.name} changes {name}, which this model has in another size; choose one for this model"
        )
    return True
