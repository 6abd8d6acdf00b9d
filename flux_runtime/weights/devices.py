"""Which device and number type a model is loaded on when the caller names none."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping

import torch

from ..errors import FluxError
from .report import human

log = logging.getLogger("fluxcanvas")

BALANCED = "balanced"  # over all GPUs
PARTS = ("transformer", "clip", "t5", "vae")
SPARE = 1.2  # what a part needs besides its weights, to work
DTYPES = {
    "bf16": torch.bfloat16, "bfloat16": torch.bfloat16, "fp16": torch.float16, "float16": torch.float16,
    "fp32": torch.float32, "float32": torch.float32,
}  # fmt: skip


def choose_device(device: torch.device | str | None) -> torch.device:
    """The device asked for, else CUDA, else Apple's MPS, else the CPU."""
    if device is None:
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise FluxError(f"{device!r} is no device; use cpu, cuda, cuda:1 or mps") from error


Devices = torch.device | str | Mapping[str, torch.device | str] | None


def main_device(wish: Devices) -> torch.device:
    """The device that the transformer is meant for: the model's number type goes by it."""
    if isinstance(wish, Mapping):
        wish = wish.get("transformer")
    return choose_device(None if wish == BALANCED else wish)


def place(sizes: Mapping[str, int], wish: Devices) -> dict[str, torch.device]:
    """The device of each part of a model, which takes so many bytes: one for all, or named part by part, or `balanced`.

    `balanced` gives each part, the largest first, to the CUDA device with the most free memory, and to the CPU what
    fits on none. Parts that a table does not name go where the transformer goes.
    """
    if wish == BALANCED:
        return _balanced(sizes)
    main = main_device(wish)
    if not isinstance(wish, Mapping):
        return dict.fromkeys(sizes, main)
    odd = [part for part in wish if part not in PARTS]
    if odd:
        raise FluxError(f"{odd[0]!r} is no part of a model: name devices for {', '.join(PARTS)}")
    return {part: choose_device(wish[part]) if wish.get(part) else main for part in sizes}


def _balanced(sizes: Mapping[str, int]) -> dict[str, torch.device]:
    free = {torch.device("cuda", i): torch.cuda.mem_get_info(i)[0] for i in range(torch.cuda.device_count())}
    if not free:
        log.warning("there is no CUDA device to balance the parts over: all go to %s", choose_device(None))
        return dict.fromkeys(sizes, choose_device(None))
    places = {}
    for part, size in sorted(sizes.items(), key=lambda item: -item[1]):
        best = max(free, key=free.get)
        fits = free[best] > size * SPARE
        places[part] = best if fits else torch.device("cpu")
        if fits:
            free[best] -= size
        else:
            log.warning("the %s (%s) fits on no CUDA device: it stays on the CPU", part, human(size, "B", 1000))
    return places


def choose_dtype(dtype: torch.dtype | str | None, device: torch.device, parameters: int) -> torch.dtype:
    """The type asked for, else bfloat16 where the device computes in it, else float16 on CUDA; on the CPU float32,
    or bfloat16 where a model of so many parameters would not fit into memory otherwise."""
    if dtype is not None:
        chosen = DTYPES.get(dtype.lower().removeprefix("torch.")) if isinstance(dtype, str) else dtype
        if chosen not in set(DTYPES.values()):
            raise FluxError(f"{dtype} is no type that FLUX.1 computes in; use bf16, fp16 or fp32")
        return chosen
    if device.type == "cuda":
        ampere = torch.version.hip is not None or torch.cuda.get_device_capability(device)[0] >= 8
        return torch.bfloat16 if ampere else torch.float16
    if device.type != "cpu":
        return torch.bfloat16
    memory = _memory()
    if memory and parameters * 4 > 0.8 * memory:
        log.warning(
            "%s of float32 weights do not fit into %s of memory: loading as bfloat16",
            human(parameters * 4, "B", 1000),
            human(memory, "B", 1000),
        )
        return torch.bfloat16
    return torch.float32


def _memory() -> int:
    """Bytes of main memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
