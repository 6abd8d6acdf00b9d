"""GGUF files put together by hand, byte by byte, so that any part of them may lie."""

import struct
from types import SimpleNamespace

import pytest


def text(value):
    raw = value if isinstance(value, bytes) else value.encode()
    return struct.pack("<Q", len(raw)) + raw


def entry(key, kind, value):
    """A metadata entry: its value is bytes of the type `kind`."""
    return text(key) + struct.pack("<I", kind) + value


def info(name="a", dims=(8,), kind=0, offset=0):
    """What the header says of a tensor; the type 0 is F32."""
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def content(tensors=(), entries=(), data=b"", *, counts=None, version=3, alignment=32):
    """A whole file, its data aligned."""
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(entries))))
    head += b"".join(entries) + b"".join(tensors)
    return head + bytes(-len(head) % alignment) + data


@pytest.fixture(scope="session")
def forge():
    """The parts of a file: `text`, `entry`, `info`, and `content` of all."""
    return SimpleNamespace(text=text, entry=entry, info=info, content=content)


@pytest.fixture
def raw(tmp_path):
    """`raw(tensors, entries, data)`: the path of such a file."""

    def write(*args, **options):
        (tmp_path / "x.gguf").write_bytes(content(*args, **options))
        return tmp_path / "x.gguf"

    return write
