"""quanto's formats: the library's numbers, its files, and what must not happen to either."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fluxcanvas.flux_runtime import FluxError
from fluxcanvas.flux_runtime.quant import optional, quanto
from fluxcanvas.flux_runtime.quant.packed import PackedLinear
from fluxcanvas.flux_runtime.quant.quanto import BITS, BYTES, Quanto, gathered
from fluxcanvas.flux_runtime.quant.readers import unpack
from fluxcanvas.flux_runtime.weights.files import TensorFile

KINDS = ("float8", "int8", "int4")
ERROR = {"float8": 0.03, "int8": 0.01, "int4": 0.11, "int2": 0.6}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUT, IN = 32, 384


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(packed, weight):
    return ((packed.dequantise(torch.float32) - weight.float()).norm() / weight.float().norm()).item()


def library_layer(weight, kind):
    """The library's own layer with this weight."""
    oq = pytest.importorskip("optimum.quanto")
    linear = torch.nn.Linear(*reversed(weight.shape), dtype=weight.dtype)
    linear.weight.data = weight.clone()
    layer = oq.QLinear.from_module(linear, weights=oq.qtypes["qfloat8" if kind == "float8" else f"q{kind}"])
    layer.freeze()
    return layer


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


class TestQuantise:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("columns", [64, 160, IN])  # a row's own group; groups of 32 and of 128
    def test_gives_the_numbers_of_the_library(self, kind, dtype, columns):
        weight = numbers(OUT, columns).to(dtype)
        layer = library_layer(weight, kind)
        ours, theirs = Quanto.quantise(weight, kind).stored(), {}
        layer.weight.save_to_state_dict(theirs, "weight.", False)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in ours)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_error(self, kind, dtype):
        weight = numbers(OUT, IN).to(dtype)
        packed = Quanto.quantise(weight, kind)
        assert 0 < error(packed, weight) < ERROR[kind]
        assert packed.scheme == f"quanto-{kind}" and packed.shape == (OUT, IN)

    def test_rows_and_groups_of_one_number(self, kind):
        """The library makes NaN of them in float8."""
        weight = numbers(OUT, IN)
        weight[3], weight[7] = 0, 0.25
        got = Quanto.quantise(weight, kind).dequantise(torch.float32)
        assert got.isfinite().all() and (got[3] == 0).all()
        assert torch.allclose(got[7], weight[7], rtol=0.01)

    def test_leaves_the_weight_as_it_is(self, kind):
        weight = numbers(OUT, IN)
        before = weight.clone()
        Quanto.quantise(weight, kind)
        assert torch.equal(weight, before)

    def test_what_the_library_cannot_do_well(self):
        assert quanto.unsuitable((OUT, 200), "int4") and not quanto.unsuitable((OUT, 200), "int8")
        assert quanto.unsuitable((1, IN), "float8") and not quanto.unsuitable((OUT, 100), "int4")

    def test_without_the_library(self, monkeypatch):
        def fail(name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(optional.importlib, "import_module", fail)
        with pytest.raises(FluxError, match=r"fluxcanvas\[quanto\]\): .* -m pip install optimum-quanto$"):
            Quanto.quantise(numbers(OUT, IN))


class TestProduct:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("kind", ["float8", "int8"])
    def test_equals_the_library(self, kind, dtype):
        weight, x = numbers(OUT, IN).to(dtype), numbers(2, 5, IN, seed=1).to(dtype)
        layer = library_layer(weight, kind)
        with torch.no_grad():
            theirs = layer(x)
        ours = PackedLinear([Quanto.quantise(weight, kind)], layer.bias)(x)
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
        assert ours.dtype == dtype and (ours - theirs).norm() < tolerance * theirs.norm()

    def test_multiplies_by_the_unpacked_weight(self, kind):
        packed, x, bias = Quanto.quantise(numbers(OUT, IN), kind), numbers(3, IN, seed=1), numbers(OUT, seed=2)
        assert torch.equal(packed.linear(x, bias), F.linear(x, packed.dequantise(torch.float32), bias))

    @pytest.mark.parametrize("bits", [2, 4])
    def test_unpacks_what_the_library_packs(self, bits):
        pack_weights = pytest.importorskip("optimum.quanto.tensor.packed").pack_weights
        whole = torch.randint(0, 2**bits, (6, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        scale, shift = torch.full((6, 1), 1.0), torch.zeros(6, 1)
        packed = Quanto(pack_weights(whole, bits), scale, shift, (2, 192))
        assert packed.scheme == f"quanto-int{bits}"
        assert torch.equal(packed.dequantise(torch.float32), whole.float().view(2, 192))


class TestModule:
    def test_casting_changes_no_number(self, kind):
        packed = Quanto.quantise(numbers(OUT, IN), kind)
        before = packed.dequantise(torch.float32)
        packed.to(torch.float16).to(torch.bfloat16)
        assert torch.equal(packed.dequantise(torch.float32), before)

    def test_takes_few_bytes(self):
        plain = OUT * IN
        assert Quanto.quantise(numbers(OUT, IN), "int8").nbytes == plain + OUT * 4
        assert Quanto.quantise(numbers(OUT, IN).bfloat16(), "int4").nbytes == plain // 2 + plain // 128 * 4


class TestFiles:
    @pytest.mark.parametrize("kind", [*KINDS, "int2"])
    @pytest.mark.parametrize("columns", [64, IN])
    def test_reads_the_librarys_state_dict(self, kind, columns, tmp_path):
        weight = numbers(OUT, columns).bfloat16()
        layer = library_layer(weight, kind)
        save_file({f"a.b.{name}": tensor.clone() for name, tensor in layer.state_dict().items()}, tmp_path / "q.st")
        found = gathered(TensorFile(tmp_path / "q.st").tensors())
        assert sorted(found) == ["a.b.bias", "a.b.weight"]
        assert found["a.b.weight"].shape == (OUT, columns) and found["a.b.weight"].packed
        packed = unpack(found["a.b.weight"].sources[0])
        assert packed.scheme == f"quanto-{kind}" and 0 < error(packed, weight) < ERROR[kind]

    def test_leaves_other_files_alone(self, tmp_path):
        save_file({"a.weight": numbers(4, 4), "a.input_scale": numbers(1)}, tmp_path / "plain.st")
        tensors = TensorFile(tmp_path / "plain.st").tensors()
        assert gathered(tensors) == tensors

    def test_stored_and_back(self, kind):
        packed = Quanto.quantise(numbers(OUT, IN), kind)
        main, *rest = packed.stored().items()
        again = Quanto.from_stored(main[1], dict(rest), (OUT, IN), {})
        assert torch.equal(again.dequantise(torch.float32), packed.dequantise(torch.float32))

    @pytest.mark.parametrize("shape", [(OUT, IN + 1), (OUT + 1, IN), (IN, OUT)])
    def test_another_shape(self, kind, shape):
        main, *rest = Quanto.quantise(numbers(OUT, IN), kind).stored().items()
        with pytest.raises(FluxError, match="does not go with"):
            Quanto.from_stored(main[1], dict(rest), shape, {})

    def test_scales_missing_or_of_another_size(self):
        bytes_, bits = (Quanto.quantise(numbers(OUT, IN), kind).stored() for kind in ("int8", "int4"))
        scale, shift = bits["weight._scale"], bits["weight._shift"]
        for data, sides in (
            (bytes_[BYTES], {}),
            (bytes_[BYTES], {"weight._scale": bytes_["weight._scale"][:5]}),
            (bytes_[BYTES].float(), {"weight._scale": bytes_["weight._scale"]}),
            (bits[BITS], {"weight._scale": scale}),
            (bits[BITS], {"weight._scale": scale, "weight._shift": shift[1:]}),
            (bits[BITS][1:], {"weight._scale": scale, "weight._shift": shift}),
        ):
            with pytest.raises(FluxError, match="does not go with"):
                Quanto.from_stored(data, sides, (OUT, IN), {})
