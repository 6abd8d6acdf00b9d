"""Reading safetensors: headers that lie, files that are no safetensors, shards, and memory that is not copied."""

import json
import os
import pickle
import sys
import zipfile

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from fluxcanvas.flux_runtime import FluxError
from fluxcanvas.flux_runtime.weights.files import TensorFile, component_files, join, open_tensors, read_json
from fluxcanvas.flux_runtime.weights.header import DTYPE_BITS, read_header

TWO_FLOATS = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


def refused(path, *words):
    with pytest.raises(FluxError) as error:
        read_header(path)
    message = str(error.value)
    assert str(path) in message and all(word in message for word in words), message


def test_good_file_is_read_as_the_library_reads_it(tmp_path):
    tensors = {
        "a": torch.randn(3, 4),
        "b": torch.arange(5, dtype=torch.int64),
        "c": torch.randn(2, 2).to(torch.bfloat16),
        "d": torch.randn(7).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    file = TensorFile(tmp_path / "x.safetensors")
    assert file.header.metadata == {"format": "pt"}
    for name, tensor in file.tensors().items():
        read = tensor.read()
        assert read.dtype == tensors[name].dtype and read.shape == tensors[name].shape
        assert torch.equal(read.float(), tensors[name].float())


@pytest.mark.parametrize(
    ("header", "data", "words"),
    [
        ({"a": {**TWO_FLOATS, "data_offsets": [0, 4]}}, b"1234", "does not take the 4 bytes"),
        ({"a": {**TWO_FLOATS, "shape": [2**62, 4]}}, b"12345678", "does not take"),
        ({"a": TWO_FLOATS}, b"1234", "would end at byte"),
        ({"a": TWO_FLOATS}, b"1234567890", "its tensors end at byte"),
        ({"a": TWO_FLOATS, "b": TWO_FLOATS}, b"12345678", "was due"),
        ({"a": {**TWO_FLOATS, "data_offsets": [4, 12]}}, b"123456789012", "was due"),
        ({"a": {**TWO_FLOATS, "data_offsets": [8, 0]}}, b"12345678", "does not take"),
        ({"a": {**TWO_FLOATS, "data_offsets": [-8, 0]}}, b"12345678", "not two offsets"),
        ({"a": {**TWO_FLOATS, "data_offsets": [0, 8.0]}}, b"12345678", "not two offsets"),
        ({"a": {**TWO_FLOATS, "shape": [True, 2]}}, b"12345678", "not a short list"),
        ({"a": {**TWO_FLOATS, "shape": [1] * 99}}, b"12345678", "not a short list"),
        ({"a": {**TWO_FLOATS, "dtype": "F33"}}, b"12345678", "'F33'"),
        ({"a": {**TWO_FLOATS, "dtype": ["F32"]}}, b"12345678", "not known here"),
        ({"a\x1b[31m": TWO_FLOATS}, b"12345678", "not plain text"),
        ({"\ud800": TWO_FLOATS}, b"12345678", "is not plain text"),
        ({"a" * 5000: TWO_FLOATS}, b"12345678", "not plain text"),
        ({"a": 3}, b"", "lacks dtype"),
        ({"a": {"dtype": "F32"}}, b"", "lacks dtype"),
        ({"__metadata__": {"a": 1}}, b"", "metadata"),
        ({"__metadata__": []}, b"", "metadata"),
        ([], b"", "not a JSON object"),
        (b"{   ", b"", "not JSON"),
        (b"\xff\xfe{}", b"", "not JSON"),
        (b"[" * 50_000, b"", "not JSON"),
        (b'{"a":' + b"9" * 10_000 + b"}", b"", "not JSON"),
        (b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":1}', b"12345678", "names a tensor twice"),
    ],
)
def test_lying_header_is_refused_with_its_fault(raw_file, header, data, words):
    refused(raw_file(header, data), words, "; ")


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 10**12, 200])
def test_header_longer_than_the_file_allocates_nothing(raw_file, length):
    refused(raw_file({"a": TWO_FLOATS}, b"12345678", length=length), "claims a header of")


def test_truncated_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(100), "b": torch.randn(100)}, path)
    whole = path.read_bytes()
    for length in (0, 3, 8, 9, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        refused(path, "download it again")


def test_other_formats_are_named(tmp_path):
    path = tmp_path / "model.safetensors"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", b"")
    refused(path, "zip", "save_file")
    torch.save({"a": torch.zeros(2)}, path)
    refused(path, "zip", "weights_only=True")
    path.write_bytes(pickle.dumps({"a": 1}))
    refused(path, "pickle", "save_file")
    path.write_bytes(b"GGUF" + bytes(100))
    refused(path, "GGUF", ".safetensors")
    path.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n")
    refused(path, "Git LFS pointer")
    path.write_bytes(b"<!DOCTYPE html><html>" * 9)
    refused(path, "web page")
    refused(tmp_path, "folder")
    refused(tmp_path / "none.safetensors", "cannot be read")


def test_the_advice_for_pickles_works(tmp_path, monkeypatch):
    """The one-line program in the message converts a checkpoint."""
    torch.save({"state_dict": {"a": torch.arange(4.0).view(2, 2).t()}}, tmp_path / "x.ckpt")
    with pytest.raises(FluxError) as error:
        read_header(tmp_path / "x.ckpt")
    program = str(error.value).split('python -c "')[1].rstrip('"')
    monkeypatch.chdir(tmp_path)
    exec(program.replace("'IN'", "'x.ckpt'").replace("OUT.safetensors", "x.safetensors"), {})
    (tensor,) = TensorFile(tmp_path / "x.safetensors").tensors().values()
    assert torch.equal(tensor.read(), torch.arange(4.0).view(2, 2).t())


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_fuzzed_files_are_read_or_refused(tmp_path, data):
    """Whatever the bytes, reading ends in a FluxError or in tensors that lie inside the file."""
    path = tmp_path / "fuzz.safetensors"
    path.write_bytes(data.draw(st.one_of(st.binary(max_size=200), _mutated_files(), _random_headers())))
    try:
        header = read_header(path)
    except FluxError:
        return
    for name, entry in header.entries.items():
        assert 8 <= entry.start <= entry.end <= header.size == path.stat().st_size
        if entry.dtype in ("F32", "U8", "BF16"):
            assert TensorFile(path).read(name).shape == entry.shape


def _frame(text: bytes, data: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + data


@st.composite
def _mutated_files(draw):
    """A sound file with some bytes overwritten, cut off or put in."""
    header = {"a": TWO_FLOATS, "b": {"dtype": "U8", "shape": [3], "data_offsets": [8, 11]}}
    content = bytearray(_frame(json.dumps(header).encode(), b"12345678abc"))
    for _ in range(draw(st.integers(1, 4))):
        place = draw(st.integers(0, len(content) - 1))
        content[place : place + draw(st.integers(0, 3))] = draw(st.binary(max_size=3))
    return bytes(content)


_numbers = st.one_of(
    st.integers(-2, 40), st.integers(-(2**70), 2**70), st.floats(), st.booleans(), st.none(), st.text(max_size=3)
)


@st.composite
def _random_headers(draw):
    """Headers of the right form with numbers and types that mostly lie."""
    entry = st.fixed_dictionaries(
        {
            "dtype": st.one_of(st.sampled_from(sorted(DTYPE_BITS)), st.text(max_size=4), _numbers),
            "shape": st.one_of(st.lists(_numbers, max_size=4), _numbers),
            "data_offsets": st.one_of(st.lists(_numbers, max_size=3), _numbers),
        }
    )
    header = draw(st.dictionaries(st.text(max_size=5), st.one_of(entry, _numbers), max_size=3))
    return _frame(json.dumps(header).encode(), draw(st.binary(max_size=40)))


def mapped_file(address: int) -> str:
    """The file that the memory at an address is mapped from (Linux)."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, *_, last = line.split(maxsplit=5)
            start, end = (int(part, 16) for part in span.split("-"))
            if start <= address < end:
                return last.strip()
    return ""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_tensors_are_the_mapped_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.randn(64, 64), "b": torch.randn(64)}, path)
    for tensor in TensorFile(path).tensors().values():
        assert mapped_file(tensor.read().data_ptr()) == os.fspath(path)
        assert mapped_file(tensor.read("cpu", torch.bfloat16).data_ptr()) != os.fspath(path)


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(8)}, path)
    before = path.read_bytes()
    tensor = TensorFile(path).read("a")
    tensor.add_(1)
    assert tensor.sum() == 16 and path.read_bytes() == before


def test_data_that_is_not_aligned_is_still_right(raw_file):
    header = {
        "a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "b": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
    }
    file = TensorFile(raw_file(header, b"\x07" + torch.tensor([1.5, -2.0]).numpy().tobytes()))
    tensor = file.read("b")
    assert file.header.entries["b"].start % 4 and tensor.data_ptr() % 4 == 0
    assert tensor.tolist() == [1.5, -2.0]


def test_rows_and_joins_are_lazy_and_exact(tmp_path):
    whole = torch.randn(6, 3)
    save_file({"whole": whole, "more": torch.ones(2, 3)}, tmp_path / "x.safetensors")
    tensors = TensorFile(tmp_path / "x.safetensors").tensors()
    turned = join([tensors["whole"].rows(4, 6), tensors["whole"].rows(0, 4), tensors["more"]])
    assert turned.shape == (8, 3)
    assert torch.equal(turned.read(), torch.cat([whole[4:], whole[:4], torch.ones(2, 3)]))
    assert turned.read(dtype=torch.bfloat16).dtype == torch.bfloat16
    with pytest.raises(FluxError, match="do not fit"):
        join([tensors["whole"], tensors["more"].viewed((2, 1, 3))])


class TestFolders:
    def write(self, folder, name, **tensors):
        folder.mkdir(exist_ok=True)
        save_file({key: torch.full((2,), float(value)) for key, value in tensors.items()}, folder / name)

    def shard(self, folder, stem="diffusion_pytorch_model", index=None):
        names = [f"{stem}-0000{i}-of-00002.safetensors" for i in (1, 2)]
        for i, name in enumerate(names):
            self.write(folder, name, **{f"t{i}": i})
        listing = {"metadata": {}, "weight_map": {"t0": names[0], "t1": names[1]}}
        (folder / (index or f"{stem}.safetensors.index.json")).write_text(json.dumps(listing))
        return names

    def test_sharded(self, tmp_path):
        names = self.shard(tmp_path / "c")
        assert [p.name for p in component_files(tmp_path / "c")] == names
        tensors, _ = open_tensors(component_files(tmp_path / "c"))
        assert {name: t.read()[0].item() for name, t in tensors.items()} == {"t0": 0, "t1": 1}

    def test_sharded_variant(self, tmp_path):
        names = self.shard(tmp_path / "c", "model.fp16", "model.safetensors.index.fp16.json")
        assert [p.name for p in component_files(tmp_path / "c")] == names

    def test_plain_file_before_variant(self, tmp_path):
        self.write(tmp_path / "c", "diffusion_pytorch_model.fp16.safetensors", a=1)
        assert [p.name for p in component_files(tmp_path / "c")] == ["diffusion_pytorch_model.fp16.safetensors"]
        self.write(tmp_path / "c", "diffusion_pytorch_model.safetensors", a=1)
        assert [p.name for p in component_files(tmp_path / "c")] == ["diffusion_pytorch_model.safetensors"]

    def test_missing_shard_is_named(self, tmp_path):
        names = self.shard(tmp_path / "c")
        (tmp_path / "c" / names[1]).unlink()
        with pytest.raises(FluxError, match=names[1]):
            component_files(tmp_path / "c")

    def test_index_cannot_lead_out_of_its_folder(self, tmp_path):
        self.write(tmp_path, "secret.safetensors", a=1)
        (tmp_path / "c").mkdir()
        index = {"weight_map": {"a": "../secret.safetensors"}}
        (tmp_path / "c" / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(FluxError, match="outside its folder"):
            component_files(tmp_path / "c")

    @pytest.mark.parametrize(
        "text", ["", "[]", "{", "\xff", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "[" * 90_000]
    )
    def test_broken_index(self, tmp_path, text):
        (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
        with pytest.raises(FluxError, match="download"):
            component_files(tmp_path)

    def test_pickles_only(self, tmp_path):
        (tmp_path / "pytorch_model.bin").write_bytes(b"")
        with pytest.raises(FluxError, match="pickle"):
            component_files(tmp_path)

    def test_nothing_or_too_much(self, tmp_path):
        with pytest.raises(FluxError, match="none"):
            component_files(tmp_path)
        self.write(tmp_path, "one.safetensors", a=1)
        assert component_files(tmp_path) == [tmp_path / "one.safetensors"]
        self.write(tmp_path, "two.safetensors", a=1)
        with pytest.raises(FluxError, match=r"several: one.safetensors, two.safetensors"):
            component_files(tmp_path)

    def test_tensor_in_two_shards(self, tmp_path):
        self.write(tmp_path, "one.safetensors", a=1)
        self.write(tmp_path, "two.safetensors", a=1)
        with pytest.raises(FluxError, match="another file"):
            open_tensors([tmp_path / "one.safetensors", tmp_path / "two.safetensors"])

    def test_json_of_absurd_size(self, tmp_path):
        path = tmp_path / "config.json"
        with path.open("wb") as file:
            file.truncate(100_000_000)
        with pytest.raises(FluxError, match="too large"):
            read_json(path)
