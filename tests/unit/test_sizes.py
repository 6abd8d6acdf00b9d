"""What size Kontext draws at, and that it says why. (That the numbers are diffusers' own: parity/test_mask_crop.py.)"""

from __future__ import annotations

import pytest

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.sizes import PREFERRED, kontext_size, preferred_size, reference_size


def test_the_seventeen_sizes():
    assert len(set(PREFERRED)) == 17
    assert all((height, width) in PREFERRED for width, height in PREFERRED)
    assert all(width % 16 == height % 16 == 0 for width, height in PREFERRED)
    assert all(preferred_size(*size) == size for size in PREFERRED)


def test_a_tie_goes_to_the_narrower():
    # Exactly between 1024:1024 and 944:1104 in the ratio's own numbers: 2048 / 2208 and 1888 / 2208.
    low, middle, high = 944 / 1104, (944 / 1104 + 1) / 2, 1.0
    assert middle - low == high - middle
    assert preferred_size(1968, 2208) == (944, 1104)


@pytest.mark.parametrize(
    ("arguments", "size", "told"),
    [
        (dict(mode="exact", width=832, height=1216), (832, 1216), "asked for"),
        (dict(mode="exact", width=850, height=1000, source=(9, 9)), (848, 992), "850x1000, floored to multiples of 16"),
        (dict(mode="source", source=(2000, 1500)), (2000, 1488), "the source's size 2000x1500"),
        (dict(mode="source", source=(2000, 1500), max_area=1024**2), (1168, 880), "reduced to 1.05 MP"),
        (dict(mode="source", source=(640, 480), max_area=1024**2), (640, 480), "the source's size"),
        (dict(mode="preferred", source=(1920, 1080), width=64, height=64), (1392, 752), "the source's 1920x1080"),
        (dict(mode="preferred", width=1080, height=1920), (752, 1392), "the asked 1080x1920"),
        (dict(mode="area", width=832, height=1216, source=(64, 64)), (832, 1232), "832x1216"),
        (dict(mode="area", source=(1920, 1080)), (1360, 768), "1.05 MP"),
        (dict(mode="area", source=(100, 100), max_area=512**2), (512, 512), "0.26 MP"),
    ],
)
def test_the_choice_is_told(arguments, size, told):
    chosen = kontext_size(**arguments)
    assert (chosen.width, chosen.height) == size
    assert chosen.why.startswith(f"drawing {size[0]}x{size[1]}: ") and told in chosen.why


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(mode="exact", source=(64, 64)), "'exact' needs a width and a height"),
        (dict(mode="exact", width=64), "needs"),
        (dict(mode="source", width=64, height=64), "'source' needs a picture"),
        (dict(mode="preferred"), "'preferred' needs"),
        (dict(mode="area", source=(0, 64)), "'area' needs"),
        (dict(mode="exact", width=8, height=64), "cannot be drawn"),
        (dict(mode="area", source=(100000, 1)), "cannot be drawn"),
        (dict(mode="best", source=(64, 64)), "exact, source, preferred, area"),
    ],
)
def test_refusals_name_the_remedy(arguments, message):
    with pytest.raises(FluxError, match=message):
        kontext_size(**arguments)


def test_a_reference_is_seen_at_its_own_or_a_trained_size():
    assert reference_size("source", 100, 70) == (96, 64)
    assert reference_size("source", 7, 40) == (16, 32)
    assert reference_size("preferred", 1535, 1030) == (1248, 832)
    with pytest.raises(FluxError, match="'larger' is unknown; use source or preferred"):
        reference_size("larger", 100, 70)
