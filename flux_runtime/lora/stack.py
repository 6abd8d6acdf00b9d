"""LoRAs with their weights, one after another: an immutable value that a model handle carries."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import FluxError

if TYPE_CHECKING:
    from .formats import Lora
    from .patches import NormChange, Patch

Part = str  # "transformer", "clip" or "t5"
_ALIASES = {
    "double": "double_blocks", "transformer_blocks": "double_blocks",
    "single": "single_blocks", "single_transformer_blocks": "single_blocks",
}  # fmt: skip
_RANGE = re.compile(r"(\d+)-(\d+)")


@dataclass(frozen=True)
class Factor:
    """A factor for the layers whose dotted name holds these parts in a row: `double_blocks.0-9`, `img_attn` ..."""

    selector: str
    factor: float

    def fits(self, layer: str) -> bool:
        wanted = [_ALIASES.get(part, part) for part in self.selector.split(".")]
        parts = layer.split(".")
        starts = range(len(parts) - len(wanted) + 1)
        return any(all(map(_agree, wanted, parts[i : i + len(wanted)])) for i in starts)


def _agree(wanted: str, part: str) -> bool:
    span = _RANGE.fullmatch(wanted)
    if span and part.isdecimal():
        return int(span[1]) <= int(part) <= int(span[2])
    return wanted in ("*", part)


def parse_factors(text: str) -> tuple[Factor, ...]:
    """`double_blocks.0-9: 0.5, single_blocks: 0` -> factors; lines, commas and semicolons separate, `=` is `:` too."""
    return tuple(_factor(line.strip()) for line in re.split(r"[\n,;]", text) if line.strip())


def _factor(line: str) -> Factor:
    selector, mark, number = (part.strip() for part in line.replace("=", ":").rpartition(":"))
    try:
        factor = float(number)
    except ValueError:
        factor = math.nan
    if not mark or not re.fullmatch(r"[\w*.\-]+", selector) or not math.isfinite(factor):
        raise FluxError(
            f"{line[:60]!r} is no weight for a block: write a name or a range, a colon and a number, "
            "such as double_blocks.0-9: 0.5"
        )
    return Factor(selector, factor)


@dataclass(frozen=True)
class Entry:
    """A LoRA and how strongly it acts: on the transformer, on the text encoders, and by factors on chosen blocks.

    Of several factors that fit a layer the last one counts.
    """

    lora: Lora
    weight: float = 1.0
    text_weight: float | None = None  # None: as strong as on the transformer
    factors: tuple[Factor, ...] = ()

    def __post_init__(self) -> None:
        if not all(math.isfinite(w) for w in (self.weight, self.text_weight or 0.0)):
            raise FluxError(f"the weight of the LoRA {self.lora.name} is not a number; 1 is its full strength")
        layers = [name for part in (*self.lora.layers.values(), *self.lora.norms.values()) for name in part]
        for factor in self.factors:
            if not any(map(factor.fits, layers)):
                raise FluxError(
                    f"{factor.selector!r} fits no layer of the LoRA {self.lora.name}, "
                    f"which has such as {', '.join(layers[:3])}"
                )

    def weight_on(self, part: Part, layer: str) -> float:
        whole = self.weight if part == "transformer" or self.text_weight is None else self.text_weight
        return whole * next((f.factor for f in reversed(self.factors) if f.fits(layer)), 1.0)


@dataclass(frozen=True)
class LoraStack:
    """Any number of LoRAs (the `FLUX_LORA` edge).

    Their changes add up, so their order means nothing, but for whole tensors (a control LoRA's norms, what PEFT trains
    whole): of several for one place the last counts.
    """

    entries: tuple[Entry, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.entries)

    def plus(
        self, lora: Lora, weight: float = 1.0, text_weight: float | None = None, factors: Sequence[Factor] = ()
    ) -> LoraStack:
        """One LoRA more."""
        return LoraStack((*self.entries, Entry(lora, weight, text_weight, tuple(factors))))

    def __add__(self, other: LoraStack) -> LoraStack:
        return LoraStack((*self.entries, *other.entries))

    def patches(self, part: Part) -> dict[str, list[tuple[Patch, float]]]:
        """What changes each layer of a part, with its weight; what weighs nothing is left out."""
        found: dict[str, list[tuple[Patch, float]]] = {}
        for entry, layer, patches in self._layers(part):
            weight = entry.weight_on(part, layer)
            if weight:
                found.setdefault(layer, []).extend((patch, weight) for patch in patches)
        return found

    def norms(self, part: Part) -> dict[str, list[tuple[NormChange, float]]]:
        """The same for the tensors of a part's norms."""
        found: dict[str, list[tuple[NormChange, float]]] = {}
        for entry in self.entries:
            for name, change in entry.lora.norms.get(part, {}).items():
                if weight := entry.weight_on(part, name):
                    found.setdefault(name, []).append((change, weight))
        return found

    def _layers(self, part: Part) -> Iterator[tuple[Entry, str, tuple[Patch, ...]]]:
        for entry in self.entries:
            for layer, patches in entry.lora.layers.get(part, {}).items():
                yield entry, layer, patches

    @property
    def in_channels(self) -> int:
        """The widest input that a control LoRA reads; 0 where none touches the input."""
        return max((entry.lora.in_channels for entry in self.entries if entry.weight), default=0)


NO_LORAS = LoraStack()
