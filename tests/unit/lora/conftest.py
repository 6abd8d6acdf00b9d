"""LoRA files made from code, and what their patches amount to."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fluxcanvas.flux_runtime import FluxParams
from fluxcanvas.flux_runtime.lora.formats import Lora, read_lora
from fluxcanvas.flux_runtime.model.transformer import FluxTransformer
from fluxcanvas.flux_runtime.quant.gguf import Gguf
from fluxcanvas.flux_runtime.quant.packed import PackedLinear
from fluxcanvas.flux_runtime.quant.swap import quantise, sharing_copy

WIDTH, MLP = 8, 32
# (out, in) of a model of width 8, by the ends of native names.
SIZES = {
    "img_in": (8, 4), "txt_in": (8, 6), "final_layer.linear": (4, 8), "final_layer.adaLN_modulation.1": (16, 8),
    "time_in.in_layer": (8, 16), "time_in.out_layer": (8, 8), "vector_in.in_layer": (8, 5),
    "vector_in.out_layer": (8, 8), "guidance_in.in_layer": (8, 16), "guidance_in.out_layer": (8, 8),
    "attn.qkv": (24, 8), "attn.proj": (8, 8), "mlp.0": (32, 8), "mlp.2": (8, 32), "_mod.lin": (48, 8),
    "linear1": (56, 8), "linear2": (8, 40), "modulation.lin": (24, 8),
}  # fmt: skip


def native_layers(double: int = 2, single: int = 2) -> list[str]:
    """All linear layers of a FLUX.1 transformer."""
    heads = [name for name in SIZES if name[0] != "_" and name.split(".")[0].endswith(("_in", "_layer"))]
    ends = ("attn.qkv", "attn.proj", "mlp.0", "mlp.2", "mod.lin")
    doubles = [f"double_blocks.{i}.{stream}_{end}" for i in range(double) for stream in ("img", "txt") for end in ends]
    singles = [f"single_blocks.{i}.{end}" for i in range(single) for end in ("linear1", "linear2", "modulation.lin")]
    return heads + doubles + singles


def size_of(layer: str) -> tuple[int, int]:
    return next(size for end, size in SIZES.items() if layer.endswith(end))


@pytest.fixture
def layers() -> list[str]:
    return native_layers()


@pytest.fixture
def size() -> Callable[[str], tuple[int, int]]:
    return size_of


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., Lora]:
    """`read(tensors, metadata=None, name="x.safetensors")` writes a file and reads it as a LoRA."""

    def write_and_read(
        tensors: Mapping[str, Tensor], metadata: dict[str, str] | None = None, name: str = "x.safetensors"
    ) -> Lora:
        save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, tmp_path / name, metadata=metadata)
        return read_lora(tmp_path / name)

    return write_and_read


@pytest.fixture
def deltas() -> Callable[..., dict[str, Tensor]]:
    """`deltas(lora, part="transformer", sizes=None)`: the whole change of each layer, summed from its patches."""

    def summed(lora: Lora, part: str = "transformer", weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        return {name: _sum(name, some, weights) for name, some in lora.layers.get(part, {}).items()}

    return summed


def _sum(name: str, patches: Sequence, weights: Mapping[str, Tensor] | None) -> Tensor:
    """Rows that no patch speaks of are left at zero."""
    rows = max(patch.rows[1] if patch.rows else patch.shape[0] for patch in patches)
    if weights is not None:
        rows = weights[name].shape[0]
    whole = torch.zeros(rows, max(patch.shape[1] for patch in patches))
    for patch in patches:
        part = slice(*patch.rows) if patch.rows else slice(None)
        weight = whole[part] if weights is None else weights[name][part].float()
        whole[part] += patch.delta(weight)
    return whole


@pytest.fixture
def biases() -> Callable[[Lora], dict[str, Tensor]]:
    """The change of each transformer layer's bias, where there is one."""

    def summed(lora: Lora) -> dict[str, Tensor]:
        found = {}
        for name, patches in lora.layers["transformer"].items():
            if all(patch.bias is not None for patch in patches):
                ordered = sorted(patches, key=lambda patch: patch.rows or (0, 0))
                found[name] = torch.cat([patch.bias.float() for patch in ordered])
        return found

    return summed


@pytest.fixture
def hollow(tmp_path: Path) -> Callable[..., Path]:
    """`hollow(shapes)` writes a file of these real sizes that is zeros but for alphas of 2, and takes no disk."""

    def write(shapes: Mapping[str, Sequence[int]], name: str = "real.safetensors") -> Path:
        entries, position, alphas = {}, 0, []
        for key, shape in shapes.items():
            length = 4 if not shape else 2 * math.prod(shape)
            alphas += [position] if not shape else []
            entries[key] = {
                "dtype": "F32" if not shape else "BF16",
                "shape": list(shape),
                "data_offsets": [position, position + length],
            }
            position += length
        header = json.dumps(entries).encode()
        with (tmp_path / name).open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            start = file.tell()
            file.truncate(start + position)
            for place in alphas:
                file.seek(start + place)
                file.write(struct.pack("<f", 2.0))
        return tmp_path / name

    return write


TINY = FluxParams(
    vec_in_dim=32,
    context_in_dim=32,
    hidden_size=64,
    num_heads=2,
    mlp_hidden=256,
    depth=2,
    depth_single=2,
    axes_dim=(4, 14, 14),
)


def plain(dtype: torch.dtype = torch.float32) -> FluxTransformer:
    torch.manual_seed(0)
    model = FluxTransformer(TINY)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval().requires_grad_(False)


def as_gguf(model: FluxTransformer) -> FluxTransformer:
    gguf = pytest.importorskip("gguf", reason="the test extra installs gguf, which packs the weights here")
    packed = {}
    for name, layer in model.named_modules():
        if isinstance(layer, torch.nn.Linear):
            blocks = gguf.quants.quantize(layer.weight.numpy(), gguf.GGMLQuantizationType.Q8_0)
            weight = torch.from_numpy(np.ascontiguousarray(blocks))
            packed[name] = PackedLinear(
                [Gguf.from_stored(weight, {}, tuple(layer.weight.shape), {"type": "Q8_0"})], layer.bias
            )
    return sharing_copy(model, packed)


@pytest.fixture(scope="module")
def model_of():
    """`model_of(kind)` -> a tiny transformer whose weights are stored so."""

    def make(kind: str) -> FluxTransformer:
        if kind in ("float32", "bfloat16"):
            return plain(getattr(torch, kind))
        return as_gguf(plain()) if kind == "gguf" else quantise(plain(), kind)[0]

    return make
