"""fp8 weights: their arithmetic in plain torch, their way into files and back, and the product in fp8."""

import pytest
import torch
import torch.nn.functional as F

from fluxcanvas.flux_runtime import FluxError
from fluxcanvas.flux_runtime.quant import fp8
from fluxcanvas.flux_runtime.quant.fp8 import Fp8, supports_matmul
from fluxcanvas.flux_runtime.quant.packed import PackedLinear

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORMATS = (torch.float8_e4m3fn, torch.float8_e5m2)
OUT, IN = 48, 32
cuda_fp8 = pytest.mark.skipif(not supports_matmul("cuda"), reason="needs a GPU that multiplies fp8")


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def scales():
    """No scale, one, and one for each row, none of them a power of two."""
    rows = torch.rand(OUT, 1, generator=torch.Generator().manual_seed(5)) + 0.3
    return {"none": None, "one": torch.tensor([[0.0371]]), "rows": rows}


@pytest.fixture(params=["none", "one", "rows"])
def scale(request):
    return scales()[request.param]


class TestDequantise:
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_the_float32_product_rounded_once(self, form, dtype, scale):
        weight = numbers(OUT, IN).mul(3).to(form)
        exact = weight.float() if scale is None else weight.float() * scale
        assert torch.equal(Fp8(weight, scale).dequantise(dtype), exact.to(dtype))

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_every_number_of_the_type_is_exact(self, form, dtype):
        every = torch.arange(256, dtype=torch.uint8).view(16, 16).view(form)
        assert torch.equal(Fp8(every).dequantise(dtype).nan_to_num(7), every.to(torch.float64).to(dtype).nan_to_num(7))

    def test_linear_is_the_plain_one_with_that_weight(self, scale):
        pack, x, bias = Fp8(numbers(OUT, IN).to(FORMATS[0]), scale), numbers(2, 5, IN, seed=1), numbers(OUT, seed=2)
        assert torch.equal(PackedLinear([pack], bias)(x), F.linear(x, pack.dequantise(x.dtype), bias))

    def test_stays_fp8_when_the_model_is_cast(self, scale):
        pack = Fp8(numbers(OUT, IN).to(FORMATS[0]), scale).to(torch.bfloat16)
        assert pack.weight.dtype == FORMATS[0]
        assert scale is None or pack.scale.dtype == torch.float32


class TestQuantise:
    def test_the_largest_number_is_kept_and_all_are_near(self):
        weight = numbers(OUT, IN)
        pack = Fp8.quantise(weight)
        back = pack.dequantise(torch.float32)
        largest = weight.abs().argmax()
        torch.testing.assert_close(back.flatten()[largest], weight.flatten()[largest], rtol=1e-6, atol=0)
        assert pack.weight.float().abs().max() == 448
        # Three bits behind the point: half a step is 1/16; below 2^-6 the steps are 2^-9 wide.
        assert ((back - weight).abs() <= weight.abs() / 16 + float(pack.scale) * 2**-10).all()

    @pytest.mark.parametrize("factor", [1e-42, 1e-20, 1.0, 1e4, 1e37])
    def test_any_size_of_numbers(self, factor):
        weight = numbers(OUT, IN) * factor
        back = Fp8.quantise(weight).dequantise(torch.float32)
        assert back.isfinite().all() and (back - weight).norm(dtype=torch.float64) <= max(0.04 * factor * 40, 1e-38)

    def test_zeros_stay_zeros(self):
        assert not Fp8.quantise(torch.zeros(16, 16)).dequantise(torch.float32).any()

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    def test_refuses_what_is_no_number(self, bad):
        weight = numbers(OUT, IN)
        weight[3, 4] = bad
        with pytest.raises(FluxError, match="NaN or infinity"):
            Fp8.quantise(weight)

    def test_names(self):
        weight = numbers(OUT, IN)
        assert (Fp8.quantise(weight).scheme, Fp8.quantise(weight, matmul=True).scheme) == ("fp8", "fp8-matmul")


class TestStored:
    @pytest.mark.parametrize("input_scale", [None, torch.tensor(0.25)])
    def test_there_and_back(self, scale, input_scale):
        pack = Fp8(numbers(OUT, IN).to(FORMATS[0]), scale, input_scale)
        sides = pack.stored()
        back = Fp8.from_stored(sides.pop("weight"), sides, (OUT, IN), {})
        assert torch.equal(back.dequantise(torch.float32), pack.dequantise(torch.float32))
        assert back.stored().keys() == pack.stored().keys()
        assert input_scale is None or torch.equal(back.input_scale, input_scale)

    @pytest.mark.parametrize("shape", [(), (1,), (1, 1), (OUT,), (OUT, 1)])
    def test_every_shape_of_scales(self, shape):
        weight, given = numbers(OUT, IN).to(FORMATS[0]), torch.rand(shape).add(0.5).to(torch.bfloat16)
        pack = Fp8.from_stored(weight, {"scale_weight": given}, (OUT, IN), {})
        assert torch.equal(pack.dequantise(torch.float32), weight.float() * given.float().reshape(-1, 1))

    def test_what_the_file_allows_is_not_switched_on(self):
        pack = Fp8.from_stored(numbers(OUT, IN).to(FORMATS[0]), {}, (OUT, IN), {"matmul": True})
        assert (pack.allows_matmul, pack.matmul, pack.scheme) == (True, False, "fp8")

    @pytest.mark.parametrize(
        ("weight", "sides"),
        [
            (torch.zeros(OUT, IN), {}),
            (torch.zeros(OUT, IN + 1).to(FORMATS[0]), {}),
            (torch.zeros(OUT * IN).to(FORMATS[0]), {}),
            (torch.zeros(OUT, IN).to(FORMATS[0]), {"scale_weight": torch.ones(IN)}),
            (torch.zeros(OUT, IN).to(FORMATS[0]), {"scale_weight": torch.ones(0)}),
            (torch.zeros(OUT, IN).to(FORMATS[0]), {"scale_weight": torch.ones(1, dtype=torch.int32)}),
            (torch.zeros(OUT, IN).to(FORMATS[0]), {"scale_weight": torch.tensor(float("nan"))}),
            (torch.zeros(OUT, IN).to(FORMATS[0]), {"scale_input": torch.ones(OUT)}),
        ],
    )
    def test_refuses_what_does_not_fit(self, weight, sides):
        with pytest.raises(FluxError):
            Fp8.from_stored(weight, sides, (OUT, IN), {})

    def test_names_what_does_not_belong_to_fp8(self):
        weight, sides = numbers(OUT, IN).to(FORMATS[0]), {"_weight_scale": torch.ones(OUT)}
        with pytest.raises(FluxError, match="and no _weight_scale: it is packed by another scheme; download"):
            Fp8.from_stored(weight, sides, (OUT, IN), {})


def in_fp8(x, pack, bias, scale_x):
    """The product with both sides rounded to fp8, written out in float64."""
    x8 = (x.float() / scale_x).clamp(-448, 448).to(torch.float8_e4m3fn).double() * scale_x.double()
    return x8 @ pack.dequantise(torch.float32).double().T + bias.double()


def near(got, exact, dtype, sums=1e-6):
    """Within the rounding of the type it comes out in (a bias may be rounded on its own before), and of the sums."""
    step = max({torch.float32: 0, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype], sums)
    torch.testing.assert_close(got.double(), exact, rtol=step, atol=step * float(exact.abs().max()))


class TestMultiply:
    """The product in fp8; the CPU's own implementation stands in for a GPU's."""

    x, bias = numbers(3, 7, IN, seed=1), numbers(OUT, seed=2)

    def check(self, pack, dtype, device="cpu"):
        x = self.x.to(dtype, copy=True)
        x[1] *= 9  # scales of rows differ
        by_row = pack.scale is not None and pack.scale.numel() > 1
        largest = x.float().abs().amax(dim=-1, keepdim=True) if by_row else x.float().abs().max()
        pack = pack.to(device)
        got = pack.multiply(x.to(device), self.bias.to(device, dtype)).cpu()
        assert got.dtype == dtype and got.shape == (3, 7, OUT)
        exact = in_fp8(x, pack.to("cpu"), self.bias.to(dtype), largest / 448)
        sums = 1e-6 if device == "cpu" else 2e-3  # Hopper adds up fp8 products in fewer than 32 bits
        near(got, exact, torch.bfloat16 if by_row else dtype, sums)
        plain = F.linear(x.double(), pack.dequantise(torch.float32).double(), self.bias.double())
        assert 0.005 < (got - plain).norm() / plain.norm() < 0.04  # what rounding the input costs

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_is_the_product_of_rounded_matrices(self, form, dtype, scale):
        self.check(Fp8(numbers(OUT, IN).to(form), scale), dtype)

    @cuda_fp8
    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_the_same_on_a_gpu(self, form, dtype, scale):
        self.check(Fp8(numbers(OUT, IN).to(form), scale), dtype, "cuda")

    def test_takes_the_scale_of_the_file_and_clamps(self, scale):
        pack = Fp8(numbers(OUT, IN).to(FORMATS[0]), scale, torch.tensor(0.003))  # numbers above 1.34 are cut
        near(pack.multiply(self.x, self.bias), in_fp8(self.x, pack, self.bias, pack.input_scale), torch.bfloat16)

    def test_a_scale_of_one_is_none(self):
        x = self.x * 1e-3  # with scale 1 most of these would be rounded to nothing
        pack = Fp8(numbers(OUT, IN).to(FORMATS[0]), None, torch.tensor(1.0))
        near(pack.multiply(x, self.bias), in_fp8(x, pack, self.bias, x.abs().max() / 448), torch.float32)

    def test_zeros_give_the_bias(self, scale):
        pack = Fp8(numbers(OUT, IN).to(FORMATS[0]), scale)
        got = pack.multiply(torch.zeros(2, IN), self.bias)
        torch.testing.assert_close(got, self.bias.expand(2, OUT), rtol=8e-3, atol=0)

    def test_without_bias(self, scale):
        pack = Fp8(numbers(OUT, IN).to(FORMATS[0]), scale)
        near(pack.multiply(self.x, None), pack.multiply(self.x, 0 * self.bias).double(), torch.bfloat16)

    def test_linear_uses_it_where_the_device_can(self, monkeypatch):
        pack = Fp8.quantise(numbers(OUT, IN), matmul=True)
        plain = F.linear(self.x, pack.dequantise(torch.float32), self.bias)
        assert torch.equal(pack.linear(self.x, self.bias), plain)  # the CPU does not count
        monkeypatch.setattr(fp8, "supports_matmul", lambda device: True)
        assert torch.equal(pack.linear(self.x, self.bias), pack.multiply(self.x, self.bias))
        pack.matmul = False
        assert torch.equal(pack.linear(self.x, self.bias), plain)

    @pytest.mark.parametrize("shape", [(40, 32), (48, 24)])
    def test_other_sizes_are_unpacked(self, monkeypatch, shape):
        monkeypatch.setattr(fp8, "supports_matmul", lambda device: True)
        pack, x = Fp8.quantise(numbers(*shape), matmul=True), numbers(2, shape[1])
        assert torch.equal(pack.linear(x, None), F.linear(x, pack.dequantise(torch.float32)))

    def test_no_rows_at_all(self, monkeypatch):
        monkeypatch.setattr(fp8, "supports_matmul", lambda device: True)
        assert Fp8.quantise(numbers(OUT, IN), matmul=True).linear(torch.zeros(0, IN), None).shape == (0, OUT)

    def test_devices(self, monkeypatch):
        assert not supports_matmul("cpu")
        for capability, able in (((8, 6), False), ((8, 9), True), ((9, 0), True)):
            monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
            monkeypatch.setattr(torch.version, "cuda", "12.8")
            monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, capability=capability: capability)
            assert supports_matmul.__wrapped__("cuda") is able
