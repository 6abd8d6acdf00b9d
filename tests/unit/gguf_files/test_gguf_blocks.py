"""Weights in GGUF blocks: bit for bit what the gguf package makes of them, on any device and in any portion."""

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

from fluxcanvas.flux_runtime import FluxError
from fluxcanvas.flux_runtime.quant import gguf
from fluxcanvas.flux_runtime.quant.gguf import FORMATS, Gguf

KINDS = sorted(FORMATS)
ROWS, COLUMNS = 12, 1024


def oracle(raw, kind):
    with np.errstate(over="ignore", invalid="ignore"):
        return torch.from_numpy(dequantize(raw, GGMLQuantizationType[kind]))


def packed(raw, kind, columns=COLUMNS):
    return Gguf.from_stored(torch.from_numpy(raw), {}, (len(raw), columns), {"type": kind})


def bits_equal(a, b):
    return a.dtype == b.dtype == torch.float32 and torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("kind", KINDS)
class TestEveryType:
    def test_sizes_are_those_of_the_package(self, kind):
        assert (FORMATS[kind].numbers, FORMATS[kind].size) == GGML_QUANT_SIZES[GGMLQuantizationType[kind]]

    def test_random_blocks_bit_for_bit(self, kind, gguf_bytes):
        raw = gguf_bytes(kind)
        weight = packed(raw, kind).dequantise(torch.float32)
        assert weight.shape == (ROWS, COLUMNS) and bits_equal(weight, oracle(raw, kind))
        assert weight.unique().numel() > 100

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
    def test_other_types_are_the_float32_result_rounded_once(self, kind, dtype, gguf_bytes):
        raw = gguf_bytes(kind)
        weight = packed(raw, kind).dequantise(dtype)
        assert weight.dtype == dtype and torch.equal(weight, oracle(raw, kind).to(dtype))

    @pytest.mark.parametrize("chunk", [256, 256 * 5, 1 << 30])
    def test_portions_make_no_difference(self, kind, chunk, monkeypatch, gguf_bytes):
        raw = gguf_bytes(kind)
        monkeypatch.setattr(gguf, "CPU_CHUNK", chunk)
        assert bits_equal(packed(raw, kind).dequantise(torch.float32), oracle(raw, kind))

    def test_one_block_and_no_block(self, kind, gguf_bytes):
        form = FORMATS[kind]
        raw = gguf_bytes(kind, (3, 256))[2:, : form.size]
        assert bits_equal(packed(raw, kind, form.numbers).dequantise(torch.float32), oracle(raw, kind))
        assert packed(raw[:0], kind).dequantise(torch.float32).shape == (0, COLUMNS)

    def test_rows_of_a_file_are_rows_of_the_weight(self, kind, gguf_bytes):
        """q, k and v are cut from one tensor without unpacking it."""
        raw = gguf_bytes(kind)
        part = packed(raw, kind).weight[4:8]
        weight = Gguf.from_stored(part, {}, (4, COLUMNS), {"type": kind}).dequantise(torch.float32)
        assert bits_equal(weight, oracle(raw, kind)[4:8])

    def test_linear(self, kind, gguf_bytes):
        raw = gguf_bytes(kind, scale=0.01)
        x, bias = torch.randn(2, 3, COLUMNS), torch.randn(ROWS)
        expected = torch.nn.functional.linear(x, oracle(raw, kind), bias)
        assert torch.equal(packed(raw, kind).linear(x, bias), expected)

    def test_what_is_stored_reads_back(self, kind, gguf_bytes):
        weight = packed(gguf_bytes(kind), kind)
        again = Gguf.from_stored(weight.stored()["weight"], {}, weight.shape, {"type": weight.kind})
        assert bits_equal(again.dequantise(torch.float32), weight.dequantise(torch.float32))
        assert again.scheme == f"GGUF {kind}"

    def test_a_cast_of_the_model_leaves_the_bytes(self, kind, gguf_bytes):
        raw = gguf_bytes(kind)
        weight = packed(raw, kind).to(torch.bfloat16)
        assert weight.weight.dtype == torch.uint8 and bits_equal(weight.dequantise(torch.float32), oracle(raw, kind))

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_cuda_bit_for_bit(self, kind, monkeypatch, gguf_bytes):
        raw = gguf_bytes(kind)
        monkeypatch.setattr(gguf, "GPU_CHUNK", 256 * 5)
        assert bits_equal(packed(raw, kind).to("cuda").dequantise(torch.float32).cpu(), oracle(raw, kind))


@pytest.mark.parametrize(
    ("kind", "worst"), [("Q8_0", 0.006), ("Q5_1", 0.05), ("Q5_0", 0.06), ("Q4_1", 0.1), ("Q4_0", 0.13)]
)
def test_weights_that_were_quantised(kind, worst):
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    raw = quantize(weight.numpy(), GGMLQuantizationType[kind])
    back = packed(raw, kind, 512).dequantise(torch.float32)
    assert bits_equal(back, oracle(raw, kind))
    assert ((back - weight).norm() / weight.norm()) < worst


def test_rows_that_are_not_whole_blocks(gguf_bytes):
    """A converter may reshape a weight to make whole blocks of it: the numbers come in order all the same."""
    raw = gguf_bytes("Q4_K", (6, 256))
    weight = Gguf.from_stored(torch.from_numpy(raw).reshape(1, -1), {}, (24, 64), {"type": "Q4_K"})
    assert bits_equal(weight.dequantise(torch.float32), oracle(raw, "Q4_K").reshape(24, 64))


def test_a_compiler_sees_one_graph(gguf_bytes):
    weight = packed(gguf_bytes("IQ4_NL"), "IQ4_NL")
    compiled = torch.compile(weight.dequantise, backend="eager", fullgraph=True)
    assert torch.equal(compiled(torch.bfloat16), weight.dequantise(torch.bfloat16))


@pytest.mark.parametrize(
    ("weight", "shape", "facts", "words"),
    [
        (torch.zeros(4, 144, dtype=torch.uint8), (4, 256), {"type": "IQ2_XS"}, "type IQ2_XS is not read; Q8_0, Q4_0"),
        (torch.zeros(4, 144, dtype=torch.uint8), (4, 256), {}, "type None"),
        (torch.zeros(4, 144, dtype=torch.uint8), (4, 256), {"type": ["Q4_K"]}, "is not read"),
        (torch.zeros(4, 144, dtype=torch.uint8), (4, 512), {"type": "Q4_K"}, "does not go into"),
        (torch.zeros(3, 144, dtype=torch.uint8), (4, 256), {"type": "Q4_K"}, "does not go into"),
        (torch.zeros(4, 144, dtype=torch.int8), (4, 256), {"type": "Q4_K"}, "int8; the file is damaged"),
        (torch.zeros(4, 18, dtype=torch.uint8), (4, 31), {"type": "Q4_0"}, "does not go into"),
    ],
)
def test_what_does_not_fit_is_refused(weight, shape, facts, words):
    with pytest.raises(FluxError, match=words):
        Gguf.from_stored(weight, {}, shape, facts)
