"""Packed weights in a file's list of tensors: what lies beside a weight to unpack it by is found and tied to it.

Schemes: fp8 (plain, and ComfyUI's scaled fp8 in all spellings) and bitsandbytes in 4 and 8 bits. What belongs to no
known scheme is left where it is, so that reports name it.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from ..errors import FluxError
from ..quant.bnb import KINDS, STATE, THRESHOLD, FourBit
from .files import LazyTensor, Packing, Stored

log = logging.getLogger("fluxcanvas")

FP8 = {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}  # safetensors' name -> ComfyUI's name of the format
# Two spellings of the scales beside a layer, and the one under which they are handed on.
SCALES = {
    "scale_weight": "scale_weight",
    "weight_scale": "scale_weight",
    "scale_input": "scale_input",
    "input_scale": "scale_input",
}
MARKER = "scaled_fp8"  # stands once before a part's layers
LAYER_MARKER = "comfy_quant"
HEADER_MARKER = "_quantization_metadata"
MAX_TEXT = 65_536  # bytes of a layer's JSON; real ones have 60
# Matrices that are looked up, not multiplied by: they never have a scale.
LOOKED_UP = ("shared.weight", "embed_tokens.weight", "_embedding.weight", "relative_attention_bias.weight")
REMEDY = "use the bf16, fp16, fp8 or GGUF file of the same model"


def gather(
    tensors: Mapping[str, LazyTensor], config: Mapping[str, Any], metadata: Mapping[str, str]
) -> dict[str, LazyTensor]:
    """The same tensors with packed weights in their logical shape, holding the tensors beside them.

    `config` is the config.json beside the file, `metadata` its header's. Raises `FluxError` where a weight and what
    lies beside it do not fit. Where only descriptions are known (`Stored.file` is None), a 4-bit weight keeps its
    stored shape and its facts say `shape_unknown`.
    """
    found = dict(tensors)
    _gather_4bit(found)
    _gather_8bit(found, config)
    _Fp8Layers(found, metadata).gather()
    return found


def _pack(tensors: dict[str, LazyTensor], name: str, packing: Packing, shape: Iterable[int] | None = None) -> None:
    stored = tensors[name].sources[0]
    tensors[name] = LazyTensor.whole(replace(stored, packing=packing, shape=tuple(shape or stored.shape)))


def _take(tensors: dict[str, LazyTensor], name: str) -> Stored:
    return tensors.pop(name).sources[0]


def _join(layer: str, ending: str) -> str:
    return f"{layer}.{ending}" if layer else ending


def _split(name: str) -> tuple[str, str]:
    """A layer's name and the rest: `a.b.scale_weight` -> `a.b`, `scale_weight`."""
    layer, _, ending = name.rpartition(".")
    return layer, ending


def _gather_4bit(tensors: dict[str, LazyTensor]) -> None:
    """bitsandbytes, 4 bits: `X.weight.absmax` and others, and JSON in `X.weight.quant_state.bitsandbytes__nf4`."""
    marks = {name: kind for name in tensors for kind in KINDS if name.endswith(STATE + kind)}
    for mark, kind in marks.items():
        layer = mark.removesuffix(STATE + kind).removesuffix(".")
        name = _join(layer, "weight")
        if name not in tensors or mark != _join(layer, STATE + kind):
            continue
        if sum(_join(layer, STATE + each) in marks for each in KINDS) > 1:
            raise FluxError(f"{name} is described by bitsandbytes twice; download the file again")
        sides = {STATE + kind: _take(tensors, mark)}
        for ending in ("absmax", "quant_map", "nested_absmax", "nested_quant_map"):
            if f"{name}.{ending}" in tensors:
                sides[f"weight.{ending}"] = _take(tensors, f"{name}.{ending}")
        shape = _shape_of_4bit(name, tensors[name].sources[0], sides, kind)
        facts = {"kind": kind} if shape else {"kind": kind, "shape_unknown": True}
        _pack(tensors, name, Packing("bnb-4bit", sides, facts), shape)
    lost = next((n for n in tensors if n.endswith("weight.absmax") and n.removesuffix(".absmax") in tensors), None)
    if lost:
        raise FluxError(
            f"{lost.removesuffix('.absmax')} is packed by bitsandbytes but its quant_state is not in the file; "
            "download it again"
        )


def _shape_of_4bit(name: str, weight: Stored, sides: Mapping[str, Stored], kind: str) -> tuple[int, int] | None:
    """What the JSON says, checked against everything else; None where it cannot be read."""
    text = sides[STATE + kind]
    if text.file is None:
        return None
    try:
        state = FourBit.parse(text.read(), weight.nbytes)
    except FluxError as error:
        raise FluxError(f"{name}: {error}") from error
    if state.kind != kind:
        raise FluxError(f"{name} is named {kind} but described as {state.kind}; download the file again")
    for side, (count, _) in state.sides.items():
        have = sides[side].parameters if side in sides else None
        if have != count:
            lacks = "is missing" if have is None else f"has {have:,} numbers instead of {count:,}"
            raise FluxError(f"{name} cannot be unpacked: {side} beside it {lacks}; download the file again")
    return state.shape


def _gather_8bit(tensors: dict[str, LazyTensor], config: Mapping[str, Any]) -> None:
    """bitsandbytes, 8 bits: `X.SCB`, one number a row, and `X.weight_format`."""
    for mark in [name for name in tensors if _split(name)[1] == "SCB"]:
        layer, _ = _split(mark)
        name = _join(layer, "weight")
        if name not in tensors:
            continue
        weight, scale = tensors[name].sources[0], tensors[mark].sources[0]
        if weight.dtype != "I8" or len(weight.shape) != 2 or scale.parameters != weight.shape[0]:
            raise FluxError(
                f"{mark} {list(scale.shape)} does not fit {name}, {list(weight.shape)} of {weight.dtype}: an int8 "
                "matrix with a number for each row is needed; download the file again"
            )
        sides = {"SCB": _take(tensors, mark)}
        if _join(layer, "weight_format") in tensors:
            sides["weight_format"] = _take(tensors, _join(layer, "weight_format"))
        _pack(tensors, name, Packing("bnb-8bit", sides, {"threshold": _threshold(config)}))


def _threshold(config: Mapping[str, Any]) -> float:
    """From which size on LLM.int8 keeps inputs as they are, if the config.json says so."""
    named = config.get("quantization_config")
    value = named.get("llm_int8_threshold") if isinstance(named, dict) else None
    return float(value) if type(value) in (int, float) and 0 <= value < 1e6 else THRESHOLD


@dataclass(frozen=True)
class _Description:
    """What a file says of a layer: its format (empty if that cannot be read) and whether it may multiply in fp8."""

    format: str
    matmul: bool


class _Fp8Layers:
    """The fp8 weights of a file, and what it says of them in tensors beside them and in its header."""

    def __init__(self, tensors: dict[str, LazyTensor], metadata: Mapping[str, str]) -> None:
        self.tensors = tensors
        self.scales: dict[str, dict[str, str]] = {}  # layer -> spelling handed on -> name in the file
        ends: dict[str, list[str]] = {ending: [] for ending in ("weight_scale_2", MARKER, LAYER_MARKER)}
        for name in tensors:
            layer, ending = _split(name)
            if ending in SCALES:
                self._note_scale(layer, SCALES[ending], name)
            elif ending in ends:
                ends[ending].append(layer)
        nvfp4 = set(ends["weight_scale_2"])  # four bits with scales of scales: left as they are
        self.scales = {layer: names for layer, names in self.scales.items() if layer not in nvfp4}
        self.markers = {layer: tensors[_join(layer, MARKER)].sources[0].parameters != 2 for layer in ends[MARKER]}
        self.said = self._header(metadata) | {layer: self._beside(layer) for layer in ends[LAYER_MARKER]}
        self.said = {layer: said for layer, said in self.said.items() if layer not in nvfp4}

    def _note_scale(self, layer: str, ending: str, name: str) -> None:
        other = self.scales.setdefault(layer, {}).setdefault(ending, name)
        if other != name:
            raise FluxError(f"{other} and {name} are scales of the same weight; download the file again")

    def gather(self) -> None:
        for layer in self.scales | self.said:
            if _join(layer, "weight") in self.tensors:
                self._pack_scaled(layer)
        for layer in self.markers:
            del self.tensors[_join(layer, MARKER)]
        self._pack_plain()

    def _pack_scaled(self, layer: str) -> None:
        name, names = _join(layer, "weight"), self.scales.get(layer, {})
        weight, said = self.tensors[name].sources[0], self.said.get(layer)
        hidden = said is not None and not said.format  # the description is there but only its name is known
        bare = said is None and "scale_weight" not in names  # a plain layer that knows the range of its inputs
        if weight.packing or ((hidden or bare) and weight.dtype not in FP8):
            return
        self._refuse_unfit(name, weight, said)
        sides = {ending: self.tensors[spelt].sources[0] for ending, spelt in names.items()}
        for ending, side in sides.items():
            if side.parameters not in ((1, weight.shape[0]) if ending == "scale_weight" else (1,)):
                raise FluxError(
                    f"{side.name} {list(side.shape)} is no scale for {name} {list(weight.shape)}: one number, or one "
                    f"for each row, is read; {REMEDY}"
                )
        for spelt in (*names.values(), _join(layer, LAYER_MARKER)):
            self.tensors.pop(spelt, None)
        _pack(self.tensors, name, Packing("fp8", sides, self._facts(layer)))

    def _refuse_unfit(self, name: str, weight: Stored, said: _Description | None) -> None:
        """A weight that is not what its scale or its description needs must not be read without them."""
        layer, stored_as = _split(name)[0], FP8.get(weight.dtype)
        if said and said.format not in ("", *FP8.values()):
            raise FluxError(f"{name} is stored as {said.format[:40]}, which is not read here; {REMEDY}")
        if stored_as is None or len(weight.shape) != 2:
            raise FluxError(
                f"{name} has a scale or a description of fp8 beside it but is {list(weight.shape)} of {weight.dtype}; "
                f"{REMEDY}"
            )
        if said and said.format and said.format != stored_as:
            raise FluxError(f"{name} is described as {said.format} but stored as {stored_as}; download the file again")
        if "scale_weight" not in self.scales.get(layer, {}):
            raise FluxError(f"{name} is stored in fp8 with a scale, and the scale is missing; download the file again")

    def _facts(self, layer: str) -> dict[str, Any]:
        """Whether this layer may be multiplied in fp8, if the file says."""
        if layer in self.said:
            return {"matmul": self.said[layer].matmul}
        marker = self._marker(layer)
        return {} if marker is None else {"matmul": self.markers[marker]}

    def _marker(self, layer: str) -> str | None:
        """The prefix whose marker speaks for a layer."""
        own = [prefix for prefix in self.markers if not prefix or layer.startswith(prefix + ".")]
        return max(own, key=len, default=None)

    def _pack_plain(self) -> None:
        """fp8 matrices without a scale; those whose namesakes in other blocks have one have lost theirs."""
        plain = [name for name, tensor in self.tensors.items() if self._is_plain(name, tensor)]
        scaled = {_kind(_join(layer, "weight")) for layer in self.scales}
        lost = [name for name in plain if _kind(name) in scaled]
        if lost:
            raise FluxError(
                f"{len(lost)} fp8 weights lack the scale that their like in other blocks have, {lost[0]} first; "
                "download the file again"
            )
        bare = [n for n in plain if self._marker(_split(n)[0]) is not None and not n.endswith(LOOKED_UP)]
        if bare:
            log.warning(
                "%d fp8 weights of a scaled fp8 file have no scale and are read with scale 1: %s ...",
                len(bare), ", ".join(bare[:3]),
            )  # fmt: skip
        for name in plain:
            _pack(self.tensors, name, Packing("fp8"))

    @staticmethod
    def _is_plain(name: str, tensor: LazyTensor) -> bool:
        fp8 = tensor.dtype in FP8 and len(tensor.shape) == 2 and not tensor.packed
        return fp8 and _split(name)[1] == "weight"

    def _beside(self, layer: str) -> _Description:
        """What the JSON beside a layer says of it."""
        text = self.tensors[_join(layer, LAYER_MARKER)].sources[0]
        if text.file is None:
            return _Description("", False)
        if text.dtype != "U8" or text.nbytes > MAX_TEXT:
            raise FluxError(f"{text.name} is no short text; download the file again")
        return _description(text.name, _json(text.name, bytes(text.read().flatten().tolist())))

    def _header(self, metadata: Mapping[str, str]) -> dict[str, _Description]:
        """What the header says of layers, whose names may lack the prefix that the tensors have."""
        if HEADER_MARKER not in metadata:
            return {}
        layers = _json(HEADER_MARKER, metadata[HEADER_MARKER]).get("layers")
        if not isinstance(layers, dict):
            raise FluxError(f"{HEADER_MARKER} in the header lists no layers; download the file again")
        found: dict[str, _Description] = {}
        for prefix in self._prefixes(layers):
            for layer, raw in layers.items():
                if _join(prefix + layer, "weight") in self.tensors:
                    found.setdefault(prefix + layer, _description(prefix + layer, raw))
        return found

    def _prefixes(self, layers: Mapping[str, Any]) -> list[str]:
        """Prefixes under which the first listed layer that the file has stands in it."""
        for layer in layers:
            tail = _join(layer, "weight")
            starts = [name.removesuffix(tail) for name in self.tensors if name.endswith(tail)]
            starts = sorted((start for start in starts if not start or start.endswith(".")), key=len)
            if starts:
                return starts
        return []


def _kind(name: str) -> str:
    """A name without its numbers: the same for the same layer of every block."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "{}", name)


def _json(name: str, text: str | bytes) -> dict[str, Any]:
    try:
        raw = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FluxError(f"{name} is not JSON; download the file again") from error
    if not isinstance(raw, dict):
        raise FluxError(f"{name} is not a JSON object; download the file again")
    return raw


def _description(name: str, raw: Any) -> _Description:
    form = raw.get("format") if isinstance(raw, dict) else None
    if not isinstance(form, str) or not form:
        raise FluxError(f"{name}: the description of its packing names no format; download the file again")
    return _Description(form, raw.get("full_precision_matrix_mult") is not True)
