"""Tensors in files, mapped into memory and read only when they are used.

A `LazyTensor` is rows of stored tensors, one after the other: a stored tensor as it is, several joined (q, k and v of
a diffusers file), or halves exchanged. Renaming, splitting and joining therefore cost nothing until a tensor is read.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..errors import FluxError
from .header import CONVERT_PICKLE, DTYPE_BITS, Header, is_gguf, read_header

if TYPE_CHECKING:
    from .gguf_file import GGUFFile

WEIGHT_ENDINGS = (".safetensors", ".sft", ".gguf")
ABSURD = 1e9  # numbers of configs are far smaller
MAX_JSON = 64_000_000  # bytes of an index or a config; real ones are below 1 MB

_TORCH_NAMES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "U16": "uint16", "I32": "int32", "U32": "uint32",
    "I64": "int64", "U64": "uint64", "F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64",
    "C64": "complex64", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz", "F8_E8M0": "float8_e8m0fnu",
}  # fmt: skip
TORCH_DTYPES = {name: getattr(torch, attr) for name, attr in _TORCH_NAMES.items() if hasattr(torch, attr)}


class TensorFile:
    """One safetensors file: header checked on opening, data mapped privately (writing to a tensor spares the file)."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.header: Header = read_header(path)

    @cached_property
    def _storage(self) -> torch.UntypedStorage:
        return torch.UntypedStorage.from_file(str(self.path), shared=False, nbytes=self.header.size)

    def read(self, name: str) -> Tensor:
        """The tensor as a view of the mapped file; a copy only where the file does not align it to its element size."""
        entry = self.header.entries[name]
        dtype = TORCH_DTYPES.get(entry.dtype)
        if dtype is None:
            raise FluxError(f"{self.path}: tensor {name!r} is stored as {entry.dtype}, which this PyTorch cannot read")
        if entry.nbytes == 0:
            return torch.empty(entry.shape, dtype=dtype)
        storage = self._storage[entry.start : entry.end]
        if storage.data_ptr() % dtype.itemsize:
            storage = storage.clone()
        return torch.empty(0, dtype=dtype).set_(storage, 0, entry.shape)

    @property
    def metadata(self) -> Mapping[str, str]:
        return self.header.metadata

    def nbytes_of(self, name: str) -> int:
        return self.header.entries[name].nbytes

    def tensors(self) -> dict[str, LazyTensor]:
        """All tensors of the file by name."""
        return {n: LazyTensor.whole(Stored(n, e.dtype, e.shape, self)) for n, e in self.header.entries.items()}


class Source(Protocol):
    """An open file of whatever format: it gives the bytes of a tensor and says how many they are."""

    path: Path

    def read(self, name: str) -> Tensor: ...

    def nbytes_of(self, name: str) -> int: ...


@dataclass(frozen=True, eq=False)
class Packing:
    """How a weight is packed: the scheme that reads it, the tensors beside it by name, and facts such as a type."""

    scheme: str  # a key of quant.READERS
    sides: Mapping[str, Stored] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def title(self) -> str:
        """The scheme and its kind, for reports: `gguf Q4_K`, `bnb-4bit nf4`, `scaled fp8`."""
        scaled = "scaled " if "scale_weight" in self.sides else ""
        kind = self.facts.get("type") or self.facts.get("kind") or ""
        return f"{scaled}{self.scheme} {kind}".strip()


@dataclass(frozen=True)
class Stored:
    """A tensor as some file has it; without `file` only its description is known (a header read over the network).

    Where it is packed, `shape` is that of the numbers it stands for, and `read` gives the bytes as the file has them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Source | None = None
    packing: Packing | None = None

    @property
    def parameters(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        beside = sum(side.nbytes for side in self.packing.sides.values()) if self.packing else 0
        if self.file is not None:
            return self.file.nbytes_of(self.name) + beside
        return self.parameters * DTYPE_BITS[self.dtype] // 8 + beside

    def read(self) -> Tensor:
        if self.file is None:
            raise FluxError(f"only the description of tensor {self.name!r} is known; load the model from its files")
        return self.file.read(self.name)


@dataclass(frozen=True)
class Piece:
    """Rows `start` to `stop` of a stored tensor."""

    stored: Stored
    start: int
    stop: int

    @property
    def whole(self) -> bool:
        return (self.start, self.stop) == (0, self.stored.shape[0] if self.stored.shape else 1)

    def read(self, dtype: torch.dtype | None = None) -> Tensor:
        """As stored; a packed one as the numbers it stands for, in `dtype`."""
        if not self.stored.packing:
            return self.stored.read() if self.whole else self.stored.read()[self.start : self.stop]
        from ..quant.readers import unpack

        return unpack(self.stored).dequantise(dtype or torch.float32)[self.start : self.stop]


@dataclass(frozen=True)
class LazyTensor:
    """Rows of stored tensors, joined in order and seen in `shape`."""

    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]

    @classmethod
    def whole(cls, stored: Stored) -> LazyTensor:
        return cls((Piece(stored, 0, stored.shape[0] if stored.shape else 1),), stored.shape)

    @property
    def dtype(self) -> str:
        return self.pieces[0].stored.dtype

    @property
    def sources(self) -> tuple[Stored, ...]:
        return tuple(piece.stored for piece in self.pieces)

    @property
    def packed(self) -> bool:
        """Whether any of it must be unpacked to be numbers."""
        return any(piece.stored.packing for piece in self.pieces)

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Some rows of a tensor in one piece."""
        (piece,) = self.pieces
        part = replace(piece, start=piece.start + start, stop=piece.start + stop)
        return LazyTensor((part,), (stop - start, *self.shape[1:]))

    def viewed(self, shape: tuple[int, ...]) -> LazyTensor:
        """The same numbers in another shape with the same rows."""
        return replace(self, shape=shape)

    def read(self, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """The tensor on a device: the mapped memory itself if nothing changes, else one new tensor, filled in place."""
        if len(self.pieces) == 1:
            return self.pieces[0].read(dtype).to(device=device, dtype=dtype).view(self.shape)
        out = torch.empty(self.shape, device=device, dtype=dtype or self._plain_dtype)
        row = 0
        for piece in self.pieces:
            rows = piece.stop - piece.start
            out[row : row + rows].copy_(piece.read(dtype).view(rows, *self.shape[1:]))
            row += rows
        return out

    @property
    def _plain_dtype(self) -> torch.dtype:
        return torch.float32 if self.packed else TORCH_DTYPES[self.dtype]


def join(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors below each other; their shapes must agree in all but the number of rows."""
    tails = {part.shape[1:] for part in parts}
    if len(tails) != 1 or any(not part.shape for part in parts):
        shapes = ", ".join(f"{part.sources[0].name} {list(part.shape)}" for part in parts)
        raise FluxError(f"tensors that belong together do not fit: {shapes}; the file is damaged or of another model")
    rows = sum(part.shape[0] for part in parts)
    return LazyTensor(tuple(piece for part in parts for piece in part.pieces), (rows, *tails.pop()))


def read_json(path: Path) -> dict[str, Any]:
    """A small JSON object from a file; anything else is a `FluxError` that names the file."""
    try:
        if path.stat().st_size > MAX_JSON:
            raise FluxError(f"{path} is far too large for what it should be; download it again")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise FluxError(f"{path} cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, FluxError):
            raise
        raise FluxError(f"{path} is not valid JSON; download it again") from error
    if not isinstance(value, dict):
        raise FluxError(f"{path} is not a JSON object; download it again")
    return value


def number_in(config: Mapping[str, Any], name: str, default: float) -> float:
    """A number that a config names; the default for none, and for 0, NaN and what is larger than any model's."""
    value = config.get(name)
    return value if isinstance(value, (int, float)) and 0 < abs(value) < ABSURD else default


WEIGHT_NAMES = ("diffusion_pytorch_model", "model")  # diffusers' and transformers' names of a component's weights
_PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def component_files(folder: Path) -> list[Path]:
    """The weight files of a component folder: shards by their index, or one file; plain, or a variant (`.fp16`)."""
    for stem in WEIGHT_NAMES:
        for index in _variants(folder, stem, ".safetensors.index", ".json"):
            return _shards(folder, index)
        for file in _variants(folder, stem, "", ".safetensors"):
            return [file]
    others = sorted(p for p in folder.glob("*.safetensors") if "-of-" not in p.name)
    if len(others) == 1:
        return others
    if not others and any(p.suffix in _PICKLES for p in folder.iterdir()):
        raise FluxError(f"{folder} has its weights only as a pickle: {CONVERT_PICKLE}")
    found = (
        f"several: {', '.join(p.name for p in others[:5])}; name one of them" if others else "none; download it again"
    )
    raise FluxError(f"{folder} should hold one model's .safetensors weights and has {found}")


def _variants(folder: Path, stem: str, middle: str, ending: str) -> Iterator[Path]:
    """The plain file first, then variants (`stem.fp16.safetensors`, `stem.safetensors.index.fp16.json`) by name."""
    plain = folder / (stem + middle + ending)
    if plain.is_file():
        yield plain
    variant = re.compile(re.escape(stem + middle) + r"\.[\w]+" + re.escape(ending))
    yield from sorted(path for path in folder.iterdir() if variant.fullmatch(path.name))


def _shards(folder: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise FluxError(f"{index} has no weight_map; download it again")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:  # an index must not lead out of its folder
            raise FluxError(
                f"{index} points at {name!r}, outside its folder; download the model from a source you trust"
            )
        if not (folder / name).is_file():
            raise FluxError(
                f"{folder / name} is missing: {index.name} lists it as one of {len(names)} files; download it"
            )
    return [folder / name for name in names]


def open_tensors(files: Sequence[Path]) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """All tensors of some files (the shards of one component) and their metadata; a name in two files is an error."""
    tensors: dict[str, LazyTensor] = {}
    metadata: dict[str, str] = {}
    for path in files:
        file = _open(path)
        own = file.tensors()
        twice = next((name for name in own if name in tensors), None)
        if twice is not None:
            raise FluxError(
                f"{path} holds tensor {twice!r} that another file of its folder holds too; download the folder again"
            )
        tensors.update(own)
        metadata.update(file.metadata)
    return tensors, metadata


def _open(path: Path) -> TensorFile | GGUFFile:
    """A file by its first bytes, whatever it is called."""
    from .gguf_file import GGUFFile

    return GGUFFile(path) if is_gguf(path) else TensorFile(path)


def stored_bytes(tensors: Mapping[str, LazyTensor]) -> int:
    """Bytes that these tensors take in their files."""
    return sum(stored.nbytes for tensor in tensors.values() for stored in tensor.sources)
