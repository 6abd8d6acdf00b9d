"""What was found in a checkpoint, what was used of it, and what was not: nothing is loaded silently."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

SHOWN = 8  # names listed before "and n more"


@dataclass(frozen=True)
class PartReport:
    """One component of a model, or a file of another kind."""

    name: str  # transformer, clip, t5, vae; or what the file is instead
    layout: str  # whose tensor names: BFL, diffusers, transformers; empty for files of another kind
    files: tuple[str, ...]
    dtypes: Mapping[str, int]  # bytes by stored type
    parameters: int
    used: int  # tensors read
    unused: tuple[str, ...] = ()  # names nobody knows
    spare: tuple[str, ...] = ()  # names that are known and not needed
    missing: tuple[str, ...] = ()
    note: str = ""

    @property
    def bytes(self) -> int:
        return sum(self.dtypes.values())

    def lines(self) -> list[str]:
        count = self.used + len(self.unused) + len(self.spare)
        facts = [
            self.layout,
            " + ".join(self.dtypes),
            f"{human(self.parameters, '', 1000)} parameters",
            human(self.bytes, "B", 1000),
        ]
        facts.append(f"{self.used} of {count} tensors used" if self.layout else f"{count} tensors")
        lines = [f"  {self.name:<12} {', '.join(fact for fact in facts if fact)}"]
        lines += [f"  {'':<12} {file}" for file in self.files[:4]]
        lines += [f"  {'':<12} and {len(self.files) - 4} more files"] if len(self.files) > 4 else []
        for title, names in (("missing", self.missing), ("unused", self.unused), ("not needed", self.spare)):
            if names:
                lines.append(f"  {'':<12} {title}: {listed(names)}")
        return lines + ([f"  {'':<12} {self.note}"] if self.note else [])


@dataclass(frozen=True)
class Report:
    """A checkpoint in words; `text()` is what the terminal and the nodes show."""

    source: str
    parts: tuple[PartReport, ...]
    variant: str = ""
    notes: tuple[str, ...] = field(default=())

    @property
    def parameters(self) -> int:
        return sum(part.parameters for part in self.parts)

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.parts)

    def part(self, name: str) -> PartReport | None:
        """The part of that name, if the checkpoint has it."""
        return next((part for part in self.parts if part.name == name), None)

    def text(self) -> str:
        """Several lines, plain text."""
        kind = f"FLUX.1 {self.variant}, " if self.variant else ""
        head = f"{self.source}: {kind}{human(self.parameters, '', 1000)} parameters, {human(self.bytes, 'B', 1000)}"
        return "\n".join(
            [head, *(line for part in self.parts for line in part.lines()), *(f"  {note}" for note in self.notes)]
        )


def listed(names: tuple[str, ...] | list[str], shown: int = SHOWN) -> str:
    """`3: a, b, c`, the count first and not too many names."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return f"{len(names)}: {', '.join(name[:120] for name in names[:shown])}{more}"


def counted(number: int, what: str) -> str:
    """`1 layer`, `2 layers`."""
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def human(number: int, unit: str, base: int) -> str:
    """12 -> `12`, 11901408320 -> `11.9 G`; with unit `B`: `23.8 GB`."""
    value, prefix = float(number), ""
    for prefix in ("", "k", "M", "G", "T"):
        if value < base or prefix == "T":
            break
        value /= base
    digits = f"{value:.0f}" if not prefix or value >= 100 else f"{value:.3g}"
    return f"{digits} {prefix}{unit}".strip()
