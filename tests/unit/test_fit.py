"""Pictures brought to a size: what is cut, what is added, and that nothing is resampled without need."""

from __future__ import annotations

import pytest
import torch

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.fit import fit


def picture(width: int, height: int) -> torch.Tensor:
    return torch.rand(2, height, width, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
def test_a_fitting_picture_is_returned_as_it_is(mode):
    given = picture(48, 32)
    assert fit(given, mode=mode) is given
    assert fit(given, 48, 32, mode) is given


def test_crop_cuts_evenly_and_keeps_the_pixels():
    given = picture(53, 36)  # 5 columns and 4 rows too many
    assert torch.equal(fit(given), given[:, 2:34, 2:50])


def test_pad_repeats_the_edges_and_keeps_the_pixels():
    given = picture(45, 30)  # 3 columns and 2 rows too few
    padded = fit(given, mode="pad")
    assert padded.shape == (2, 32, 48, 3) and torch.equal(padded[:, 1:31, 1:46], given)
    assert torch.equal(padded[:, 0, 1:46], given[:, 0]) and torch.equal(padded[:, 1:31, 47], given[:, :, 44])


@pytest.mark.parametrize(
    ("mode", "asked", "size"),
    [
        ("crop", (64, 64), (64, 64)),
        ("pad", (64, 64), (64, 64)),
        ("stretch", (64, 64), (64, 64)),
        ("crop", (70, 40), (64, 32)),  # asked sizes are floored
        ("crop", (100, 0), (96, 48)),  # the other side follows: 50, cut to 48
        ("pad", (96, 0), (96, 48)),
        ("pad", (0, 72), (144, 64)),
        ("stretch", (0, 32), (64, 32)),
    ],
)
def test_sizes_follow_what_was_asked(mode, asked, size):
    fitted = fit(picture(200, 100), *asked, mode)
    assert (fitted.shape[2], fitted.shape[1]) == size
    assert fitted.min() >= 0 and fitted.max() <= 1


def test_the_middle_stays_in_the_middle():
    given = torch.zeros(1, 100, 200, 3)
    given[:, 40:60, 90:110] = 1
    for mode in ("crop", "pad", "stretch"):
        light = fit(given, 64, 64, mode)[0, ..., 0]
        rows, columns = light.sum(1), light.sum(0)
        middle = torch.arange(64).float()
        assert abs((rows @ middle / rows.sum()).item() - 31.5) < 0.6
        assert abs((columns @ middle / columns.sum()).item() - 31.5) < 0.6


def test_crop_and_pad_keep_the_shape_of_things_and_stretch_does_not():
    given = torch.zeros(1, 100, 200, 3)
    given[:, 30:70, 80:120] = 1
    extent = {}
    for mode in ("crop", "pad", "stretch"):
        light = fit(given, 64, 64, mode)[0, ..., 0] > 0.5
        extent[mode] = light.any(0).sum().item() / light.any(1).sum().item()
    assert extent["crop"] == pytest.approx(1, abs=0.1) and extent["pad"] == pytest.approx(1, abs=0.1)
    assert extent["stretch"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize("mode", ["crop", "pad", "stretch"])
def test_a_tiny_picture_becomes_one_patch(mode):
    assert fit(picture(5, 3), mode=mode).shape == (2, 16, 16, 3)


def test_an_unknown_mode_is_refused():
    with pytest.raises(FluxError, match="fit mode 'squash' is unknown; use crop, pad, stretch"):
        fit(picture(16, 16), mode="squash")
