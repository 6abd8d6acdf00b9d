"""GGUF headers that lie, and bytes at random: a FluxError that says what is amiss, or tensors inside the file."""

import struct
import tracemalloc

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFEndian, GGUFWriter
from gguf.quants import quantize
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fluxcanvas.flux_runtime import FluxError
from fluxcanvas.flux_runtime.quant.gguf_blocks import FORMATS
from fluxcanvas.flux_runtime.weights import gguf_file
from fluxcanvas.flux_runtime.weights.gguf_file import GGUFFile, read_gguf_header
from fluxcanvas.flux_runtime.weights.header import DTYPE_BITS

F32, Q8_0 = 0, 8  # types of tensors
UINT8, UINT32, INT32, TEXT, LIST, UINT64 = 0, 4, 5, 8, 9, 10  # types of metadata
HUGE = (2**64 - 1, 2**63, 2**60, 2**32)


def refused(path, *words):
    """The error says so, and no more memory was taken than a small file needs."""
    tracemalloc.start()
    with pytest.raises(FluxError) as error:
        read_gguf_header(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    message = str(error.value)
    assert all(word in message for word in (str(path), *words, "; ")), message
    assert peak < 1_000_000


def u64(number):
    return struct.pack("<Q", number)


def items(kind, count, content=b""):
    """The value of a list."""
    return struct.pack("<IQ", kind, count) + content


class TestClaims:
    """A claim that the file cannot hold costs an error, not memory."""

    @pytest.mark.parametrize("count", HUGE)
    def test_counts(self, raw, forge, count):
        refused(raw([forge.info()], data=bytes(32), counts=(count, 0)), f"claims {count:,} tensors")
        refused(raw([forge.info()], data=bytes(32), counts=(0, count)), f"claims {count:,} metadata entries")

    @pytest.mark.parametrize("count", [3, 100, 100_000])
    def test_counts_beyond_the_end(self, raw, forge, count):
        refused(raw([forge.info()], counts=(count, 0)), "ends in the middle")
        refused(raw([], [forge.entry("a", UINT8, b"1")], counts=(0, count), alignment=1), "ends in the middle")

    @pytest.mark.parametrize("length", HUGE)
    def test_lengths_of_texts(self, raw, forge, length):
        refused(raw([u64(length) + b"name"], counts=(1, 0)), "ends in the middle")
        refused(raw([], [u64(length) + b"key"], counts=(0, 1)), "ends in the middle")
        refused(raw([], [forge.entry("key", TEXT, u64(length) + b"value")]), "ends in the middle")
        refused(raw([], [forge.entry("key", LIST, items(TEXT, 2, forge.text("a") + u64(length)))]), "in the middle")

    @pytest.mark.parametrize("count", HUGE)
    def test_lengths_of_lists(self, raw, forge, count):
        refused(raw([], [forge.entry("key", LIST, items(UINT64, count))]), "ends in the middle")
        refused(raw([], [forge.entry("key", LIST, items(TEXT, count))]), f"claims {count:,} items")
        refused(raw([], [forge.entry("key", LIST, items(LIST, count))]), f"claims {count:,} items")
        refused(raw([], [forge.entry("key", LIST, items(LIST, 1, items(TEXT, count)))]), f"claims {count:,} items")
        refused(raw([], [forge.entry("key", LIST, items(TEXT, 1_999_999))]), "ends in the middle")

    def test_many_lists_share_one_allowance(self, raw, forge, monkeypatch):
        lists = [forge.entry(f"key{i}", LIST, items(TEXT, 200, bytes(8 * 200))) for i in range(5)]
        path = raw([], lists)
        assert not read_gguf_header(path).metadata
        monkeypatch.setattr(gguf_file, "MAX_ITEMS", 999)
        refused(path, "claims 200 items")

    def test_lists_in_lists(self, raw, forge):
        deep = b"".join(items(LIST, 1) for _ in range(50_000))
        refused(raw([], [forge.entry("key", LIST, deep)]), "lists in lists")
        shallow = items(LIST, 2, items(INT32, 1, bytes(4)) + items(TEXT, 1, forge.text("x")))
        path = raw([], [forge.entry("key", LIST, shallow), forge.entry("after", UINT8, b"\5")])
        assert read_gguf_header(path).metadata == {"after": "5"}

    @pytest.mark.parametrize("dims", [(2**64 - 1,), (2**63, 2**63), (2**32, 2**32), (9,), (2**64 - 1,) * 8])
    def test_dimensions(self, raw, forge, dims):
        refused(raw([forge.info(dims=dims)], data=bytes(32)), "'a' would end at byte")

    @pytest.mark.parametrize("rank", [9, 2**32 - 1])
    def test_ranks(self, raw, forge, rank):
        refused(raw([forge.text("a") + struct.pack("<I", rank) + bytes(500)], counts=(1, 0)), f"{rank:,} dimensions")

    @pytest.mark.parametrize("offset", [32, 2**63, 2**64 - 32])
    def test_offsets(self, raw, forge, offset):
        refused(raw([forge.info(offset=offset)], data=bytes(32)), "would end at byte")

    @pytest.mark.parametrize("alignment", [2**31, 2**20])
    def test_alignments(self, raw, forge, alignment):
        aligned = forge.entry("general.alignment", UINT32, struct.pack("<I", alignment))
        refused(raw([forge.info()], [aligned], bytes(32)), "would end at byte")


class TestContradictions:
    def test_overlaps(self, raw, forge):
        pair = [forge.info("first", (16,)), forge.info("second", (8,), offset=32)]
        refused(raw(pair, data=bytes(96)), "'second'", "inside another")
        refused(raw([forge.info("a"), forge.info("b")], data=bytes(32)), "inside another")

    def test_gaps_are_harmless(self, raw, forge):
        tensors = [forge.info("b", offset=64), forge.info("a")]
        assert list(read_gguf_header(raw(tensors, data=bytes(200))).entries) == ["b", "a"]

    def test_offsets_that_are_not_aligned(self, raw, forge):
        refused(raw([forge.info(offset=4)], data=bytes(64)), "offset 4", "not aligned")

    @pytest.mark.parametrize("kind", [Q8_0, 12])
    def test_blocks_that_are_not_whole(self, raw, forge, kind):
        refused(raw([forge.info(dims=(31, 2), kind=kind)], data=bytes(999)), "whole", "blocks")
        refused(raw([forge.info(dims=(1, 256), kind=kind)], data=bytes(999)), "whole", "blocks")
        refused(raw([forge.info(dims=(), kind=kind)], data=bytes(999)), "whole", "blocks")

    def test_names_given_twice(self, raw, forge):
        refused(raw([forge.info(), forge.info(offset=32)], data=bytes(64)), "tensor 'a' twice")
        refused(raw([], [forge.entry("k", UINT8, b"1"), forge.entry("k", UINT8, b"2")]), "'k' twice")

    @pytest.mark.parametrize("name", [b"\xff\xfe", b"a\x1b[31m", b"a\0b", b"a" * 501])
    def test_names_that_are_no_plain_text(self, raw, forge, name):
        refused(raw([forge.info(name)], data=bytes(32)), "name of a tensor", "plain text")
        refused(raw([], [forge.entry(name, UINT8, b"1")]), "name of a metadata entry", "plain text")

    def test_values_that_are_no_plain_text_are_passed_over(self, raw, forge):
        entries = [
            forge.entry(str(i), TEXT, forge.text(v)) for i, v in enumerate([b"\xff", b"\x1b", b"a" * 257, b"ok"])
        ]
        assert read_gguf_header(raw([], entries)).metadata == {"3": "ok"}

    @pytest.mark.parametrize("kind", [13, 2**32 - 1])
    def test_types_of_metadata(self, raw, forge, kind):
        refused(raw([], [forge.entry("k", kind, bytes(50))]), f"value of type {kind}")
        refused(raw([], [forge.entry("k", LIST, items(kind, 1, bytes(50)))]), f"value of type {kind}")

    @pytest.mark.parametrize(
        ("kind", "value"),
        [
            (UINT32, bytes(4)),
            (UINT32, struct.pack("<I", 24)),
            (UINT64, u64(32)),
            (TEXT, u64(2) + b"32"),
            (LIST, items(0, 0)),
        ],
    )
    def test_alignments(self, raw, forge, kind, value):
        refused(raw([], [forge.entry("general.alignment", kind, value)]), "not a power of two")


class TestOtherFiles:
    @pytest.mark.parametrize("version", [0, 1, 4, 2**31])
    def test_versions(self, raw, version):
        refused(raw(version=version), "GGUF file")

    def test_big_endian(self, tmp_path):
        writer = GGUFWriter(str(tmp_path / "big.gguf"), "flux", endianess=GGUFEndian.BIG)
        writer.add_tensor("a", np.ones(4, np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        refused(tmp_path / "big.gguf", "big-endian")

    def test_no_gguf_at_all(self, tmp_path):
        refused(tmp_path, "folder")
        refused(tmp_path / "none.gguf", "cannot be read")
        for content, words in [
            (b"", "only 0 bytes"),
            (b"GGUF" + bytes(19), "only 23 bytes"),
            (bytes(99), "not a GGUF"),
        ]:
            (tmp_path / "x.gguf").write_bytes(content)
            refused(tmp_path / "x.gguf", words)


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """The bytes of a small sound file, and where its data starts."""
    path = tmp_path_factory.mktemp("sound") / "x.gguf"
    writer = GGUFWriter(str(path), "flux")
    writer.add_quantization_version(2)
    writer.add_array("tokens", ["a", "b"])
    writer.add_tensor("w", quantize(np.eye(4, 64, dtype=np.float32), GGMLQuantizationType(Q8_0)), raw_dtype=Q8_0)
    writer.add_tensor("b", np.ones(6, np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes(), min(entry.start for entry in read_gguf_header(path).entries.values())


def check(path, content):
    """Read all that the file claims to hold: a FluxError, or tensors that lie inside it."""
    path.write_bytes(content)
    try:
        file = GGUFFile(path)
    except FluxError as error:
        assert str(path) in str(error)
        return None
    for name, entry in file.header.entries.items():
        assert 24 <= entry.start <= entry.end <= len(content)
        if entry.dtype in DTYPE_BITS or entry.dtype in FORMATS:
            read = file.read(name)
            assert read.nbytes == entry.nbytes
        else:
            with pytest.raises(FluxError, match="is not read"):
                file.read(name)
    return file


def test_cut_anywhere(tmp_path, sound):
    content, data_start = sound
    end = max(entry.end for entry in check(tmp_path / "x.gguf", content).header.entries.values())
    for length in range(end):
        assert check(tmp_path / "x.gguf", content[:length]) is None, length
    assert check(tmp_path / "x.gguf", content[:end]) is not None and data_start < end


def test_any_byte_of_the_header_changed(tmp_path, sound):
    content, data_start = sound
    for place in range(data_start):
        for value in (0xFF, content[place] ^ 1):
            check(tmp_path / "x.gguf", content[:place] + bytes([value]) + content[place + 1 :])


NUMBERS = st.one_of(st.integers(0, 40), st.integers(0, 2**64 - 1), st.sampled_from([2**32, 2**60, 2**63, 255, 256]))
FUZZ = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(version=st.sampled_from([2, 3]), rest=st.binary(max_size=200))
def test_random_bytes(tmp_path, version, rest):
    check(tmp_path / "x.gguf", b"GGUF" + struct.pack("<I", version) + rest)


@FUZZ
@given(changes=st.lists(st.tuples(NUMBERS, st.integers(0, 8), st.binary(max_size=9)), min_size=1, max_size=5))
def test_mutated_files(tmp_path, sound, changes):
    content = bytearray(sound[0])
    for place, cut, put in changes:
        place %= sound[1]
        content[place : place + cut] = put
    check(tmp_path / "x.gguf", bytes(content))


@FUZZ
@given(data=st.data())
def test_headers_with_random_numbers(tmp_path, forge, data):
    names = st.sampled_from(["a", "b", "general.alignment", "comfy.gguf.orig_shape.a"])
    draw = data.draw
    tensors = [
        forge.info(draw(names), draw(st.lists(NUMBERS, max_size=5)), draw(st.integers(0, 45)), draw(NUMBERS))
        for _ in range(draw(st.integers(0, 3)))
    ]
    entries = [
        forge.entry(draw(names), draw(st.integers(0, 14)), draw(st.binary(max_size=24)) + u64(draw(NUMBERS)))
        for _ in range(draw(st.integers(0, 2)))
    ]
    check(tmp_path / "x.gguf", forge.content(tensors, entries, draw(st.binary(max_size=100))))
