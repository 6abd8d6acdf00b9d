"""The header of a safetensors file, read without trusting a word of it.

Layout: 8 bytes (little-endian length n), n bytes of JSON (name -> dtype, shape, byte range), then the data. Every
number is checked against the size of the file before it is used, so a lying header costs an error, not memory.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FluxError

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library itself, a hundred times the largest FLUX header
MAX_RANK = 16
MAX_NAME = 500
PREFIX = 8

DTYPE_BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip

CONVERT_PICKLE = (
    "pickle checkpoints can run code and are not opened; look for the .safetensors file of the same model, or convert "
    'it where you trust it: python -c "import torch, safetensors.torch as s; '
    "t = torch.load('IN', map_location='cpu', weights_only=True); "
    "s.save_file({k: v.contiguous().clone() for k, v in t.get('state_dict', t).items()}, 'OUT.safetensors')\""
)


@dataclass(frozen=True)
class Entry:
    """One tensor of a file: its dtype under safetensors' name, its shape, and its bytes as absolute offsets."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself, checked: every range lies inside the file, and together they fill it."""

    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    size: int  # of the whole file in bytes


def read_header(path: Path) -> Header:
    """Read and check the header; anything that is no whole safetensors file is a `FluxError` naming file and remedy."""
    if path.is_dir():
        raise FluxError(f"{path} is a folder where a .safetensors file is needed; name a file inside it")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            start = file.read(PREFIX)
            length = int.from_bytes(start, "little")
            if size < PREFIX + 2 or length > min(MAX_HEADER, size - PREFIX):
                _refuse_other_formats(path, start, size)
                raise _broken(path, f"it claims a header of {length:,} bytes but is {size:,} bytes long")
            text = file.read(length)
    except OSError as error:
        raise FluxError(
            f"{path} cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from error
    raw = _parse(path, text)
    metadata = _metadata(path, raw.pop("__metadata__", None))
    entries = {name: _entry(path, name, value, PREFIX + length) for name, value in raw.items()}
    _check_cover(path, entries, PREFIX + length, size)
    return Header(entries, metadata, size)


def is_gguf(path: Path) -> bool:
    """By its first bytes; False too for what cannot be read, which the reader will tell."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _broken(path: Path, why: str) -> FluxError:
    return FluxError(f"{path} is not a whole safetensors file: {why}; download it again")


def _refuse_other_formats(path: Path, start: bytes, size: int) -> None:
    """Name what the file is when its first bytes, which are no sensible length, belong to another format."""
    if size == 0:
        raise FluxError(f"{path} is empty; download it again")
    if start[:4] == b"GGUF":
        raise FluxError(f"{path} is a GGUF file where a .safetensors file is needed; name another file")
    if start[:4] == b"PK\x03\x04" or (start[:1] == b"\x80" and start[1:2] in b"\x02\x03\x04\x05"):
        kind = "a zip archive (as torch.save writes)" if start[:2] == b"PK" else "a pickle"
        raise FluxError(f"{path} is {kind}, not safetensors: {CONVERT_PICKLE}")
    if start.lstrip()[:1] == b"<" or start[:7] == b"version":
        raise FluxError(f"{path} is a web page or a Git LFS pointer, not the model; download the file itself")
    if size < PREFIX + 2:
        raise _broken(path, f"it is only {size} bytes long")


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    try:
        raw = json.loads(text.decode("utf-8"), object_pairs_hook=lambda pairs: _unique(path, pairs))
    except FluxError:
        raise
    except (ValueError, RecursionError) as error:  # bad UTF-8, bad JSON, absurd numbers, absurd nesting
        raise _broken(path, "its header is not JSON") from error
    if not isinstance(raw, dict):
        raise _broken(path, "its header is not a JSON object")
    return raw


def _unique(path: Path, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _broken(path, "its header names a tensor twice")
    return found


def _metadata(path: Path, raw: Any) -> dict[str, str]:
    if raw is None:
        return {}
    if not isinstance(raw, dict) or not all(isinstance(v, str) for v in raw.values()):
        raise _broken(path, "its metadata is not a table of texts")
    return raw


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**63  # a bool or a float is no size


def _entry(path: Path, name: str, raw: Any, data_start: int) -> Entry:
    """Check one tensor's dtype, shape and byte range against each other."""
    shown = repr(name[:80])
    if not name.isprintable() or len(name) > MAX_NAME:  # it will be shown on terminals and in browsers
        raise _broken(path, f"the tensor name {name[:80]!a} is not plain text")
    if not isinstance(raw, dict) or not {"dtype", "shape", "data_offsets"} <= raw.keys():
        raise _broken(path, f"the entry of tensor {shown} lacks dtype, shape or data_offsets")
    dtype, shape, offsets = raw["dtype"], raw["shape"], raw["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise FluxError(
            f"{path} stores tensor {shown} as {str(dtype)[:40]!r}, a type that is not known here; use another file"
        )
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_is_size, shape)):
        raise _broken(path, f"the shape of tensor {shown} is not a short list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_is_size, offsets)):
        raise _broken(path, f"the byte range of tensor {shown} is not two offsets")
    start, end = offsets
    if math.prod(shape) * DTYPE_BITS[dtype] != (end - start) * 8:
        raise _broken(
            path, f"tensor {shown} of shape {shape} as {dtype} does not take the {end - start:,} bytes it is given"
        )
    return Entry(dtype, tuple(shape), data_start + start, data_start + end)


def _check_cover(path: Path, entries: Mapping[str, Entry], data_start: int, size: int) -> None:
    """The ranges must follow each other without hole or overlap up to the end of the file."""
    position = data_start
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.end > size:
            raise _broken(path, f"tensor {name[:80]!r} would end at byte {entry.end:,} of {size:,}")
        if entry.start != position:
            raise _broken(path, f"tensor {name[:80]!r} starts at byte {entry.start:,} where {position:,} was due")
        position = entry.end
    if position != size:
        raise _broken(path, f"its tensors end at byte {position:,} but the file is {size:,} bytes long")
