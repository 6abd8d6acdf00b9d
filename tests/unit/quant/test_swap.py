"""Quantising a whole model: what is packed, what is kept, what is shared, and that the model itself never changes."""

import copy
import sys

import pytest
import torch

from fluxcanvas.flux_runtime import FluxError
from fluxcanvas.flux_runtime.model.transformer import FluxTransformer
from fluxcanvas.flux_runtime.quant import optional, schemes, swap
from fluxcanvas.flux_runtime.quant.fp8 import Fp8
from fluxcanvas.flux_runtime.quant.gguf import Gguf
from fluxcanvas.flux_runtime.quant.packed import PackedLinear
from fluxcanvas.flux_runtime.quant.schemes import SCHEMES, scheme
from fluxcanvas.flux_runtime.quant.swap import KEPT, Quantiser, quantise, sharing_copy
from fluxcanvas.flux_runtime.variants import FluxParams

# The largest relative error of a normally distributed weight that each scheme may make.
ERROR = {
    "fp8": 0.03, "bnb-int8": 0.01, "bnb-nf4": 0.1, "bnb-fp4": 0.13, "quanto-float8": 0.03, "quanto-int8": 0.01,
    "quanto-int4": 0.11, "torchao-int8": 0.01, "torchao-float8": 0.03,
}  # fmt: skip
SIZES = dict(vec_in_dim=32, context_in_dim=48, hidden_size=64, num_heads=2, mlp_hidden=128, depth=1, depth_single=1)


@pytest.fixture
def transformer():
    torch.manual_seed(0)
    model = FluxTransformer(FluxParams(**SIZES, axes_dim=(4, 14, 14)))
    return model.eval().requires_grad_(False)


def velocity(model):
    generator = torch.Generator().manual_seed(3)
    img, txt, pooled = (torch.randn(1, *s, generator=generator) for s in ((16, 64), (6, 48), (32,)))
    context = model.prepare(txt, torch.zeros(22, 3))
    modulation = model.modulate(model.embed(torch.tensor([0.5]), torch.tensor([3.5]), pooled))
    return model(img, context, modulation)


def packed_names(model):
    return {name for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def gguf_linear(rows=64, columns=64):
    data = torch.zeros(rows, columns // 32 * 34, dtype=torch.uint8)
    return PackedLinear([Gguf(data, "Q8_0", (rows, columns))], torch.zeros(rows))


class TestSchemes:
    @pytest.mark.parametrize("name", ERROR)
    def test_every_scheme(self, name, transformer):
        before = copy.deepcopy(transformer.state_dict())
        plain = velocity(transformer)
        made, summary = quantise(transformer, name)
        assert {pack.scheme for m in made.modules() if isinstance(m, PackedLinear) for pack in m.packs} == {name}
        assert summary.layers == len(packed_names(made)) == 13
        assert 0 < summary.mean_error <= summary.largest_error < ERROR[name] and summary.largest in packed_names(made)
        assert summary.bytes_after < 0.6 * summary.bytes_before
        off = (velocity(made) - plain).norm() / plain.norm()
        assert 0 < off < 2 * ERROR[name]
        assert torch.equal(velocity(transformer), plain)
        assert all(torch.equal(before[name], t) for name, t in transformer.state_dict().items())

    def test_the_table_and_its_names(self):
        assert {*ERROR, "fp8-matmul"} == SCHEMES.keys()
        assert all(name == entry.name and entry.title and 4 <= entry.bits <= 8 for name, entry in SCHEMES.items())
        with pytest.raises(FluxError, match="'q4'; use one of fp8, fp8-matmul, bnb-int8"):
            scheme("q4")

    @pytest.mark.parametrize("name", [n for n, entry in SCHEMES.items() if entry.library])
    def test_without_its_library(self, name, transformer, monkeypatch):
        def fail(module):
            raise ModuleNotFoundError(f"No module named {module!r}", name=module)

        monkeypatch.setattr(optional.importlib, "import_module", fail)
        package = {"quanto": "optimum-quanto"}.get(SCHEMES[name].extra, SCHEMES[name].extra)
        with pytest.raises(FluxError) as error:
            quantise(transformer, name)
        assert f"(the extra fluxcanvas[{SCHEMES[name].extra}])" in str(error.value)
        assert str(error.value).endswith(f"{sys.executable} -m pip install {package}")

    @pytest.mark.parametrize("error", [RuntimeError("clash of versions"), ModuleNotFoundError("no x", name="x")])
    def test_a_library_that_does_not_import(self, error, transformer, monkeypatch):
        """Whatever it raises: these libraries import others, and complain in their own ways."""

        def fail(name):
            raise error

        monkeypatch.setattr(optional.importlib, "import_module", fail)
        with pytest.raises(FluxError, match=rf"needs torchao, which does not import: {error}; reinstall it"):
            quantise(transformer, "torchao-int8")

    def test_fp8_products_need_a_gpu_that_has_them(self, transformer, monkeypatch):
        with pytest.raises(FluxError, match="cpu is none; use fp8"):
            quantise(transformer, "fp8-matmul")
        monkeypatch.setattr(schemes, "supports_matmul", lambda device: True)
        made, _ = quantise(transformer, "fp8-matmul")
        assert made.double_blocks[0].img_attn.qkv.packs[0].matmul


class TestKept:
    def test_first_and_last_layers_stay(self, transformer):
        made, summary = quantise(transformer, "fp8")
        assert {name.split(".")[0] for name in summary.kept} == set(KEPT)
        assert {name.split(".")[0] for name in packed_names(made)} == {"double_blocks", "single_blocks"}
        assert all(summary.kept.values())

    def test_all_layers(self, transformer):
        made, summary = quantise(transformer, "fp8", keep=())
        assert not summary.kept and summary.layers == 23 and type(made.img_in) is PackedLinear

    def test_names_and_patterns(self, transformer):
        made, summary = quantise(transformer, "fp8", keep=("double_blocks", "*.linear1"))
        kept = set(summary.kept)
        assert "single_blocks.0.linear1" in kept and "double_blocks.0.txt_mlp.2" in kept
        assert "img_in" in packed_names(made) and "single_blocks.0.linear2" in packed_names(made)

    def test_a_name_is_no_prefix_of_others(self, transformer):
        made, _ = quantise(transformer, "fp8", keep=("single_blocks.0.linear",))
        assert "single_blocks.0.linear1" in packed_names(made)

    def test_what_int4_cannot_group_stays_plain(self):
        """A row of more than 128 numbers that no group size divides."""
        model = torch.nn.Sequential(torch.nn.Linear(150, 32), torch.nn.Linear(32, 32)).requires_grad_(False)
        made, summary = quantise(model, "quanto-int4")
        assert made[0].weight.data_ptr() == model[0].weight.data_ptr() and type(made[1]) is PackedLinear
        assert summary.kept == {"0": "its rows of 150 do not divide into groups for int4"}

    def test_t5_in_float16_keeps_what_overflows(self):
        linear = torch.nn.Linear(32, 32)
        for dtype, kept in ((torch.float16, True), (torch.bfloat16, False)):
            pack = Quantiser("fp8", dtype=dtype)
            assert (pack("encoder.block.0.layer.1.DenseReluDense.wo", lambda: linear.weight) is None) == kept
            assert pack("encoder.block.0.layer.1.DenseReluDense.wi_0", lambda: linear.weight) is not None


class TestSharing:
    def test_what_is_not_packed_is_the_same_memory(self, transformer):
        made, _ = quantise(transformer, "fp8")
        assert made.img_in.weight.data_ptr() == transformer.img_in.weight.data_ptr()
        ours, theirs = made.single_blocks[0].linear1, transformer.single_blocks[0].linear1
        assert ours.bias.data_ptr() == theirs.bias.data_ptr()
        assert made.params is transformer.params and made is not transformer

    def test_moving_and_casting_the_copy_leaves_the_model(self, transformer):
        made, _ = quantise(transformer, "fp8")
        plain = velocity(transformer)
        made.to(torch.bfloat16)
        assert made.dtype == torch.bfloat16 and transformer.dtype == torch.float32
        made.to("meta")
        assert torch.equal(velocity(transformer), plain)

    def test_hooks_of_the_copy_are_its_own(self, transformer):
        made = sharing_copy(transformer, {})
        made.register_forward_pre_hook(lambda *_: pytest.fail("called through the original"))
        made.img_in.register_forward_pre_hook(lambda *_: pytest.fail("called through the original"))
        velocity(transformer)

    def test_one_tensor_under_two_names_stays_one(self):
        shared = torch.nn.Embedding(4, 8)
        model = torch.nn.ModuleDict({"a": shared, "b": shared, "c": torch.nn.Embedding(4, 8)})
        model["c"].weight = shared.weight
        twin = sharing_copy(model, {})
        assert twin["a"] is twin["b"] and twin["c"].weight is twin["a"].weight
        assert twin["a"].weight.data_ptr() == shared.weight.data_ptr() and twin["a"].weight is not shared.weight


class TestAlreadyPacked:
    def test_another_scheme_is_refused_before_anything_is_done(self, transformer, monkeypatch):
        transformer.single_blocks[0].modulation.lin = gguf_linear()
        monkeypatch.setattr(swap.Scheme, "make", lambda *_: pytest.fail("packed something"))
        with pytest.raises(FluxError, match=r"the model is already stored as GGUF Q8_0 \(.*modulation.lin\); load its"):
            quantise(transformer, "bnb-nf4")

    def test_unless_it_is_kept(self, transformer):
        transformer.single_blocks[0].modulation.lin = gguf_linear(192)
        made, summary = quantise(transformer, "fp8", keep=(*KEPT, "*.modulation.lin"))
        assert made.single_blocks[0].modulation.lin.packs[0].scheme == "GGUF Q8_0"
        assert summary.kept["single_blocks.0.modulation.lin"] == "asked for"

    def test_the_same_scheme_again(self, transformer):
        once, first = quantise(transformer, "fp8")
        twice, summary = quantise(once, "fp8")
        assert summary.already == first.layers and summary.layers == 0
        assert torch.equal(velocity(once), velocity(twice))
        assert str(summary) == "13 were fp8 before, 10 kept"

    def test_fp8_weights_multiply_as_fp8_without_packing_anew(self, transformer, monkeypatch):
        made, _ = quantise(transformer, "fp8")
        monkeypatch.setattr(schemes, "supports_matmul", lambda device: True)
        again, summary = quantise(made, "fp8-matmul")
        old, new = (m.single_blocks[0].linear1.packs[0] for m in (made, again))
        assert new.matmul and not old.matmul and new.weight.data_ptr() == old.weight.data_ptr()
        assert summary.already == 13

    def test_a_file_in_plain_fp8_can_be_packed_otherwise(self, transformer):
        linear = transformer.single_blocks[0].linear1
        whole = linear.weight.to(torch.float8_e4m3fn)
        transformer.single_blocks[0].linear1 = PackedLinear([Fp8(whole[:100]), Fp8(whole[100:])], linear.bias)
        made, summary = quantise(transformer, "bnb-nf4")
        pack = made.single_blocks[0].linear1.packs[0]
        assert summary.layers == 13 and len(made.single_blocks[0].linear1.packs) == 1
        off = pack.dequantise(torch.float32) - whole.float()
        assert pack.scheme == "bnb-nf4" and off.norm() < 0.1 * whole.float().norm()


class TestOneLayer:
    def test_one_layer(self):
        linear = torch.nn.Linear(64, 32).requires_grad_(False)
        made = Quantiser("fp8").layer("layer", linear)
        x = torch.randn(3, 64, generator=torch.Generator().manual_seed(0))
        assert type(made) is PackedLinear and (made(x) - linear(x)).norm() < 0.05 * linear(x).norm()
        odd = torch.nn.Linear(150, 32)
        assert Quantiser("quanto-int4").layer("layer", odd) is odd

    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    @pytest.mark.parametrize("name", ["fp8", "bnb-nf4", "quanto-int8", "torchao-float8"])
    def test_nan_and_infinity_are_named(self, transformer, name, bad):
        transformer.single_blocks[0].linear2.weight[1, 2] = bad
        with pytest.raises(FluxError, match=r"single_blocks\.0\.linear2.*NaN or infinity"):
            quantise(transformer, name)

    def test_progress_ends_at_one(self, transformer):
        told = []
        quantise(transformer, "fp8", progress=told.append)
        assert told == sorted(told) and told[-1] == 1 and len(told) == 23

    def test_summary_in_words(self, transformer):
        _, summary = quantise(transformer, "fp8")
        assert str(summary).startswith("13 linear layers as fp8, 639 kB -> 160 kB, weight error 0.02")
