"""How the scripts here measure: CPU time of the process, or the time between CUDA events."""

from __future__ import annotations

import argparse
import platform
import time
from collections.abc import Callable

import torch


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """What one call takes: of the CPU, which other programs do not change much, or on the GPU."""
    if device.type != "cuda":
        start = time.process_time()
        call()
        return time.process_time() - start
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    torch.cuda.synchronize()
    return first.elapsed_time(last) / 1000


def name_of(device: torch.device) -> str:
    """The GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()


def read(parser: argparse.ArgumentParser, dtype: str, rounds: int) -> argparse.Namespace:
    """The options of a script, with those that all have: `dtype`, `device`, `rounds`; `threads` is set at once."""
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default=dtype)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=rounds)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    options.dtype, options.device = getattr(torch, options.dtype), torch.device(options.device)
    return options
