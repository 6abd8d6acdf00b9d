"""torchao's formats: the library's numbers, its files, and what must not happen to either."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from fluxcanvas.flux_runtime import FluxError
from fluxcanvas.flux_runtime.quant import optional
from fluxcanvas.flux_runtime.quant.ao import TorchAo, gathered
from fluxcanvas.flux_runtime.quant.readers import unpack
from fluxcanvas.flux_runtime.weights.files import TensorFile

KINDS = ("int8", "float8")
ERROR = {"float8": 0.03, "int8": 0.008}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUT, IN = 24, 96


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def error(packed, weight):
    return ((packed.dequantise(torch.float32) - weight.float()).norm() / weight.float().norm()).item()


def library_weight(weight, kind, granularity=None):
    """The library's own tensor of this weight, by its public entrance."""
    ao = pytest.importorskip("torchao.quantization")
    linear = torch.nn.Linear(*reversed(weight.shape), bias=False, dtype=weight.dtype)
    linear.weight.data = weight.clone()
    config = {"int8": ao.Int8WeightOnlyConfig, "float8": ao.Float8WeightOnlyConfig}[kind]
    ao.quantize_(linear, config(granularity=granularity or ao.PerRow(), set_inductor_config=False))
    return linear.weight


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


class TestQuantise:
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gives_the_numbers_of_the_library(self, kind, dtype):
        weight = numbers(OUT, IN).to(dtype)
        ours, theirs = TorchAo.quantise(weight, kind), library_weight(weight, kind)
        assert torch.equal(ours.data.view(torch.uint8), theirs.qdata.view(torch.uint8))
        assert torch.equal(ours.scale, theirs.scale)
        assert 0 < error(ours, weight) < ERROR[kind] and ours.scheme == f"torchao-{kind}"

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_multiplies_as_the_library(self, kind, dtype):
        weight, x = numbers(OUT, IN).to(dtype), numbers(2, 5, IN, seed=1).to(dtype)
        bias = numbers(OUT, seed=2).to(dtype)
        ours, theirs = TorchAo.quantise(weight, kind).linear(x, bias), F.linear(x, library_weight(weight, kind), bias)
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
        assert ours.dtype == dtype and (ours - theirs).norm() < tolerance * theirs.norm()

    def test_large_inputs_stay_within_float16(self):
        """The library multiplies by the integers first, whose products do not fit."""
        weight, x = torch.full((4, 2048), 0.01).half(), torch.full((1, 2048), 8.0).half()
        assert torch.isinf(F.linear(x, library_weight(weight, "int8"))).all()
        assert torch.allclose(TorchAo.quantise(weight).linear(x, None), F.linear(x, weight), rtol=0.01)

    def test_rows_of_zeros(self, kind):
        weight = numbers(OUT, IN)
        weight[3] = 0
        got = TorchAo.quantise(weight, kind).dequantise(torch.float32)
        assert got.isfinite().all() and (got[3] == 0).all()

    def test_leaves_the_weight_as_it_is(self, kind):
        weight = numbers(OUT, IN)
        before = weight.clone()
        TorchAo.quantise(weight, kind)
        assert torch.equal(weight, before)

    def test_casting_changes_no_number(self, kind):
        packed = TorchAo.quantise(numbers(OUT, IN), kind)
        before = packed.dequantise(torch.float32)
        assert torch.equal(packed.to(torch.bfloat16).dequantise(torch.float32), before)

    def test_without_the_library(self, monkeypatch):
        def fail(name):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        monkeypatch.setattr(optional.importlib, "import_module", fail)
        with pytest.raises(FluxError, match=r"fluxcanvas\[torchao\]\): .* -m pip install torchao$"):
            TorchAo.quantise(numbers(OUT, IN))


class TestDequantise:
    def test_one_scale_for_each_group_of_a_row(self):
        data = torch.arange(-12, 12, dtype=torch.int8).view(2, 12)
        scale = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
        expected = data.float() * scale.repeat_interleave(4, dim=1)
        assert torch.equal(TorchAo(data, scale).dequantise(torch.float32), expected)

    def test_one_scale_for_all(self):
        data = torch.arange(-12, 12, dtype=torch.int8).view(2, 12)
        assert torch.equal(TorchAo(data, torch.tensor([[0.5]])).dequantise(torch.float32), data * 0.5)

    def test_zero_points(self):
        data, zero = torch.tensor([[127, -128], [0, 5]], dtype=torch.int8), torch.tensor([[-1], [3]], dtype=torch.int8)
        got = TorchAo(data, torch.tensor([[1.0], [2.0]]), zero).dequantise(torch.float32)
        assert torch.equal(got, torch.tensor([[128.0, -127], [-6, 4]]))


class TestFiles:
    def write(self, tensors, path):
        flatten = pytest.importorskip("torchao.prototype.safetensors.safetensors_support").flatten_tensor_state_dict
        plain, metadata = flatten(tensors)
        save_file(plain, path, metadata)
        file = TensorFile(path)
        return file.tensors(), file.header.metadata

    @pytest.mark.parametrize("group", [0, 32])
    def test_reads_what_the_library_writes(self, kind, group, tmp_path):
        ao = pytest.importorskip("torchao.quantization")
        weight = numbers(OUT, IN).bfloat16()
        theirs = library_weight(weight, kind, ao.PerGroup(group) if group else None).data
        tensors, metadata = self.write({"a.b.weight": theirs, "a.b.bias": numbers(OUT)}, tmp_path / "ao.st")
        found = gathered(tensors, metadata)
        assert sorted(found) == ["a.b.bias", "a.b.weight"] and found["a.b.weight"].shape == (OUT, IN)
        packed = unpack(found["a.b.weight"].sources[0])
        assert packed.scheme == f"torchao-{kind}" and 0 < error(packed, weight) < ERROR[kind]
        assert torch.allclose(packed.dequantise(torch.float32), theirs.dequantize(torch.float32), rtol=1e-6)

    def test_other_types_are_named(self, tmp_path):
        save_file({"a._weight_qdata": numbers(4, 4).char(), "a._weight_scale": numbers(4, 1)}, tmp_path / "x.st")
        metadata = {"a.weight": json.dumps({"_type": "Int4Tensor"})}
        found = gathered(TensorFile(tmp_path / "x.st").tensors(), metadata)
        with pytest.raises(FluxError, match="Int4Tensor is not read"):
            unpack(found["a.weight"].sources[0])

    def test_scaled_inputs_are_refused(self, tmp_path):
        tensors = {"a._weight_qdata": numbers(4, 4).char(), "a._weight_act_pre_scale": numbers(4)}
        save_file(tensors, tmp_path / "x.st")
        with pytest.raises(FluxError, match="a scales its input"):
            gathered(TensorFile(tmp_path / "x.st").tensors(), {"a.weight": "not JSON"})

    def test_stored_and_back(self, kind):
        packed = TorchAo.quantise(numbers(OUT, IN), kind)
        main, *rest = packed.stored().items()
        again = TorchAo.from_stored(main[1], dict(rest), (OUT, IN), {})
        assert torch.equal(again.dequantise(torch.float32), packed.dequantise(torch.float32))

    def test_what_does_not_fit(self, kind):
        packed = TorchAo.quantise(numbers(OUT, IN), kind)
        for data, scale, zero in (
            (packed.data, None, None),
            (packed.data, packed.scale[:5], None),
            (packed.data, torch.ones(OUT, 5), None),
            (packed.data, packed.scale, torch.zeros(3, 1, dtype=torch.int8)),
            (packed.data[1:], packed.scale, None),
            (packed.data.float(), packed.scale, None),
        ):
            sides = {"_weight_scale": scale, "_weight_zero_point": zero}
            with pytest.raises(FluxError, match="does not go with"):
                TorchAo.from_stored(data, {k: v for k, v in sides.items() if v is not None}, (OUT, IN), {})
