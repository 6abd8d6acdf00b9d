"""The key lists of LoRAs that people have published: every key is accounted for, and no layer is missed."""

import json
from collections import Counter

import pytest

from fluxcanvas.flux_runtime.lora.formats import read_lora
from fluxcanvas.flux_runtime.lora.patches import Kronecker, LowRank, Magnitude
from fluxcanvas.flux_runtime.weights.keys import TRANSFORMER_FUSED

EXPECTED = {  # list -> format, flavours, ranks, layers by part, norms, channels of input
    "lora_kohya": ("kohya", ("LoRA",), (16,), {"transformer": 304}, 0, 0),
    "lora_diffusers": ("diffusers", ("LoRA",), (32,), {"transformer": 304}, 0, 0),
    "lora_xlabs": ("XLabs", ("LoRA",), (16,), {"transformer": 12}, 0, 0),
    "lora_bfl_control_depth": ("BFL control", ("LoRA",), (64, 128), {"transformer": 314}, 152, 128),
    "lora_aitoolkit": ("AI-Toolkit", ("LoRA",), (16,), {"transformer": 228}, 0, 0),
    "lora_peft_base_model": ("PEFT", ("LoRA",), (4,), {"transformer": 191}, 0, 0),
    "lora_onetrainer_dora": ("OneTrainer", ("DoRA",), (4,), {"clip": 72, "t5": 168, "transformer": 114}, 0, 0),
    "lokr_bfl": ("ComfyUI", ("LoKr",), (), {"transformer": 6}, 0, 0),
}


@pytest.fixture
def keys(shared):
    return lambda name: json.loads((shared / "keys" / f"{name}.json").read_text())["shapes"]


@pytest.fixture
def real(keys, hollow):
    return lambda name: read_lora(hollow(keys(name)), name)


@pytest.mark.parametrize("name", EXPECTED)
def test_every_key_is_used(name, real, keys):
    lora = real(name)
    layout, flavours, ranks, counts, norms, channels = EXPECTED[name]
    assert (lora.format, lora.flavours, lora.ranks, lora.counts) == (layout, flavours, ranks, counts)
    assert (len(lora.norm_changes), lora.in_channels, lora.unused) == (norms, channels, ())
    assert set(lora.tensors) == set(keys(name)) and lora.total == len(keys(name))
    assert lora.name == name and f"{lora.total} of {lora.total} tensors used" in lora.summary()


@pytest.mark.parametrize("name", [name for name in EXPECTED if name != "lokr_bfl"])
def test_patches_have_the_sizes_of_flux(name, real):
    """The real list of LoKr has sizes that were made up; all others fit FLUX.1 dev to the row."""
    width, mlp = 3072, 12288
    sizes = {
        "attn.qkv": (3 * width, width), "attn.proj": (width, width), "mlp.0": (mlp, width), "mlp.2": (width, mlp),
        "_mod.lin": (6 * width, width), "linear1": (3 * width + mlp, width), "linear2": (width, width + mlp),
        "modulation.lin": (3 * width, width), "final_layer.linear": (64, width), "img_in": (width, 128),
        "txt_in": (width, 4096), "in_layer": (width, None), "out_layer": (width, width),
        "adaLN_modulation.1": (2 * width, width),
    }  # fmt: skip
    for layer, patches in real(name).layers["transformer"].items():
        out, into = next(size for end, size in sizes.items() if layer.endswith(end))
        rows = [range(*(patch.rows or (0, out))) for patch in patches]
        assert all(len(r) == patch.shape[0] for r, patch in zip(rows, patches, strict=True)), layer
        assert max(Counter(i for r in rows for i in r).values()) == 1 and max(r.stop for r in rows) <= out, layer
        assert all(into in (None, patch.shape[1]) for patch in patches), layer


def test_rows_of_joined_layers(real):
    lora = real("lora_diffusers")
    parts = [tuple(patch.rows for patch in lora.layers["transformer"][f"double_blocks.7.{s}_attn.qkv"]) for s in
             ("img", "txt")]  # fmt: skip
    assert [sorted(part) for part in parts] == [[(0, 3072), (3072, 6144), (6144, 9216)]] * 2
    single = lora.layers["transformer"]["single_blocks.37.linear1"]
    assert sorted(p.rows for p in single) == [(0, 3072), (3072, 6144), (6144, 9216), (9216, 21504)]
    assert all(isinstance(p, LowRank) and p.down.shape[1] == 3072 for p in single)
    names = {name.rsplit(".", 1)[0] for name in TRANSFORMER_FUSED}
    joined = {name.replace(name.split(".")[1], "{}", 1) for name, some in lora.layers["transformer"].items()
              if len(some) > 1}  # fmt: skip
    assert joined == names


def test_alphas_and_lengths_are_read(real):
    lora = real("lora_onetrainer_dora")
    assert all(isinstance(patch, Magnitude) and patch.change.alpha == 2.0 for patch in lora.patches)
    wide = lora.layers["t5"]["encoder.block.23.layer.1.DenseReluDense.wo"][0]
    assert wide.shape == (4096, 10240) and tuple(wide.lengths.shape) == (1, 10240)
    assert "encoder.layers.11.self_attn.out_proj" in lora.layers["clip"]


def test_lokr_has_no_scale_where_both_matrices_are_whole(real):
    patches = real("lokr_bfl").patches
    assert all(isinstance(patch, Kronecker) and patch.scale == 1.0 for patch in patches)


def test_nothing_is_read_but_alphas(keys, hollow, monkeypatch):
    """A LoRA of a gigabyte opens in a moment: the factors are views of the mapped file."""
    path = hollow(keys("lora_bfl_control_depth"))
    assert path.stat().st_size > 2**30
    lora = read_lora(path)
    start, end = (f(t.data_ptr() for t in lora.tensors.values()) for f in (min, max))
    assert end - start < path.stat().st_size  # one mapping, no copies
    first = lora.layers["transformer"]["img_in"][0]
    assert first.down.data_ptr() == lora.tensors["img_in.lora_A.weight"].data_ptr()
