"""Tensor names of the two layouts as tables: the original (BFL), native here, and diffusers'.

`{}` stands for a number, `*` for `weight` or `bias`, `{n-i}` for a number counted from the other end.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from ..errors import FluxError
from .files import LazyTensor, join

TRANSFORMER_DIRECT = {
    "img_in.*": "x_embedder.*",
    "txt_in.*": "context_embedder.*",
    "time_in.in_layer.*": "time_text_embed.timestep_embedder.linear_1.*",
    "time_in.out_layer.*": "time_text_embed.timestep_embedder.linear_2.*",
    "vector_in.in_layer.*": "time_text_embed.text_embedder.linear_1.*",
    "vector_in.out_layer.*": "time_text_embed.text_embedder.linear_2.*",
    "guidance_in.in_layer.*": "time_text_embed.guidance_embedder.linear_1.*",
    "guidance_in.out_layer.*": "time_text_embed.guidance_embedder.linear_2.*",
    "double_blocks.{}.img_mod.lin.*": "transformer_blocks.{}.norm1.linear.*",
    "double_blocks.{}.txt_mod.lin.*": "transformer_blocks.{}.norm1_context.linear.*",
    "double_blocks.{}.img_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_q.weight",
    "double_blocks.{}.img_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_k.weight",
    "double_blocks.{}.txt_attn.norm.query_norm.scale": "transformer_blocks.{}.attn.norm_added_q.weight",
    "double_blocks.{}.txt_attn.norm.key_norm.scale": "transformer_blocks.{}.attn.norm_added_k.weight",
    "double_blocks.{}.img_attn.proj.*": "transformer_blocks.{}.attn.to_out.0.*",
    "double_blocks.{}.txt_attn.proj.*": "transformer_blocks.{}.attn.to_add_out.*",
    "double_blocks.{}.img_mlp.0.*": "transformer_blocks.{}.ff.net.0.proj.*",
    "double_blocks.{}.img_mlp.2.*": "transformer_blocks.{}.ff.net.2.*",
    "double_blocks.{}.txt_mlp.0.*": "transformer_blocks.{}.ff_context.net.0.proj.*",
    "double_blocks.{}.txt_mlp.2.*": "transformer_blocks.{}.ff_context.net.2.*",
    "single_blocks.{}.modulation.lin.*": "single_transformer_blocks.{}.norm.linear.*",
    "single_blocks.{}.linear2.*": "single_transformer_blocks.{}.proj_out.*",
    "single_blocks.{}.norm.query_norm.scale": "single_transformer_blocks.{}.attn.norm_q.weight",
    "single_blocks.{}.norm.key_norm.scale": "single_transformer_blocks.{}.attn.norm_k.weight",
    "final_layer.linear.*": "proj_out.*",
}

TRANSFORMER_FUSED = {  # rows of the first are the others below each other
    "double_blocks.{}.img_attn.qkv.*": tuple(f"transformer_blocks.{{}}.attn.to_{x}.*" for x in "qkv"),
    "double_blocks.{}.txt_attn.qkv.*": tuple(f"transformer_blocks.{{}}.attn.add_{x}_proj.*" for x in "qkv"),
    "single_blocks.{}.linear1.*": (
        *(f"single_transformer_blocks.{{}}.attn.to_{x}.*" for x in "qkv"),
        "single_transformer_blocks.{}.proj_mlp.*",
    ),
}

# The one exception: rows are [shift; scale] in the original and [scale; shift] in diffusers.
TRANSFORMER_SWAPPED = {"final_layer.adaLN_modulation.1.*": "norm_out.linear.*"}


def _vae_table() -> dict[str, str]:
    table = {}
    for side, end in (("encoder", "down"), ("decoder", "up")):
        index = "{}" if end == "down" else "{n-i}"
        for name in ("conv_in", "conv_out"):
            table[f"{side}.{name}.*"] = f"{side}.{name}.*"
        table[f"{side}.norm_out.*"] = f"{side}.conv_norm_out.*"
        table[f"{side}.{end}.{{}}.{end}sample.conv.*"] = f"{side}.{end}_blocks.{index}.{end}samplers.0.conv.*"
        for name in ("norm1", "conv1", "norm2", "conv2", "nin_shortcut"):
            foreign = name.replace("nin", "conv")
            table[f"{side}.{end}.{{}}.block.{{}}.{name}.*"] = f"{side}.{end}_blocks.{index}.resnets.{{}}.{foreign}.*"
            if name != "nin_shortcut":
                table[f"{side}.mid.block_1.{name}.*"] = f"{side}.mid_block.resnets.0.{foreign}.*"
                table[f"{side}.mid.block_2.{name}.*"] = f"{side}.mid_block.resnets.1.{foreign}.*"
        table[f"{side}.mid.attn_1.norm.*"] = f"{side}.mid_block.attentions.0.group_norm.*"
    return table


# 1x1 convolutions in the original, linears in diffusers: the same numbers in another shape.
VAE_CONVOLVED = {
    f"{side}.mid.attn_1.{ours}.*": f"{side}.mid_block.attentions.0.{theirs}.*"
    for side in ("encoder", "decoder")
    for ours, theirs in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj_out", "to_out.0"))
}


class Template:
    """A name with placeholders: `match` reads their values off a name, `fill` puts values in."""

    def __init__(self, text: str) -> None:
        pattern = (
            re.escape(text).replace(r"\{\}", r"(\d+)").replace(r"\{n\-i\}", r"(\d+)").replace(r"\*", "(weight|bias)")
        )
        self._regex = re.compile(pattern)
        self._mirrored = "{n-i}" in text  # always the first placeholder
        self._format = text.replace("{n-i}", "{}").replace("*", "{}")

    def match(self, name: str, last: int) -> tuple[str, ...] | None:
        found = self._regex.fullmatch(name)
        return self._turn(found.groups(), last) if found else None

    def fill(self, values: tuple[str, ...], last: int) -> str:
        return self._format.format(*self._turn(values, last))

    def _turn(self, values: tuple[str, ...], last: int) -> tuple[str, ...]:
        return (str(last - int(values[0])), *values[1:]) if self._mirrored else values


@dataclass(frozen=True)
class Row:
    """One line of a table: a native tensor and the foreign ones it is made of."""

    native: Template
    foreign: tuple[Template, ...]
    swap: bool = False
    convolve: bool = False


@dataclass(frozen=True)
class Renamed:
    """Tensors under native names, the foreign names no row knows, and native names of which a part is missing."""

    tensors: dict[str, LazyTensor]
    unknown: list[str] = field(default_factory=list)
    incomplete: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class KeyMap:
    """The two layouts of one component; `mirror` is the native stack whose index `{n-i}` counts backwards."""

    direct: Mapping[str, str]
    fused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    swapped: Mapping[str, str] = field(default_factory=dict)
    convolved: Mapping[str, str] = field(default_factory=dict)
    mirror: tuple[str, str] | None = None  # native and foreign name of the stack

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        rows = [Row(Template(k), tuple(map(Template, v))) for k, v in self.fused.items()]
        for table, marks in ((self.direct, {}), (self.swapped, {"swap": True}), (self.convolved, {"convolve": True})):
            rows += [Row(Template(k), (Template(v),), **marks) for k, v in table.items()]
        return tuple(rows)

    def _last(self, names: Iterable[str]) -> int:
        stacks = tuple(f"{stack}." for stack in self.mirror or ())
        return (
            max((int(m) for n in names if n.startswith(stacks) and (m := _number(n, stacks))), default=0)
            if stacks
            else 0
        )

    def to_native(self, tensors: Mapping[str, LazyTensor]) -> Renamed:
        """diffusers' names -> native ones; joined, swapped and viewed lazily."""
        last = self._last(tensors)
        groups: dict[str, tuple[Row, dict[int, LazyTensor], tuple[str, ...]]] = {}
        unknown = []
        for name, tensor in tensors.items():
            hit = self._find_foreign(name, last)
            if hit is None:
                unknown.append(name)
                continue
            row, part, values = hit
            groups.setdefault(row.native.fill(values, last), (row, {}, values))[1][part] = tensor
        done, incomplete = {}, {}
        for native, (row, parts, values) in groups.items():
            lost = [t.fill(values, last) for i, t in enumerate(row.foreign) if i not in parts]
            if lost:
                incomplete[native] = lost
            else:
                done[native] = _make_native(row, native, [parts[i] for i in range(len(parts))])
        return Renamed(done, unknown, incomplete)

    def _find_foreign(self, name: str, last: int) -> tuple[Row, int, tuple[str, ...]] | None:
        for row in self.rows:
            for part, template in enumerate(row.foreign):
                values = template.match(name, last)
                if values is not None:
                    return row, part, values
        return None

    def to_foreign(self, tensors: Mapping[str, LazyTensor], hidden: int = 0) -> dict[str, LazyTensor]:
        """Native names -> diffusers' names, the exact inverse; `hidden` is the width that parts joined rows."""
        last, out = self._last(tensors), {}
        for name, tensor in tensors.items():
            for row in self.rows:
                values = row.native.match(name, last)
                if values is not None:
                    names = [template.fill(values, last) for template in row.foreign]
                    out.update(zip(names, _make_foreign(row, tensor, len(names), hidden), strict=True))
                    break
            else:
                raise FluxError(f"tensor {name!r} has no name in diffusers' layout")
        return out

    def foreign_names(self, native: str, last: int = 0) -> list[str]:
        """What diffusers calls the tensors that make up a native one (nothing for an unknown name)."""
        for row in self.rows:
            values = row.native.match(native, last)
            if values is not None:
                return [template.fill(values, last) for template in row.foreign]
        return []


def _number(name: str, stacks: tuple[str, ...]) -> str | None:
    for stack in stacks:
        if name.startswith(stack):
            number = name[len(stack) :].split(".", 1)[0]
            return number if number.isdigit() else None
    return None


def _swap_halves(tensor: LazyTensor) -> LazyTensor:
    rows = tensor.shape[0] if tensor.shape else 0
    if rows % 2:
        raise FluxError(f"tensor {tensor.sources[0].name!r} should have an even number of rows, not {rows}")
    return join([tensor.rows(rows // 2, rows), tensor.rows(0, rows // 2)])


def _make_native(row: Row, native: str, parts: list[LazyTensor]) -> LazyTensor:
    if row.swap:
        return _swap_halves(parts[0])
    if row.convolve and native.endswith(".weight") and len(parts[0].shape) == 2:
        return parts[0].viewed((*parts[0].shape, 1, 1))
    return join(parts) if len(parts) > 1 else parts[0]


def _make_foreign(row: Row, tensor: LazyTensor, count: int, hidden: int) -> list[LazyTensor]:
    if row.swap:
        return [_swap_halves(tensor)]
    if row.convolve and len(tensor.shape) == 4:
        return [tensor.viewed(tensor.shape[:2])]
    if count == 1:
        return [tensor]
    bounds = [hidden * i for i in range(count)] + [tensor.shape[0]]
    return [tensor.rows(a, b) for a, b in pairwise(bounds)]


TRANSFORMER = KeyMap(TRANSFORMER_DIRECT, TRANSFORMER_FUSED, TRANSFORMER_SWAPPED)
VAE = KeyMap(_vae_table(), convolved=VAE_CONVOLVED, mirror=("decoder.up", "decoder.up_blocks"))
