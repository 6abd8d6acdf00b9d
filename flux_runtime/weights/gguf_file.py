"""GGUF files, read without trusting a word of them: every count, length and offset is checked before it is used.

Layout (all little-endian): `GGUF`, version, number of tensors, number of metadata entries; the metadata (name, type,
value); for each tensor its name, dimensions (the fastest first), type and offset; then, aligned, the data.
"""

from __future__ import annotations

import math
import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..errors import FluxError
from ..quant.gguf_blocks import FORMATS
from .files import LazyTensor, Packing, Stored, TensorFile
from .header import DTYPE_BITS, MAX_HEADER, MAX_NAME, Entry, Header

MAX_ENTRIES = 100_000  # tensors, and metadata entries; FLUX.1 has 780 tensors
MAX_ITEMS = 2_000_000  # texts in all lists together; the largest vocabularies have some 700,000
MAX_RANK = 8
MAX_NESTING = 3
MAX_TEXT = 256  # longer values (licences, chat templates) are passed over
MAX_LIST = 8  # longer lists (vocabularies) are passed over

PLAIN = {0: "F32", 1: "F16", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 30: "BF16"}
PACKED = {2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
          14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS"}  # fmt: skip
UNREAD = {  # types that are told but not unpacked: name, numbers of a block, bytes of a block
    9: ("Q8_1", 32, 36), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}  # fmt: skip
TYPES = (
    {number: (name, 1, DTYPE_BITS[name] // 8) for number, name in PLAIN.items()}
    | {number: (name, FORMATS[name].numbers, FORMATS[name].size) for number, name in PACKED.items()}
    | UNREAD
)

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
UINT32, TEXT, LIST = 4, 8, 9
ALIGNMENT = "general.alignment"
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."  # of a tensor that was reshaped to make whole blocks


class GGUFFile(TensorFile):
    """One GGUF file: header checked on opening, data mapped privately; packed tensors are read as their bytes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header = read_gguf_header(path)

    def read(self, name: str) -> Tensor:
        """A plain tensor as it is; of a packed one the bytes (rows, bytes of a row).

        Where the rows are not whole blocks, all its bytes are one row. Raises `FluxError` for a type that is not read.
        """
        entry = self.header.entries[name]
        if entry.dtype in DTYPE_BITS:
            return super().read(name)
        form = FORMATS.get(entry.dtype)
        if form is None:
            raise FluxError(
                f"{self.path}: tensor {name!r} is stored as {entry.dtype}, a GGUF type that is not read; use a file of "
                f"the same model with these: F32, F16, BF16, {', '.join(FORMATS)}"
            )
        row = math.prod(entry.shape[1:])
        whole = len(entry.shape) > 1 and row % form.numbers == 0
        shape = (entry.shape[0], row // form.numbers * form.size) if whole else (1, entry.nbytes)
        storage = self._storage[entry.start : entry.end]
        if storage.data_ptr() % 2:  # blocks hold float16 numbers
            storage = storage.clone()
        return torch.empty(0, dtype=torch.uint8).set_(storage, 0, shape)

    def tensors(self) -> dict[str, LazyTensor]:
        """All tensors of the file by name, each of the shape that its numbers have."""
        return {
            name: LazyTensor.whole(Stored(name, entry.dtype, entry.shape, self, _packing(entry.dtype)))
            for name, entry in self.header.entries.items()
        }


def _packing(dtype: str) -> Packing | None:
    return None if dtype in DTYPE_BITS else Packing("gguf", {}, {"type": dtype})


def read_gguf_header(path: Path) -> Header:
    """Read and check the header of a GGUF file; what is no whole one is a `FluxError` naming file and remedy.

    Dtypes are safetensors' names for plain tensors and ggml's for packed ones; the metadata keeps numbers and short
    texts, all as texts.
    """
    if path.is_dir():
        raise FluxError(f"{path} is a folder where a .gguf file is needed; name a file inside it")
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size < 24:
                _broken(path, f"it is only {size} bytes long")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _header(_Cursor(path, data))
    except OSError as error:
        raise FluxError(
            f"{path} cannot be read ({error.strerror or error}); check the path and its permissions"
        ) from error


def _broken(path: Path, why: str) -> NoReturn:
    raise FluxError(f"{path} is not a whole GGUF file: {why}; download it again")


class _Cursor:
    """A place in the header that only moves forward, and never past its end."""

    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.size = path, data, len(data)
        self.position = 0
        self.end = min(self.size, MAX_HEADER)
        self.items = MAX_ITEMS

    def skip(self, count: int) -> int:
        """Go `count` bytes on; gives where they start."""
        start = self.position
        if count > self.end - start:
            _broken(self.path, f"its header ends in the middle, at byte {self.end:,} of {self.size:,}")
        self.position = start + count
        return start

    def number(self, code: str) -> Any:
        return struct.unpack_from("<" + code, self.data, self.skip(struct.calcsize("<" + code)))[0]

    def text(self, limit: int) -> str | None:
        """A text, or None where it is longer than `limit` bytes or no plain text."""
        length = self.number("Q")
        start = self.skip(length)
        if length > limit:
            return None
        try:
            text = self.data[start : start + length].decode("utf-8")
        except UnicodeDecodeError:
            return None
        return text if text.isprintable() else None

    def skip_texts(self, count: int) -> None:
        """Go past so many texts, whatever they are; vocabularies have hundreds of thousands."""
        length_at = struct.Struct("<Q").unpack_from
        for _ in range(count):
            self.skip(length_at(self.data, self.skip(8))[0])

    def name(self, what: str) -> str:
        name = self.text(MAX_NAME)
        if name is None:  # it will be shown on terminals and in browsers
            _broken(self.path, f"the name of a {what} is not plain text of at most {MAX_NAME} bytes")
        return name

    def count(self, what: str) -> int:
        count = self.number("Q")
        if count > MAX_ENTRIES:
            _broken(self.path, f"it claims {count:,} {what}")
        return count


def _header(cursor: _Cursor) -> Header:
    _check_version(cursor)
    tensors, entries = cursor.count("tensors"), cursor.count("metadata entries")
    values = _metadata(cursor, entries)
    alignment = values.get(ALIGNMENT, 32)
    infos = [_tensor_info(cursor) for _ in range(tensors)]
    data_start = -(-cursor.position // alignment) * alignment
    found: dict[str, Entry] = {}
    for name, dims, kind, offset in infos:
        if name in found:
            _broken(cursor.path, f"its header names tensor {name[:80]!r} twice")
        if offset % alignment:
            _broken(cursor.path, f"tensor {name[:80]!r} starts at offset {offset:,}, which is not aligned")
        original = values.get(ORIGINAL_SHAPE + name)
        found[name] = _entry(cursor.path, name, dims, kind, data_start + offset, original)
    _check_ranges(cursor.path, found, cursor.size)
    metadata = {key: str(value) for key, value in values.items() if not isinstance(value, tuple)}
    return Header(found, metadata, cursor.size)


def _check_version(cursor: _Cursor) -> None:
    if cursor.number("4s") != b"GGUF":
        raise FluxError(f"{cursor.path} is not a GGUF file; check what it is, or download it again")
    version = cursor.number("I")
    if version in (2, 3):
        return
    if version and not version & 0xFFFF:
        fault = "for big-endian machines"
    else:
        fault = f"of version {version}, where 2 and 3 are read"
    raise FluxError(f"{cursor.path} is a GGUF file {fault}; use another file of the model")


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    values: dict[str, Any] = {}
    seen = set()
    for _ in range(count):
        key = cursor.name("metadata entry")
        if key in seen:
            _broken(cursor.path, f"its header names {key[:80]!r} twice")
        seen.add(key)
        kind = cursor.number("I")
        value = _value(cursor, kind)
        if key == ALIGNMENT and (kind != UINT32 or value.bit_count() != 1):
            _broken(cursor.path, f"its alignment, {str(value)[:40]}, is not a power of two")
        if value is not None:
            values[key] = value
    return values


def _value(cursor: _Cursor, kind: int) -> Any:
    """A number, a short text or a tuple of a few numbers; None for whatever else is passed over."""
    if kind in SCALARS:
        return cursor.number(SCALARS[kind])
    if kind == TEXT:
        return cursor.text(MAX_TEXT)
    _known(cursor, kind)
    inner, count = cursor.number("I"), cursor.number("Q")
    if inner in SCALARS and count <= MAX_LIST:
        return tuple(cursor.number(SCALARS[inner]) for _ in range(count))
    _skip_items(cursor, inner, count, 1)
    return None


def _known(cursor: _Cursor, kind: int) -> None:
    if kind not in (*SCALARS, TEXT, LIST):
        _broken(cursor.path, f"it has a metadata value of type {kind}")


def _skip_items(cursor: _Cursor, kind: int, count: int, depth: int) -> None:
    """Go past the items of a list."""
    if kind in SCALARS:
        cursor.skip(count * struct.calcsize("<" + SCALARS[kind]))
        return
    _known(cursor, kind)
    cursor.items -= count
    if cursor.items < 0:
        _broken(cursor.path, f"a list in it claims {count:,} items")
    if kind == LIST and depth == MAX_NESTING:
        _broken(cursor.path, "it has lists in lists in lists")
    if kind == TEXT:
        cursor.skip_texts(count)
        return
    for _ in range(count):
        _skip_items(cursor, cursor.number("I"), cursor.number("Q"), depth + 1)


def _tensor_info(cursor: _Cursor) -> tuple[str, tuple[int, ...], int, int]:
    """Name, dimensions, number of the type, offset."""
    name = cursor.name("tensor")
    rank = cursor.number("I")
    if rank > MAX_RANK:
        _broken(cursor.path, f"tensor {name[:80]!r} claims {rank:,} dimensions")
    dims = tuple(cursor.number("Q") for _ in range(rank))
    return name, dims, cursor.number("I"), cursor.number("Q")


def _entry(path: Path, name: str, dims: tuple[int, ...], kind: int, start: int, original: Any) -> Entry:
    shown = repr(name[:80])
    if kind not in TYPES:
        raise FluxError(
            f"{path} stores tensor {shown} as GGUF type {kind}, which is not known here; use another file of the model"
        )
    dtype, numbers, size = TYPES[kind]
    total = math.prod(dims)
    if (dims[0] if dims else 1) % numbers:
        _broken(path, f"tensor {shown} of dimensions {list(dims)} is not made of whole {dtype} blocks of {numbers}")
    shape = dims[::-1] if original is None else _original_shape(path, shown, original, total)
    return Entry(dtype, shape, start, start + total // numbers * size)


def _original_shape(path: Path, shown: str, original: Any, total: int) -> tuple[int, ...]:
    sizes = isinstance(original, tuple) and all(type(n) is int and n >= 0 for n in original)
    if not sizes or math.prod(original) != total:
        _broken(path, f"the original shape of tensor {shown} does not go with its {total:,} numbers")
    return original


def _check_ranges(path: Path, entries: Mapping[str, Entry], size: int) -> None:
    """The ranges must lie inside the file and apart from each other; gaps between them are only alignment."""
    position = 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
        if entry.end > size:
            _broken(path, f"tensor {name[:80]!r} would end at byte {entry.end:,} of {size:,}")
        if entry.start < position:
            _broken(
                path, f"tensor {name[:80]!r} starts at byte {entry.start:,}, inside another that ends at {position:,}"
            )
        position = entry.end
