"""Writing a model, packed or plain, to one safetensors file that loads back to the same bytes; and the reading half.

A packed layer's tensors get the names that its scheme's own files use, so that other programs read fp8 and
bitsandbytes files. What those names leave open (the shape of a 4-bit weight, which of a layer's tensors belong
together) stands in the header, under `HEADER`: a JSON object of layers, each a list of its packed pieces,
`{"scheme", "shape", "facts", "tensors"}`, where `tensors` are the names behind the layer's, the weight's first.
"""

# Nothing of `weights` is imported up here: it imports this module for `packings_from`.
from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import FluxError
from .packed import Packed, PackedLinear
from .readers import READERS

if TYPE_CHECKING:
    from ..weights.files import LazyTensor

HEADER = "fluxcanvas.packed"
MARKER = "scaled_fp8"  # ComfyUI's sign of scaled fp8: two numbers, or none where float8 products are allowed
SUFFIX = ".safetensors"
MAX_FACTS = 20

# What a scheme's `from_stored`, or a report, is told beside the tensors: fact -> attribute of the packed weight.
FACTS: dict[str, dict[str, str]] = {
    "gguf": {"type": "kind"},
    "fp8": {"matmul": "allows_matmul"},
    "bnb-4bit": {"kind": "kind"},
    "bnb-8bit": {"threshold": "threshold"},
    "quanto": {"kind": "kind"},
    "torchao": {"kind": "kind"},
}


def save_module(
    module: nn.Module,
    path: str | Path,
    *,
    overwrite: bool = False,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[float], None] | None = None,
) -> int:
    """Write a transformer (or any module, such as the T5 encoder) under its own names; the file's size in bytes.

    Nothing appears under `path` before all of it is written. Raises `FluxError` where it cannot be written, or exists.
    """
    from .write import write_tensors

    target = _checked(Path(path).expanduser(), overwrite)
    tensors, packed = contents(module)
    header = {"format": "pt", **(metadata or {}), **({HEADER: json.dumps(packed)} if packed else {})}
    return write_tensors(target, tensors, header, progress)


def _checked(path: Path, overwrite: bool) -> Path:
    if path.suffix != SUFFIX:
        raise FluxError(f"{path} must end in {SUFFIX}; choose such a name")
    if not path.parent.is_dir():
        raise FluxError(f"the folder {path.parent} does not exist; create it or choose another")
    if path.is_dir() or (path.exists() and not overwrite):
        raise FluxError(f"{path} exists; choose another name, or allow it to be overwritten")
    return path


def contents(module: nn.Module) -> tuple[dict[str, Tensor], dict[str, list[dict[str, Any]]]]:
    """A module's tensors by the names they have in a file, and what the header says of its packed layers."""
    tensors: dict[str, Tensor] = {}
    packed: dict[str, list[dict[str, Any]]] = {}
    for layer, linear in module.named_modules():
        if isinstance(linear, PackedLinear):
            packed[layer] = [_add_piece(tensors, layer, linear, index) for index in range(len(linear.packs))]
    seen: set[int] = set()
    for name, tensor in module.state_dict(keep_vars=True).items():
        if not _inside(name, packed) and id(tensor) not in seen:  # T5's embedding has two names
            tensors[name] = tensor.detach()
            seen.add(id(tensor))
    marker = _marker(module)
    return (tensors if marker is None else {**tensors, MARKER: marker}), packed


def _inside(name: str, packed: Mapping[str, Any]) -> bool:
    layer, _, rest = name.partition(".packs.")
    return bool(rest) and layer in packed


def _add_piece(tensors: dict[str, Tensor], layer: str, linear: PackedLinear, index: int) -> dict[str, Any]:
    pack: Packed = linear.packs[index]
    middle = f"packs.{index}." if len(linear.packs) > 1 else ""
    own = {middle + ending: tensor for ending, tensor in pack.stored().items()}
    tensors.update({f"{layer}.{ending}": tensor for ending, tensor in own.items()})
    facts = {fact: getattr(pack, attribute) for fact, attribute in FACTS.get(pack.reader, {}).items()}
    facts = {fact: value for fact, value in facts.items() if value is not None}
    return {"scheme": pack.reader, "shape": list(pack.shape), "facts": facts, "tensors": list(own)}


def _marker(module: nn.Module) -> Tensor | None:
    """ComfyUI's marker, where the file will have scaled fp8 under ComfyUI's names."""
    single = [m.packs[0] for m in module.modules() if isinstance(m, PackedLinear) and len(m.packs) == 1]
    packs = [pack for pack in single if pack.reader == "fp8" and "scale_weight" in pack.stored()]
    if not packs:
        return None
    allowed = all(pack.matmul or pack.allows_matmul for pack in packs)
    return torch.zeros(0 if allowed else 2).to(packs[0].stored()["weight"].dtype)


def packings_from(tensors: Mapping[str, LazyTensor], metadata: Mapping[str, str]) -> dict[str, LazyTensor]:
    """A file's tensors with the packed layers that its header names put together, as `<layer>.weight`.

    Other files' tensors come back as they are. The header is not trusted: a `FluxError` where it does not fit the file.
    """
    if HEADER not in metadata:
        return dict(tensors)
    left = dict(tensors)
    left.pop(MARKER, None)
    whole = {}
    for layer, pieces in _parse(metadata[HEADER]).items():
        whole[f"{layer}.weight"] = _joined([_piece(left, layer, piece) for piece in pieces])
    return {**left, **whole}


def _joined(parts: list[LazyTensor]) -> LazyTensor:
    from ..weights.files import join

    return join(parts) if len(parts) > 1 else parts[0]


def _piece(left: dict[str, LazyTensor], layer: str, piece: Any) -> LazyTensor:
    """One packed weight; its tensors are taken out of those that are left."""
    from ..weights.files import LazyTensor, Packing, Stored

    if not _is_sound(piece):
        raise _broken(f"describes {layer[:80]!r} in a way that is not known here")
    found = [left.pop(f"{layer}.{name}", None) for name in piece["tensors"]]
    if None in found:
        raise _broken(f"names tensors of {layer[:80]!r} that are not there")
    main, *sides = (tensor.sources[0] for tensor in found)
    endings = [_ending(name) for name in piece["tensors"]]
    packing = Packing(piece["scheme"], dict(zip(endings[1:], sides, strict=True)), piece["facts"])
    return LazyTensor.whole(Stored(main.name, main.dtype, tuple(piece["shape"]), main.file, packing))


def _ending(name: str) -> str:
    """The name without the number of the piece."""
    return name.split(".", 2)[2] if name.startswith("packs.") else name


def _parse(text: str) -> dict[str, list[Any]]:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise _broken("is not JSON") from error
    if not isinstance(raw, dict) or not all(isinstance(pieces, list) and pieces for pieces in raw.values()):
        raise _broken("is not a table of layers")
    return raw


def _is_sound(piece: Any) -> bool:
    if not isinstance(piece, dict) or not {"scheme", "shape", "facts", "tensors"} <= piece.keys():
        return False
    shape, facts, names = piece["shape"], piece["facts"], piece["tensors"]
    return (
        isinstance(piece["scheme"], str)
        and piece["scheme"] in READERS
        and isinstance(shape, list)
        and len(shape) == 2
        and all(type(size) is int and size > 0 for size in shape)
        and math.prod(shape) < 2**40
        and isinstance(facts, dict)
        and len(facts) <= MAX_FACTS
        and all(isinstance(value, str | int | float) for value in facts.values())
        and isinstance(names, list)
        and bool(names)
        and all(isinstance(name, str) and (name.count(".") > 1 or not name.startswith("packs.")) for name in names)
    )


def _broken(why: str) -> FluxError:
    return FluxError(f"the file's list of packed layers {why}; save it again from the original, or download it again")
