"""bitsandbytes' weights: the formulas in plain torch, the library's own results, and its layout in files."""

import json
import math
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from fluxcanvas.flux_runtime import FluxError
from fluxcanvas.flux_runtime.quant.bnb import STATE, Bnb4, Bnb8, FourBit

bnb = pytest.importorskip("bitsandbytes")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FP4 = [0, 0.0625 / 12, 8 / 12, 1, 4 / 12, 6 / 12, 2 / 12, 3 / 12]
NF4 = [
    -1, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1,
]  # fmt: skip
TABLES = {"nf4": torch.tensor(NF4), "fp4": torch.tensor(FP4 + [-value for value in FP4])}
ROWS_OF_BLOCKS, ROWS_OF_PIECES = (24, 128), (48, 96)  # with blocks of 64
kinds = pytest.mark.parametrize("kind", ["nf4", "fp4"])
doubles = pytest.mark.parametrize("double", [False, True])
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def unpack(sides):
    """A stored 4-bit weight as float32: high half of a byte first, a scale a block, packed scales around an offset."""
    (name,) = [name for name in sides if name.startswith(STATE)]
    state = json.loads(bytes(sides[name].tolist()))
    scales = sides["weight.absmax"]
    if "weight.nested_absmax" in sides:
        outer = sides["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])[: scales.numel()]
        scales = sides["weight.nested_quant_map"][scales.long()] * outer + torch.tensor(state["nested_offset"])
    packed = sides["weight"].flatten().long()
    codes = torch.stack([packed // 16, packed % 16], dim=1).flatten()
    each = scales.repeat_interleave(state["blocksize"])[: codes.numel()]
    return (TABLES[state["quant_type"]][codes] * each).view(state["shape"])


def reread(pack):
    sides = pack.stored()
    return type(pack).from_stored(sides.pop("weight"), sides, pack.shape, {})


@kinds
@doubles
class TestFourBits:
    @pytest.mark.parametrize("shape", [ROWS_OF_BLOCKS, ROWS_OF_PIECES, (300, 64), (16, 16), (7, 10), (1, 64)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_the_formula(self, kind, double, shape, dtype):
        pack = Bnb4.quantise(numbers(*shape), kind=kind, double=double)
        assert torch.equal(pack.dequantise(dtype), unpack(pack.stored()).to(dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_what_the_library_makes_of_it(self, kind, double, dtype):
        weight = numbers(*ROWS_OF_BLOCKS).to(dtype)
        packed, state = bnb.functional.quantize_4bit(weight, quant_type=kind, compress_statistics=double)
        pack = Bnb4.quantise(weight, kind=kind, double=double)
        assert torch.equal(pack.weight, packed)
        assert torch.equal(pack.dequantise(dtype), bnb.functional.dequantize_4bit(packed, state))

    def test_file_layout_is_the_library_s(self, kind, double):
        layer = bnb.nn.Linear4bit(128, 24, bias=False, quant_type=kind, compress_statistics=double)
        layer.load_state_dict({"weight": numbers(*ROWS_OF_BLOCKS)})
        theirs = layer.to("cpu").state_dict()  # moving it is what quantises it
        ours = Bnb4.quantise(numbers(*ROWS_OF_BLOCKS), kind=kind, double=double).stored()
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype, name

    def test_the_library_reads_what_we_store(self, kind, double):
        pack = Bnb4.quantise(numbers(*ROWS_OF_BLOCKS), kind=kind, double=double)
        sides = pack.stored()
        theirs = bnb.nn.Params4bit.from_prequantized(sides.pop("weight"), sides, device="cpu")
        assert torch.equal(
            bnb.functional.dequantize_4bit(theirs.data, theirs.quant_state), pack.dequantise(torch.float32)
        )

    @pytest.mark.parametrize("shape", [ROWS_OF_BLOCKS, ROWS_OF_PIECES])
    def test_there_and_back(self, kind, double, shape):
        pack = Bnb4.quantise(numbers(*shape).to(torch.bfloat16), kind=kind, double=double)
        back = reread(pack)
        assert torch.equal(back.dequantise(torch.float32), pack.dequantise(torch.float32))
        assert back.stored().keys() == pack.stored().keys()
        assert all(torch.equal(tensor, pack.stored()[name]) for name, tensor in back.stored().items())
        assert (back.scheme, back.state.dtype) == (f"bnb-{kind}", "bfloat16")

    @pytest.mark.parametrize("shape", [ROWS_OF_BLOCKS, ROWS_OF_PIECES])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_linear(self, kind, double, shape, dtype):
        pack, x = Bnb4.quantise(numbers(*shape), kind=kind, double=double), numbers(2, 5, shape[1], seed=1).to(dtype)
        bias = numbers(shape[0], seed=2).to(dtype)
        got = pack.linear(x, bias)
        assert torch.equal(got, F.linear(x, pack.dequantise(dtype), bias))
        if shape == ROWS_OF_BLOCKS:
            assert torch.equal(got, pack.multiply(x, bias))

    def test_weights_in_other_storage(self, kind, double):
        """Some trainers have the bytes stored as bfloat16."""
        pack = Bnb4.quantise(numbers(*ROWS_OF_BLOCKS), kind=kind, double=double)
        sides = pack.stored()
        back = Bnb4.from_stored(sides.pop("weight").view(-1).view(torch.bfloat16).view(-1, 1), sides, pack.shape, {})
        assert torch.equal(back.dequantise(torch.float32), pack.dequantise(torch.float32))

    def test_zeros(self, kind, double):
        assert not Bnb4.quantise(torch.zeros(8, 64), kind=kind, double=double).dequantise(torch.float32).any()

    @gpu
    def test_on_a_gpu(self, kind, double):
        for shape in (ROWS_OF_BLOCKS, ROWS_OF_PIECES):
            pack, x = Bnb4.quantise(numbers(*shape), kind=kind, double=double), numbers(9, shape[1], seed=1)
            plain, weight = pack.linear(x, None), pack.dequantise(torch.float32)
            pack = pack.to("cuda")
            torch.testing.assert_close(pack.dequantise(torch.float32).cpu(), weight, rtol=1e-6, atol=1e-7)
            torch.testing.assert_close(pack.linear(x.cuda(), None).cpu(), plain, rtol=1e-2, atol=1e-2)


def test_half_bytes_in_order():
    """0x3C is code 3, then code 12; the scale is 2."""
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [1, 4]}
    sides = {
        "weight.absmax": torch.tensor([2.0]),
        "weight.quant_map": TABLES["nf4"],
        STATE + "nf4": torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8),
    }
    pack = Bnb4.from_stored(torch.tensor([[0x3C], [0x7F]], dtype=torch.uint8), sides, (1, 4), {})
    assert pack.dequantise(torch.float32).tolist() == [[2 * TABLES["nf4"][code].item() for code in (3, 12, 7, 15)]]


class TestRefusals:
    """What kernels would read beyond its end, or unpack with another table, is refused."""

    def stored(self, **changes):
        sides = Bnb4.quantise(numbers(*ROWS_OF_BLOCKS), double=True).stored()
        state = json.loads(bytes(sides[STATE + "nf4"].tolist())) | changes
        sides[STATE + "nf4"] = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
        return sides.pop("weight"), sides

    def test_unchanged_it_is_read(self):
        Bnb4.from_stored(*self.stored(), ROWS_OF_BLOCKS, {})

    @pytest.mark.parametrize(
        "changes",
        [
            {"shape": [24, 127]}, {"shape": [24.0, 128]}, {"shape": [3072]}, {"shape": None}, {"shape": [-24, -128]},
            {"shape": [24, 128, 1]}, {"shape": [10**30, 10**30]}, {"shape": [True, 3072]}, {"shape": ["24", "128"]},
            {"blocksize": 63}, {"blocksize": 0}, {"blocksize": -64}, {"blocksize": 128}, {"blocksize": "64"},
            {"quant_type": "int4"}, {"quant_type": "fp4"}, {"quant_type": ["nf4"]}, {"dtype": "float8_e4m3fn"},
            {"dtype": "save"}, {"nested_blocksize": 0}, {"nested_blocksize": 32}, {"nested_blocksize": 3},
            {"nested_dtype": "load"}, {"nested_offset": math.nan}, {"nested_offset": 1e300}, {"nested_offset": "0"},
            {"nested_offset": None},
        ],
    )  # fmt: skip
    def test_descriptions_that_cannot_be(self, changes):
        with pytest.raises(FluxError):
            Bnb4.from_stored(*self.stored(**changes), ROWS_OF_BLOCKS, {})

    def test_a_description_must_account_for_every_byte(self):
        _, sides = self.stored(shape=[24, 127])  # which has as many blocks as 24 x 128
        with pytest.raises(FluxError, match="shape"):
            FourBit.parse(sides[STATE + "nf4"], 24 * 128 // 2)

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("weight.absmax", lambda t: t[:-1]),
            ("weight.absmax", lambda t: t.float()),
            ("weight.quant_map", lambda t: t[:8]),
            ("weight.quant_map", lambda t: t.flip(0)),
            ("weight.nested_absmax", lambda t: t[:0]),
            ("weight.nested_absmax", lambda t: t * math.nan),
            ("weight.nested_quant_map", lambda t: t[:255]),
            ("weight.nested_quant_map", lambda t: t.to(torch.int8)),
        ],
    )
    def test_sides_of_the_wrong_size(self, name, change):
        weight, sides = self.stored()
        with pytest.raises(FluxError, match=name):
            Bnb4.from_stored(weight, sides | {name: change(sides[name])}, ROWS_OF_BLOCKS, {})

    @pytest.mark.parametrize("name", ["weight.absmax", "weight.quant_map", "weight.nested_absmax", STATE + "nf4"])
    def test_sides_that_are_missing(self, name):
        weight, sides = self.stored()
        del sides[name]
        with pytest.raises(FluxError):
            Bnb4.from_stored(weight, sides, ROWS_OF_BLOCKS, {})

    def test_another_shape_than_the_model_asks_for(self):
        with pytest.raises(FluxError, match="24, 128"):
            Bnb4.from_stored(*self.stored(), (128, 24), {})

    @settings(max_examples=200, deadline=None)
    @given(st.binary(max_size=60))
    def test_any_bytes_for_a_description(self, data):
        with pytest.raises(FluxError):
            FourBit.parse(torch.tensor(list(data), dtype=torch.uint8), 1536)

    @settings(max_examples=60, deadline=None)
    @given(
        st.sampled_from(["shape", "blocksize", "quant_type", "dtype", "nested_blocksize", "nested_offset"]),
        st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), st.lists),
    )
    def test_any_value_in_a_description(self, name, value):
        try:
            pack = Bnb4.from_stored(*self.stored(**{name: value}), ROWS_OF_BLOCKS, {})
        except FluxError:
            return
        assert pack.shape == ROWS_OF_BLOCKS and pack.state.blocksize == 64

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_weights_that_are_no_numbers(self, bad):
        weight = numbers(*ROWS_OF_BLOCKS)
        weight[1, 2] = bad
        for make in (Bnb4.quantise, Bnb8.quantise):
            with pytest.raises(FluxError, match="NaN or infinity"):
                make(weight)

    @pytest.mark.parametrize("options", [{"kind": "int4"}, {"blocksize": 100}, {"blocksize": 32}])
    def test_options_that_do_not_exist(self, options):
        with pytest.raises(FluxError, match="nf4 or fp4"):
            Bnb4.quantise(numbers(*ROWS_OF_BLOCKS), **options)

    def test_an_odd_number_of_numbers(self):
        with pytest.raises(FluxError, match="odd"):
            Bnb4.quantise(numbers(3, 5))

    def test_the_library_is_missing(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "bitsandbytes", None)
        for make in (Bnb4.quantise, Bnb8.quantise):
            with pytest.raises(FluxError, match=r"fluxcanvas\[bitsandbytes\]\): .* -m pip install bitsandbytes$"):
                make(numbers(*ROWS_OF_BLOCKS))


class TestEightBits:
    weight = numbers(*ROWS_OF_PIECES)

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_the_formula(self, dtype):
        pack = Bnb8.quantise(self.weight)
        back = pack.dequantise(dtype)
        assert torch.equal(back, bnb.functional.int8_vectorwise_dequant(pack.weight, pack.scale).to(dtype))
        exact = pack.weight.double() * pack.scale.double()[:, None] / 127
        torch.testing.assert_close(pack.dequantise(torch.float32).double(), exact, rtol=2e-7, atol=0)
        assert ((exact - self.weight.half()).abs() <= pack.scale[:, None] / 253).all()

    def test_file_layout_is_the_library_s(self):
        layer = bnb.nn.Linear8bitLt(96, 48, bias=False, has_fp16_weights=False)
        layer.load_state_dict({"weight": self.weight})
        theirs, ours = layer.to("cpu").state_dict(), Bnb8.quantise(self.weight).stored()
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert torch.equal(ours[name], tensor) and ours[name].dtype == tensor.dtype, name

    def test_there_and_back(self):
        pack = Bnb8.quantise(self.weight)
        assert torch.equal(reread(pack).dequantise(torch.float32), pack.dequantise(torch.float32))
        assert reread(pack).scheme == "bnb-int8"

    def test_linear_on_the_cpu_does_not_round_the_input(self):
        pack, x, bias = Bnb8.quantise(self.weight), numbers(2, 5, 96, seed=1), numbers(48, seed=2)
        assert torch.equal(pack.linear(x, bias), F.linear(x, pack.dequantise(torch.float32), bias))

    @pytest.mark.parametrize(
        ("dtype", "outlier"),
        [(dtype, size) for dtype in DTYPES for size in (0.0, 40.0, 1e5) if size < torch.finfo(dtype).max],
    )
    def test_product_is_the_library_s(self, dtype, outlier):
        pack, bias = Bnb8.quantise(self.weight), numbers(48, seed=2).to(dtype)
        x = numbers(2, 5, 96, seed=1).to(dtype)
        x[0, 3, 7] += outlier
        before = x.clone()
        state = bnb.MatmulLtState(CB=pack.weight, SCB=pack.scale)
        state.has_fp16_weights = state.is_training = False
        theirs = bnb.matmul(x, pack.weight, state=state, threshold=6.0, bias=bias)
        got = pack.multiply(x, bias)
        assert torch.equal(got, theirs) and torch.equal(x, before)
        exact = F.linear(x.double(), pack.dequantise(torch.float32).double(), bias.double())
        assert (got - exact).norm() / exact.norm() < 0.02

    @gpu
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_on_a_gpu(self, dtype):
        pack, x = Bnb8.quantise(self.weight), numbers(2, 5, 96, seed=1).to(dtype)
        x[0, 3, 7] += 40
        exact, weight = F.linear(x.double(), pack.dequantise(torch.float32).double()), pack.dequantise(torch.float32)
        pack = pack.to("cuda")
        torch.testing.assert_close(pack.dequantise(torch.float32).cpu(), weight, rtol=1e-6, atol=0)
        got = pack.linear(x.cuda(), None).cpu()
        assert got.dtype == dtype and (got - exact).norm() / exact.norm() < 0.02

    @pytest.mark.parametrize(
        "changes",
        [
            {"SCB": torch.ones(47)},
            {"SCB": torch.ones(48, dtype=torch.int32)},
            {"SCB": torch.full((48,), math.nan)},
            {"weight_format": torch.tensor(1, dtype=torch.uint8)},
            {"weight_format": torch.zeros(2, dtype=torch.uint8)},
            {"weight": torch.zeros(48, 96, dtype=torch.uint8)},
            {"weight": torch.zeros(48, 95, dtype=torch.int8)},
        ],
    )
    def test_refuses_what_does_not_fit(self, changes):
        sides = Bnb8.quantise(self.weight).stored() | changes
        with pytest.raises(FluxError):
            Bnb8.from_stored(sides.pop("weight"), sides, ROWS_OF_PIECES, {})

    @pytest.mark.parametrize("threshold", ["6", -1, math.nan, True, None, 10**400])
    def test_refuses_thresholds_that_are_none(self, threshold):
        sides = Bnb8.quantise(self.weight).stored()
        with pytest.raises(FluxError, match="is no size from which inputs are not rounded"):
            Bnb8.from_stored(sides.pop("weight"), sides, ROWS_OF_PIECES, {"threshold": threshold})

    def test_refuses_a_weight_without_scales(self):
        with pytest.raises(FluxError, match="SCB"):
            Bnb8.from_stored(torch.zeros(2, 2, dtype=torch.int8), {}, (2, 2), {})
