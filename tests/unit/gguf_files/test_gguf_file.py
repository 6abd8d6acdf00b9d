"""Reading GGUF files: what the gguf package writes comes back, under the right names; headers that lie are refused."""

import struct

import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFReader, GGUFWriter, get_tensor_name_map
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize, quantize

from fluxcanvas.flux_runtime import FluxError
from fluxcanvas.flux_runtime.quant.gguf import Gguf
from fluxcanvas.flux_runtime.weights.gguf_file import TYPES, GGUFFile, read_gguf_header
from fluxcanvas.flux_runtime.weights.gguf_names import t5_names

F32, Q4_0, Q8_0, IQ2_XS = 0, 2, 8, 17  # types of tensors
UINT8, UINT32, INT32, TEXT, LIST = 0, 4, 5, 8, 9  # types of metadata


def write(path, tensors, arch="flux"):
    """A file by the gguf package; a value is an array, or bytes and their type."""
    writer = GGUFWriter(str(path), arch)
    for name, value in tensors.items():
        array, kind = value if isinstance(value, tuple) else (value, None)
        writer.add_tensor(name, array, raw_dtype=kind)
    return writer


def finish(writer):
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def refused(path, *words):
    with pytest.raises(FluxError) as error:
        read_gguf_header(path)
    assert all(word in str(error.value) for word in (str(path), *words)), str(error.value)


@pytest.fixture
def flux_file(tmp_path):
    """Some tensors of a FLUX transformer as people's files have them, with what they stand for."""
    random = np.random.default_rng(0)
    weights = {
        "double_blocks.0.img_attn.qkv.weight": (96, 64, "Q4_0"),
        "double_blocks.0.img_attn.norm.key_norm.scale": (32, "F32"),
        "single_blocks.0.linear1.weight": (160, 64, "Q8_0"),
        "single_blocks.0.linear1.bias": (160, "F16"),
        "img_in.weight": (64, 64, "BF16"),
        "img_in.bias": (64, "F32"),
    }
    tensors, expected = {}, {}
    for name, (*shape, kind) in weights.items():
        kind = GGMLQuantizationType[kind]
        raw = quantize(random.standard_normal(shape).astype(np.float32), kind)
        tensors[name] = (raw, kind)
        expected[name] = torch.from_numpy(np.array(dequantize(raw, kind), dtype=np.float32)).reshape(shape)
    writer = write(tmp_path / "flux.gguf", tensors)
    writer.add_quantization_version(2)
    writer.add_array("tokenizer.tokens", ["one", "two", "three"] * 100)
    writer.add_array("scores", [1.0] * 100)
    writer.add_description("a\nlong text " * 100)
    writer.add_bool("flag", True)
    finish(writer)
    return tmp_path / "flux.gguf", expected


def numbers(tensor):
    return tensor.read(dtype=torch.float32)


def test_flux_file_is_read_as_the_package_reads_it(flux_file):
    path, expected = flux_file
    file = GGUFFile(path)
    tensors = file.tensors()
    assert list(tensors) == [t.name for t in GGUFReader(path).tensors] == list(expected)
    for name, tensor in tensors.items():
        assert tensor.shape == tuple(expected[name].shape) and torch.equal(numbers(tensor), expected[name])
    for theirs in GGUFReader(path).tensors:
        ours = file.header.entries[theirs.name]
        assert (ours.dtype, ours.start) == (theirs.tensor_type.name, theirs.data_offset)
        assert file.nbytes_of(theirs.name) == tensors[theirs.name].sources[0].nbytes == theirs.n_bytes


def test_metadata_keeps_what_is_short(flux_file):
    metadata = GGUFFile(flux_file[0]).header.metadata
    assert metadata == {"general.architecture": "flux", "general.quantization_version": "2", "flag": "True"}


def test_packed_tensors_are_the_bytes_of_the_file(flux_file):
    tensor = GGUFFile(flux_file[0]).tensors()["double_blocks.0.img_attn.qkv.weight"]
    (stored,) = tensor.sources
    assert (stored.dtype, stored.packing.scheme, stored.packing.facts) == ("Q4_0", "gguf", {"type": "Q4_0"})
    assert stored.read().shape == (96, 2 * 18) and stored.read().dtype == torch.uint8
    rows = Gguf.from_stored(stored.read()[32:64], {}, (32, 64), stored.packing.facts)
    assert torch.equal(rows.dequantise(torch.float32), tensor.rows(32, 64).read(dtype=torch.float32))


def test_tensors_share_the_mapped_file_and_spare_it(flux_file):
    path, _ = flux_file
    before, file = path.read_bytes(), GGUFFile(path)
    base = file._storage.data_ptr()
    for name, tensor in file.tensors().items():
        read = tensor.sources[0].read()
        assert base <= read.data_ptr() < base + len(before), name
        read.zero_()
    assert path.read_bytes() == before


def test_the_version_before_is_read_too(raw, forge):
    data = struct.pack("<8f", *range(8))
    for version in (2, 3):
        read = GGUFFile(raw([forge.info()], data=data, version=version)).tensors()["a"].read()
        assert read.tolist() == list(range(8))


def test_plain_types_ranks_and_the_scalar(raw, forge):
    data = bytes(range(64)) * 4
    kinds = {24: torch.int8, 25: torch.int16, 26: torch.int32, 27: torch.int64, 28: torch.float64, 30: torch.bfloat16}
    for kind, dtype in kinds.items():
        read = GGUFFile(raw([forge.info(dims=(4, 3, 2), kind=kind)], data=data)).tensors()["a"].read()
        assert read.dtype == dtype and read.shape == (2, 3, 4)
        assert read.flatten().tolist() == torch.frombuffer(bytearray(data), dtype=dtype)[:24].tolist()
    assert GGUFFile(raw([forge.info(dims=())], data=data)).tensors()["a"].read().shape == ()
    assert GGUFFile(raw([forge.info(dims=(4, 0))], data=data)).tensors()["a"].read().shape == (0, 4)
    assert GGUFFile(raw([forge.info(dims=(32, 0), kind=Q4_0)], data=data)).read("a").shape == (0, 18)
    assert GGUFFile(raw([forge.info(dims=(64,), kind=Q4_0)], data=data)).read("a").shape == (1, 36)


def test_other_alignments(tmp_path, raw, forge):
    tensors = {"a": np.ones((3, 3), np.float32), "b": np.full((5,), 7, np.float16)}
    writer = write(tmp_path / "aligned.gguf", tensors)
    writer.add_custom_alignment(128)
    finish(writer)
    assert GGUFFile(tmp_path / "aligned.gguf").tensors()["b"].read().tolist() == [7] * 5
    one = forge.entry("general.alignment", UINT32, struct.pack("<I", 1))
    odd = [forge.info("a", (1,), 24, 0), forge.info("b", (2,), F32, 1), forge.info("c", (32,), Q8_0, 9)]
    for pad in ("", "p"):  # one of them puts the numbers at odd addresses
        path = raw(
            odd, [one, forge.entry("k" + pad, UINT8, b"\0")], b"\7" + struct.pack("<2f", 1, 2) + bytes(34), alignment=1
        )
        tensors = GGUFFile(path).tensors()
        assert tensors["b"].read().tolist() == [1, 2] and numbers(tensors["c"]).tolist() == [0] * 32
        assert tensors["b"].sources[0].read().data_ptr() % 4 == tensors["c"].sources[0].read().data_ptr() % 2 == 0


def test_reshaped_tensors_have_their_original_shape(raw, forge):
    shape = forge.entry("comfy.gguf.orig_shape.a", LIST, struct.pack("<IQ2i", INT32, 2, 16, 8))
    file = GGUFFile(raw([forge.info(dims=(32, 4), kind=Q8_0)], [shape], bytes(range(136))))
    tensor = file.tensors()["a"]
    assert tensor.shape == (16, 8) and tensor.sources[0].read().shape == (1, 136)
    expected = dequantize(np.arange(136, dtype=np.uint8).reshape(4, 34), GGMLQuantizationType.Q8_0).reshape(16, 8)
    assert torch.equal(numbers(tensor), torch.from_numpy(expected))
    for wrong in ((16, 9), (-16, -8), (128,) * 3):
        values = struct.pack(f"<IQ{len(wrong)}i", INT32, len(wrong), *wrong)
        shape = forge.entry("comfy.gguf.orig_shape.a", LIST, values)
        refused(raw([forge.info(dims=(32, 4), kind=Q8_0)], [shape], bytes(136)), "original shape", "'a'")
    refused(
        raw([forge.info()], [forge.entry("comfy.gguf.orig_shape.a", TEXT, forge.text("8"))], bytes(32)),
        "original shape",
    )


def test_types_that_are_not_read_are_named_when_they_are_read(raw, forge):
    path = raw([forge.info("ok", (8,)), forge.info("odd", (256, 2), IQ2_XS, 32)], data=bytes(32 + 2 * 74))
    file = GGUFFile(path)
    tensors = file.tensors()
    assert tensors["ok"].read().tolist() == [0] * 8
    assert (tensors["odd"].dtype, tensors["odd"].shape, file.nbytes_of("odd")) == ("IQ2_XS", (2, 256), 148)
    with pytest.raises(FluxError, match=r"x\.gguf: tensor 'odd' is stored as IQ2_XS.*F32, F16, BF16, Q8_0.*IQ4_XS"):
        tensors["odd"].sources[0].read()
    refused(raw([forge.info(kind=77)], data=bytes(32)), "'a' as GGUF type 77", "use another file")


def test_sizes_of_all_types_are_those_of_the_package():
    known = {kind.value: kind for kind in GGMLQuantizationType}  # an older package knows fewer
    for number in TYPES.keys() & known.keys():
        name, block, size = TYPES[number]
        assert known[number].name == name
        if name != "Q8_1":  # the package has its old size, of before its scales became float16
            assert (block, size) == GGML_QUANT_SIZES[known[number]]
    assert len(TYPES.keys() & known.keys()) > 25


class TestT5Names:
    @pytest.fixture
    def state(self, weights):
        return weights("t5")

    def test_every_name_is_transformers_name(self, tmp_path, state):
        theirs = get_tensor_name_map(MODEL_ARCH.T5ENCODER, 2)
        named = {theirs.get_name(n.removesuffix(".weight")) + ".weight": t.numpy() for n, t in state.items()}
        assert "enc.blk.1.ffn_gate.weight" in named and len(named) == len(state)
        finish(write(tmp_path / "t5.gguf", named, "t5encoder"))
        file = GGUFFile(tmp_path / "t5.gguf")
        tensors = t5_names(file.tensors())
        assert file.header.metadata["general.architecture"] == "t5encoder" and tensors.keys() == state.keys()
        assert all(torch.equal(tensors[name].read(), state[name]) for name in state)

    def test_decoder_and_strangers(self):
        names = ("enc.blk.0.attn_q.weight", "dec.blk.0.attn_q.weight", "output.weight", "enc.blk.0.other.weight", "x")
        renamed = t5_names(dict.fromkeys(names))
        assert set(renamed) == {
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            "decoder.blk.0.attn_q.weight",
            "lm_head.weight",
            "enc.blk.0.other.weight",
            "x",
        }

    def test_other_models_keep_their_names(self):
        names = dict.fromkeys(["output.weight", "token_embd.weight", "double_blocks.0.img_mod.lin.weight"])
        assert t5_names(names) == names
