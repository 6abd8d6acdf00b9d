"""Which device and number type a model is loaded on when the caller names none."""

from __future__ import annotations

import logging
import os

import torch

from ..errors import FluxError

log = logging.getLogger("fluxcanvas")

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
            "%.0f GB of float32 weights do not fit into %.0f GB of memory: loading as bfloat16",
            parameters * 4e-9,
            memory * 1e-9,
        )
        return torch.bfloat16
    return torch.float32


def _memory() -> int:
    """Bytes of main memory; 0 where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
