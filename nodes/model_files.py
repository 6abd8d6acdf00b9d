"""What the loaders have in common: the names they offer, the files behind them, and telling how far they are."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .host import Host, current, walk

if TYPE_CHECKING:
    import torch

    from ..flux_runtime.weights.report import Report

log = logging.getLogger("fluxcanvas")
AUTO = "auto"
DTYPES = (AUTO, "bfloat16", "float16", "float32")
DTYPE_HELP = "The precision to compute in. auto: what the files hold, or what the device does well."


def find(host: Host, name: str, categories: Iterable[str]) -> Path | None:
    """The path of a name offered by one of these categories; None when none offers it."""
    return next((host.resolve(category, name) for category in categories if name in host.files(category)), None)


def locate(host: Host, name: str, categories: Sequence[str], published: Iterable[str]) -> Path | str:
    """The path of a name from the model folders, else the published name itself; FluxError when it is neither."""
    found = find(host, name, categories)
    return found or (name if name in published else host.resolve(categories[0], name))


def files(*categories: str, more: Sequence[str] = ()) -> Callable[[], list[str]]:
    """What a Choice offers: the models of these categories, and `more`."""
    return lambda: list(dict.fromkeys([*(n for category in categories for n in current().files(category)), *more]))


def state(paths: Iterable[Path]) -> str:
    """Changes when a file in `paths` (folders: those below them) is changed, added or removed."""
    stats = ((file, file.stat()) for file in _below(paths))
    return "|".join(f"{file}:{stat.st_size}:{stat.st_mtime_ns}" for file, stat in stats)


def _below(paths: Iterable[Path]) -> Iterator[Path]:
    for path in paths:
        yield from walk(path) if path.is_dir() else [path]


def make_room(host: Host, source: Path | str) -> None:
    """Ask for as much memory as the files take; what is yet to be downloaded is not known."""
    if isinstance(source, Path):
        host.free_memory(sum(file.stat().st_size for file in _below([source])))


def dtype_of(name: str) -> torch.dtype | None:
    import torch

    return None if name == AUTO else getattr(torch, name)


def telling(host: Host) -> Callable[[str, float], None]:
    """A `progress` for the loader: shows each new message and the fraction done, and lets the host stop it.

    It speaks at once: importing what reads the text encoders takes seconds.
    """
    shown: list[object] = ["", None]

    def tell(message: str, fraction: float) -> None:
        host.check_interrupt()
        percent = round(100 * fraction)
        if percent != shown[1]:  # a loader tells after each of its hundreds of tensors
            host.progress(percent, 100)
        if message != shown[0]:
            host.text(message)
        shown[:] = message, percent

    tell("opening the files", 0.0)
    return tell


def tell_report(host: Host, report: Report) -> None:
    """Show on the node what was loaded, with what was wrong with it; the log has it all."""
    full = report.text()
    log.info(full)
    odd = [f"{part.name}: {len(part.unused)} tensors unused" for part in report.parts if part.unused]
    host.text("\n".join([full.partition("\n")[0], *odd, *report.notes]))
