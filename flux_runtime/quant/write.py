"""Writing safetensors files one tensor at a time, whole or not at all.

The library writes from tensors that lie in memory together and share none of it; these may be views of one mapped
file, or lie on a GPU.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from ..errors import FluxError

ALIGNMENT = 8  # of the first tensor; the widest come first, so that each lies at a multiple of its element size


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    progress: Callable[[float], None] | None = None,
) -> int:
    """Write tensors and metadata to a file that appears when it is complete; its size in bytes."""
    from ..weights.report import human

    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    head = _header(order, tensors, metadata)
    size = len(head) + sum(tensor.nbytes for tensor in tensors.values())
    part: Path | None = None
    try:
        free = shutil.disk_usage(path.parent).free
        if free < size:
            raise FluxError(
                f"{path.parent} has {human(free, 'B', 1000)} left and {path.name} takes {human(size, 'B', 1000)}; "
                "make room"
            )
        part = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.part")
        with part.open("xb") as file:
            file.write(head)
            _write_all(file, [tensors[name] for name in order], progress)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise FluxError(f"{path} cannot be written ({error.strerror or error}); choose another place") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)
    return size


def _header(order: list[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    from ..weights.files import TORCH_DTYPES

    names = {dtype: name for name, dtype in TORCH_DTYPES.items()}
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    start = 0
    for name in order:
        tensor = tensors[name]
        end = start + tensor.nbytes
        entries[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_all(file: BinaryIO, tensors: list[Tensor], progress: Callable[[float], None] | None) -> None:
    total, done = max(sum(tensor.nbytes for tensor in tensors), 1), 0
    for tensor in tensors:
        if tensor.numel():
            flat = tensor.detach().to("cpu").contiguous().view(-1)
            file.write(memoryview(flat.view(torch.uint8).numpy()))
        done += tensor.nbytes
        if progress:
            progress(done / total)
