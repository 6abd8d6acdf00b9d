"""Packed weights found in files: every spelling of every scheme, and what is refused because numbers would be wrong."""

import json
import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fluxcanvas.flux_runtime import FluxError
from fluxcanvas.flux_runtime.quant.fp8 import Fp8
from fluxcanvas.flux_runtime.quant.readers import unpack
from fluxcanvas.flux_runtime.weights.files import LazyTensor, Stored, TensorFile
from fluxcanvas.flux_runtime.weights.packing import gather

PREFIXES = ("", "model.diffusion_model.", "text_encoders.t5xxl.transformer.")
prefixes = pytest.mark.parametrize("prefix", PREFIXES)
LAYER = "double_blocks.0.img_attn.proj"
OUT, IN = 32, 64


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def fp8(seed=0, form=torch.float8_e4m3fn):
    return numbers(OUT, IN, seed=seed).to(form)


def text(value):
    return torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8)


SCALE = torch.tensor(0.37)
E4M3 = {"format": "float8_e4m3fn"}


@pytest.fixture
def read(tmp_path):
    """`read(tensors, metadata, config)`: what `gather` makes of a file with these tensors."""

    def read(tensors, metadata=None, config=None):
        path = tmp_path / "model.safetensors"
        save_file(tensors, path, metadata)
        return gather(TensorFile(path).tensors(), config or {}, metadata or {})

    return read


def packing(tensor):
    return tensor.sources[0].packing


def weight_of(tensor):
    return unpack(tensor.sources[0]).dequantise(torch.float32)


class TestPlain:
    @pytest.mark.parametrize("form", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_only_matrices_are_packed(self, read, form):
        others = {"a.bias": fp8(form=form)[0], "norm.weight": fp8(form=form)[0], "a.scale": fp8(form=form)}
        others |= {"conv.weight": fp8(form=form).view(OUT, IN, 1, 1), "b.weight": numbers(4, 4)}
        found = read({"a.weight": fp8(form=form), **others})
        assert [name for name, tensor in found.items() if tensor.packed] == ["a.weight"]
        assert packing(found["a.weight"]).scheme == "fp8" and not packing(found["a.weight"]).sides
        assert torch.equal(weight_of(found["a.weight"]), fp8(form=form).float())
        assert torch.equal(found["a.bias"].read(dtype=torch.float32), others["a.bias"].float())

    def test_plain_numbers_are_left_as_they_are(self, read):
        tensors = {"a.weight": numbers(4, 4), "a.bias": numbers(4), "step": torch.zeros((), dtype=torch.int64)}
        found = read(tensors)
        assert found.keys() == tensors.keys() and not any(tensor.packed for tensor in found.values())

    def test_twice_is_once(self, read):
        once = read({"a.weight": fp8(), "a.scale_weight": SCALE})
        assert gather(once, {}, {}) == once


@prefixes
class TestScaled:
    """The same weight and scale in each of the spellings."""

    def check(self, found, prefix, matmul, scale=SCALE):
        name = f"{prefix}{LAYER}.weight"
        assert list(found) == [name]
        assert found[name].shape == (OUT, IN) and packing(found[name]).facts.get("matmul") is matmul
        assert torch.equal(weight_of(found[name]), fp8().float() * scale.reshape(-1, 1))

    @pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
    @pytest.mark.parametrize("shape", [(), (1,), (OUT,), (OUT, 1)])
    def test_scales(self, read, prefix, name, shape):
        scale = numbers(*shape, seed=4).abs() + 0.1
        found = read({f"{prefix}{LAYER}.weight": fp8(), f"{prefix}{LAYER}.{name}": scale})
        self.check(found, prefix, None, scale)

    @pytest.mark.parametrize("name", ["scale_input", "input_scale"])
    def test_scale_of_the_input(self, read, prefix, name):
        layer = prefix + LAYER
        found = read({f"{layer}.weight": fp8(), f"{layer}.weight_scale": SCALE, f"{layer}.{name}": torch.tensor(0.5)})
        self.check(found, prefix, None)
        assert float(unpack(found[f"{layer}.weight"].sources[0]).input_scale) == 0.5

    @pytest.mark.parametrize(("size", "matmul"), [(0, True), (1, True), (2, False)])
    def test_marker(self, read, prefix, size, matmul):
        tensors = {f"{prefix}{LAYER}.weight": fp8(), f"{prefix}{LAYER}.scale_weight": SCALE}
        found = read({**tensors, f"{prefix}scaled_fp8": torch.zeros(size, dtype=torch.float8_e4m3fn)})
        self.check(found, prefix, matmul)
        assert unpack(found[f"{prefix}{LAYER}.weight"].sources[0]).allows_matmul is matmul

    @pytest.mark.parametrize("full", [None, False, True])
    def test_description_beside_the_layer(self, read, prefix, full):
        said = E4M3 | ({} if full is None else {"full_precision_matrix_mult": full})
        layer = prefix + LAYER
        found = read({f"{layer}.weight": fp8(), f"{layer}.weight_scale": SCALE, f"{layer}.comfy_quant": text(said)})
        self.check(found, prefix, full is not True)

    @pytest.mark.parametrize("named", ["whole", "short"])
    def test_description_in_the_header(self, read, prefix, named):
        layer = LAYER if named == "short" else prefix + LAYER
        layers = {"elsewhere": E4M3, layer: E4M3 | {"full_precision_matrix_mult": True}}
        header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": layers})}
        found = read({f"{prefix}{LAYER}.weight": fp8(), f"{prefix}{LAYER}.weight_scale": SCALE}, header)
        self.check(found, prefix, False)


class TestFiles:
    def test_each_part_has_a_marker_of_its_own(self, read):
        """A plain fp8 transformer beside a scaled T5: two markers would not speak for each other."""
        unet, t5 = "model.diffusion_model.", "text_encoders.t5xxl.transformer."
        found = read(
            {
                f"{unet}a.weight": fp8(),
                f"{t5}scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn),
                f"{t5}a.weight": fp8(1),
                f"{t5}a.scale_weight": SCALE,
            }
        )
        assert packing(found[f"{unet}a.weight"]).facts == {}
        assert torch.equal(weight_of(found[f"{unet}a.weight"]), fp8().float())
        assert packing(found[f"{t5}a.weight"]).facts == {"matmul": False}
        assert torch.equal(weight_of(found[f"{t5}a.weight"]), fp8(1).float() * SCALE)

    def test_two_markers(self, read):
        """One of them allows to multiply in fp8, for the layers below its own prefix."""
        parts = {"vae.": 2, "vae.a.": 0, "vae2.": 0, "vae22.": 2}
        tensors = {f"{part}scaled_fp8": torch.zeros(size) for part, size in parts.items()}
        for part in parts:
            tensors |= {f"{part}b.weight": fp8(), f"{part}b.scale_weight": SCALE.clone()}
        found = read(tensors)
        assert {n: packing(t).facts["matmul"] for n, t in found.items()} == {
            f"{part}b.weight": size != 2 for part, size in parts.items()
        }

    def test_what_we_store_is_what_we_read(self, read):
        pack = Fp8.quantise(numbers(OUT, IN))
        found = read({f"a.{ending}": tensor for ending, tensor in pack.stored().items()})
        assert torch.equal(weight_of(found["a.weight"]), pack.dequantise(torch.float32))

    def test_without_any_prefix(self, read):
        found = read({"weight": fp8(), "scale_weight": SCALE, "scaled_fp8": torch.zeros(0)})
        assert list(found) == ["weight"] and torch.equal(weight_of(found["weight"]), fp8().float() * SCALE)

    def test_bytes_count_what_lies_beside(self, read):
        (stored,) = read({"a.weight": fp8(), "a.scale_weight": torch.ones(OUT)})["a.weight"].sources
        assert stored.nbytes == OUT * IN + 4 * OUT

    def test_four_bits_with_scales_of_scales_are_left(self, read):
        tensors = {
            "a.weight": torch.zeros(OUT, IN // 2, dtype=torch.uint8),
            "a.weight_scale": torch.zeros(OUT, IN // 16).to(torch.float8_e4m3fn),
            "a.weight_scale_2": SCALE,
            "a.comfy_quant": text({"format": "nvfp4"}),
        }
        assert read(tensors).keys() == tensors.keys()

    def test_what_has_no_weight_is_left_to_be_reported(self, read):
        names = ["a.scale_weight", "b.SCB", "c.weight.absmax", "d.weight.quant_state.bitsandbytes__nf4"]
        assert sorted(read({name: torch.ones(3) for name in names})) == names

    @pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
    def test_bytes_with_nothing_beside_are_left_to_be_reported(self, read, dtype):
        assert not read({"a.weight": torch.zeros(4, 4, dtype=dtype)})["a.weight"].packed

    def test_a_plain_layer_may_know_the_range_of_its_inputs(self, read):
        assert not read({"a.weight": numbers(4, 4), "a.input_scale": SCALE})["a.weight"].packed


class TestLostScales:
    def test_its_like_in_other_blocks_have_one(self, read):
        tensors = {
            f"blocks.{i}.a.{n}": t for i in range(3) for n, t in (("weight", fp8(i)), ("scale_weight", SCALE * 1))
        }
        read(tensors)
        del tensors["blocks.2.a.scale_weight"]
        with pytest.raises(FluxError, match=r"blocks\.2\.a\.weight"):
            read(tensors)

    @pytest.mark.parametrize("how", ["beside", "header", "input"])
    def test_a_description_without_its_scale(self, read, how):
        tensors = {"a.weight": fp8()}
        tensors |= {"beside": {"a.comfy_quant": text(E4M3)}, "input": {"a.scale_input": SCALE}}.get(how, {})
        header = {"_quantization_metadata": json.dumps({"layers": {"a": E4M3}})} if how == "header" else {}
        with pytest.raises(FluxError, match=r"a\.weight .* scale is missing"):
            read(tensors, header)

    def test_a_marker_without_scales_is_told(self, read, caplog):
        tensors = {"scaled_fp8": torch.zeros(2), "a.weight": fp8(), "shared.weight": fp8(1)}
        with caplog.at_level(logging.WARNING, "fluxcanvas"):
            found = read(tensors)
        assert "1 fp8 weights" in caplog.text and "a.weight" in caplog.text  # an embedding never has one
        assert torch.equal(weight_of(found["a.weight"]), fp8().float())


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"a.weight": fp8(), "a.scale_weight": torch.ones(IN)}, "a.scale_weight"),
        ({"a.weight": fp8(), "a.weight_scale": torch.ones(2, 4)}, "a.weight_scale"),
        ({"a.weight": fp8(), "a.weight_scale": SCALE, "a.input_scale": torch.ones(OUT)}, "a.input_scale"),
        ({"a.weight": fp8(), "a.weight_scale": SCALE * 1, "a.scale_weight": SCALE * 1}, "same weight"),
        ({"a.weight": numbers(4, 4), "a.scale_weight": SCALE}, "BF16|F32"),
        ({"a.weight": torch.zeros(4, 4, dtype=torch.int8), "a.weight_scale": SCALE}, "I8"),
        ({"a.weight": fp8()[0], "a.scale_weight": SCALE}, r"a\.weight .*\[64\]"),
        ({"a.weight": fp8(), "a.weight_scale": SCALE, "a.comfy_quant": text({"format": "mxfp8"})}, "a.weight .* mxfp8"),
        ({"a.weight": numbers(4, 4), "a.comfy_quant": text({"format": "int8_tensorwise"})}, "int8_tensorwise"),
        ({"a.weight": fp8(), "a.weight_scale": SCALE, "a.comfy_quant": text({"format": "float8_e5m2"})}, "described"),
        ({"a.weight": fp8(), "a.weight_scale": SCALE, "a.comfy_quant": text({})}, "no format"),
        ({"a.weight": fp8(), "a.weight_scale": SCALE, "a.comfy_quant": text([1])}, "JSON object"),
        ({"a.weight": fp8(), "a.weight_scale": SCALE, "a.comfy_quant": text("x")[:2]}, "not JSON"),
        ({"a.weight": fp8(), "a.weight_scale": SCALE, "a.comfy_quant": torch.zeros(9)}, "no short text"),
        ({"a.weight": fp8(), "a.comfy_quant": torch.full((70_000,), 32, dtype=torch.uint8)}, "no short text"),
        ({"a.weight": torch.zeros(4, 4, dtype=torch.int8), "a.SCB": torch.ones(3)}, "a.SCB"),
        ({"a.weight": numbers(4, 4), "a.SCB": torch.ones(4)}, "a.SCB"),
        ({"a.weight": torch.zeros(8, 1, dtype=torch.uint8), "a.weight.absmax": torch.ones(1)}, "quant_state"),
    ],
)
def test_refuses(read, tensors, match):
    with pytest.raises(FluxError, match=match):
        read(tensors)


@pytest.mark.parametrize("header", ["", "[]", "{}", '{"layers": 1}', '{"layers": {"a": 1}}', '{"layers": {"a": {}}}'])
def test_refuses_headers(read, header):
    with pytest.raises(FluxError):
        read({"a.weight": fp8(), "a.weight_scale": SCALE}, {"_quantization_metadata": header})


class TestBitsandbytes:
    @pytest.fixture(autouse=True)
    def library(self):
        pytest.importorskip("bitsandbytes")

    def four_bits(self, layer, **options):
        from fluxcanvas.flux_runtime.quant.bnb import Bnb4

        pack = Bnb4.quantise(numbers(OUT, IN), **options)
        return pack, {f"{layer}.{name}": tensor for name, tensor in pack.stored().items()}

    @prefixes
    @pytest.mark.parametrize("kind", ["nf4", "fp4"])
    @pytest.mark.parametrize("double", [False, True])
    def test_four_bits(self, read, prefix, kind, double):
        pack, tensors = self.four_bits(prefix + LAYER, kind=kind, double=double)
        found = read({**tensors, f"{prefix}norm.weight": numbers(8)})
        name = f"{prefix}{LAYER}.weight"
        assert set(found) == {name, f"{prefix}norm.weight"} and found[name].shape == (OUT, IN)
        assert packing(found[name]).scheme == "bnb-4bit" and packing(found[name]).facts == {"kind": kind}
        assert torch.equal(weight_of(found[name]), pack.dequantise(torch.float32))

    @prefixes
    def test_eight_bits(self, read, prefix):
        from fluxcanvas.flux_runtime.quant.bnb import Bnb8

        pack, layer = Bnb8.quantise(numbers(OUT, IN)), prefix + LAYER
        config = {"quantization_config": {"quant_method": "bitsandbytes", "llm_int8_threshold": 4.5}}
        found = read({f"{layer}.{name}": tensor for name, tensor in pack.stored().items()}, None, config)
        assert list(found) == [f"{layer}.weight"] and found[f"{layer}.weight"].shape == (OUT, IN)
        back = unpack(found[f"{layer}.weight"].sources[0])
        assert torch.equal(back.dequantise(torch.float32), pack.dequantise(torch.float32)) and back.threshold == 4.5

    @pytest.mark.parametrize("value", [None, "6", -1, float("nan"), True, []])
    def test_absurd_thresholds_are_the_usual_one(self, read, value):
        from fluxcanvas.flux_runtime.quant.bnb import Bnb8

        tensors = {f"a.{name}": tensor for name, tensor in Bnb8.quantise(numbers(OUT, IN)).stored().items()}
        found = read(tensors, None, {"quantization_config": {"llm_int8_threshold": value}})
        assert packing(found["a.weight"]).facts == {"threshold": 6.0}

    def test_described_only(self, read):
        """Of a file on a server only the header is read: no shape, but no error either."""
        _, tensors = self.four_bits("a")
        tensors |= {"b.weight": fp8(), "b.weight_scale": SCALE, "b.comfy_quant": text(E4M3)}
        tensors |= {"c.weight": torch.zeros(4, 4, dtype=torch.uint8), "c.comfy_quant": text({"format": "nvfp4"})}
        types = {torch.uint8: "U8", torch.float32: "F32", torch.float8_e4m3fn: "F8_E4M3"}
        described = {n: LazyTensor.whole(Stored(n, types[t.dtype], tuple(t.shape))) for n, t in tensors.items()}
        found = gather(described, {}, {})
        assert set(found) == {"a.weight", "b.weight", "c.weight", "c.comfy_quant"}
        assert found["a.weight"].shape == (OUT * IN // 2, 1)
        assert packing(found["a.weight"]).facts == {"kind": "nf4", "shape_unknown": True}
        assert packing(found["b.weight"]).facts == {"matmul": False} and not found["c.weight"].packed

    @pytest.mark.parametrize("lost", ["absmax", "quant_map", "nested_absmax", "nested_quant_map"])
    def test_a_side_is_missing(self, read, lost):
        _, tensors = self.four_bits("a", double=True)
        del tensors[f"a.weight.{lost}"]
        with pytest.raises(FluxError, match=rf"a\.weight .*{lost}.* is missing"):
            read(tensors)

    def test_a_side_is_cut_short(self, read):
        _, tensors = self.four_bits("a")
        tensors["a.weight.absmax"] = tensors["a.weight.absmax"][:-1].clone()
        with pytest.raises(FluxError, match=r"absmax beside it has 31 numbers instead of 32"):
            read(tensors)

    def test_two_descriptions(self, read):
        _, tensors = self.four_bits("a")
        state = tensors["a.weight.quant_state.bitsandbytes__nf4"]
        with pytest.raises(FluxError, match="twice"):
            read(tensors | {"a.weight.quant_state.bitsandbytes__fp4": state.clone()})
        del tensors["a.weight.quant_state.bitsandbytes__nf4"]
        with pytest.raises(FluxError, match="named fp4 but described as nf4"):
            read(tensors | {"a.weight.quant_state.bitsandbytes__fp4": state})

    @settings(max_examples=60, deadline=None)
    @given(data=st.data())
    def test_any_damage_to_the_description(self, tmp_path_factory, data):
        _, tensors = self.four_bits("a", double=True)
        name = "a.weight.quant_state.bitsandbytes__nf4"
        state = tensors[name].tolist()
        at = data.draw(st.integers(0, len(state) - 1))
        state[at : at + data.draw(st.integers(0, 20))] = data.draw(st.binary(max_size=20))
        path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
        save_file(tensors | {name: torch.tensor(state, dtype=torch.uint8)}, path)
        try:
            found = gather(TensorFile(path).tensors(), {}, {})
            weight = weight_of(found["a.weight"])
        except FluxError:
            return
        assert weight.numel() == OUT * IN and weight.isfinite().all()
