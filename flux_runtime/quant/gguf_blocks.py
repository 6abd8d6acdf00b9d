"""The block formats of GGUF files: how many numbers a block holds in how many bytes, and what numbers they are.

Each function takes blocks (n, bytes) as uint8 and writes their numbers into `out` (n, numbers), which may be of any
floating type. The arithmetic is that of ggml's reference, in float32, so float32 results equal it bit for bit.
A type called `_K` has blocks of 256 numbers: groups of 16 or 32 with small integer scales of their own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

IQ4_LEVELS = (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0)


@dataclass(frozen=True)
class Format:
    """A block type: `numbers` weights in `size` bytes, and the function that writes them out.

    Where the type has `levels`, its fields are indices into them, and `unpack` takes them as a third tensor.
    """

    numbers: int
    size: int
    unpack: Callable[..., None]
    levels: tuple[float, ...] | None = None


def _half(blocks: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block, as float32 (n, 1)."""
    return blocks[:, at : at + 2].view(torch.float16).float()


def _fields(blocks: Tensor, at: int, count: int, bits: int, width: int = 32) -> Tensor:
    """Some bytes of each block, cut into fields of 4, 2 or 1 bits: (n, count // width, 8 // bits, width) as uint8.

    Of each `width` bytes the lowest fields come first, then the next. Eight bytes are worked on at a time.
    """
    words = blocks[:, at : at + count].clone(memory_format=torch.contiguous_format).view(torch.int64)
    words = words.view(len(blocks), -1, width // 8)
    mask = ((1 << bits) - 1) * 0x0101010101010101
    return torch.stack([(words >> shift) & mask for shift in range(0, 8, bits)], 2).view(torch.uint8)


def _signed(q: Tensor, zero: int) -> Tensor:
    """Unsigned fields less `zero`, as int8."""
    return q.view(torch.int8) - zero


_BIT_OF_EACH = 0x8040201008040201 - (1 << 64)  # bit i of byte i, as a signed word


# Blocks of 32: scale (and minimum), the fifth bits, then 16 bytes of which the low halves are the first 16 numbers.


def _nibbles(blocks: Tensor, at: int) -> Tensor:
    return _fields(blocks, at, 16, 4, 16).view(-1, 32)


def _fifth_bits(blocks: Tensor, at: int) -> Tensor:
    """Four bytes with a bit for each of 32 numbers: (n, 32) of 0 or 16.

    A byte is repeated eight times in a word, its i-th copy reduced to bit i; adding what lacks to 128 carries a set
    bit to the top of its own byte and a clear one nowhere.
    """
    copies = blocks[:, at : at + 4].long() * 0x0101010101010101
    tops = (copies & _BIT_OF_EACH) + 0x00406070787C7E7F
    return ((tops >> 3) & 0x1010101010101010).view(torch.uint8)


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    torch.mul(_half(blocks, 0), blocks[:, 2:].view(torch.int8), out=out)


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    torch.mul(_half(blocks, 0), _signed(_nibbles(blocks, 2), 8), out=out)


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    torch.add(_half(blocks, 0) * _nibbles(blocks, 4), _half(blocks, 2), out=out)


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    torch.mul(_half(blocks, 0), _signed(_nibbles(blocks, 6) | _fifth_bits(blocks, 2), 16), out=out)


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    torch.add(_half(blocks, 0) * (_nibbles(blocks, 8) | _fifth_bits(blocks, 4)), _half(blocks, 2), out=out)


def _iq4_nl(blocks: Tensor, out: Tensor, levels: Tensor) -> None:
    torch.mul(_half(blocks, 0), _pick(levels, _nibbles(blocks, 2)), out=out)


def _pick(levels: Tensor, q: Tensor) -> Tensor:
    return levels.index_select(0, q.flatten().int()).view(q.shape)


# Blocks of 256: `q` (n, groups, width) and the scales of the groups (n, groups).


def _write(out: Tensor, q: Tensor, scale: Tensor, minimum: Tensor | None = None) -> None:
    out = out.view(q.shape)
    if minimum is None:
        torch.mul(scale.unsqueeze(-1), q, out=out)
    else:
        torch.sub(scale.unsqueeze(-1) * q, minimum.unsqueeze(-1), out=out)


def _q2_k(blocks: Tensor, out: Tensor) -> None:
    q = _fields(blocks, 16, 64, 2).view(-1, 16, 16)
    scales = blocks[:, :16]
    _write(out, q, _half(blocks, 80) * (scales & 15), _half(blocks, 82) * (scales >> 4))


def _q3_k(blocks: Tensor, out: Tensor) -> None:
    low = _fields(blocks, 32, 64, 2).view(-1, 16, 16)
    high = _fields(blocks, 0, 32, 1).view(-1, 16, 16)  # where this bit is clear, 4 is taken off
    a, b = blocks[:, 96:104], blocks[:, 104:108]
    low_scales = torch.cat([a & 15, a >> 4], 1)
    high_scales = torch.cat([(b >> shift) & 3 for shift in (0, 2, 4, 6)], 1)
    scales = _signed(low_scales | (high_scales << 4), 32)
    _write(out, _signed(low | (high << 2), 4), _half(blocks, 108) * scales)


def _six_bit_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and minima of the 8 groups of Q4_K and Q5_K (n, 8): six bits each, the last four of both spread out."""
    first, second, rest = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([first & 63, (rest & 15) | ((first >> 2) & 48)], 1)
    minima = torch.cat([second & 63, (rest >> 4) | ((second >> 2) & 48)], 1)
    return _half(blocks, 0) * scales, _half(blocks, 2) * minima


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    _write(out, _fields(blocks, 16, 128, 4).view(-1, 8, 32), *_six_bit_scales(blocks))


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    low = _fields(blocks, 48, 128, 4).view(-1, 8, 32)
    high = _fields(blocks, 16, 32, 1).view(-1, 8, 32)
    _write(out, low | (high << 4), *_six_bit_scales(blocks))


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    low = _fields(blocks, 0, 128, 4, 64).view(-1, 16, 16)
    high = _fields(blocks, 128, 64, 2).view(-1, 16, 16)
    scales = blocks[:, 192:208].view(torch.int8)
    _write(out, _signed(low | (high << 4), 32), _half(blocks, 208) * scales)


def _iq4_xs(blocks: Tensor, out: Tensor, levels: Tensor) -> None:
    low, high = blocks[:, 4:8], blocks[:, 2:4]
    low_scales = torch.stack([low & 15, low >> 4], 2).view(-1, 8)
    high_scales = torch.stack([(high >> shift) & 3 for shift in (0, 2, 4, 6)], 2).view(-1, 8)
    scales = _signed(low_scales | (high_scales << 4), 32)
    q = _fields(blocks, 8, 128, 4, 16).view(-1, 8, 32)
    _write(out, _pick(levels, q), _half(blocks, 0) * scales)


FORMATS = {
    "Q8_0": Format(32, 34, _q8_0), "Q4_0": Format(32, 18, _q4_0), "Q4_1": Format(32, 20, _q4_1),
    "Q5_0": Format(32, 22, _q5_0), "Q5_1": Format(32, 24, _q5_1), "Q2_K": Format(256, 84, _q2_k),
    "Q3_K": Format(256, 110, _q3_k), "Q4_K": Format(256, 144, _q4_k), "Q5_K": Format(256, 176, _q5_k),
    "Q6_K": Format(256, 210, _q6_k), "IQ4_NL": Format(32, 18, _iq4_nl, IQ4_LEVELS),
    "IQ4_XS": Format(256, 136, _iq4_xs, IQ4_LEVELS),
}  # fmt: skip
