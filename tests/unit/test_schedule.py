import math

import pytest
import torch

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.schedule import Schedule, cut

DEV, SCHNELL = Schedule(), Schedule(dynamic=False, shift=1.0)


@pytest.mark.parametrize(("tokens", "mu"), [(1024, 0.63), (4080, 1.1472917), (4096, 1.15), (16384, 3.23)])
def test_mu_is_linear_in_the_tokens_and_not_clamped(tokens, mu):
    assert DEV.mu(tokens) == pytest.approx(mu, abs=1e-6)


def test_a_line_through_one_point_is_refused_where_it_is_used():
    with pytest.raises(FluxError, match=r"base_image_seq_len and max_image_seq_len are both 1024.*scheduler_config"):
        Schedule(base_tokens=1024, max_tokens=1024)
    assert Schedule(dynamic=False, base_tokens=1024, max_tokens=1024).sigmas(1, 64).tolist() == [1.0, 0.0]


def test_dev_at_a_megapixel():
    sigmas = DEV.sigmas(4, 4096)
    assert sigmas.dtype == torch.float32
    assert sigmas.tolist() == pytest.approx([1.0, 0.9045307636, 0.7595109344, 0.5128441453, 0.0], abs=1e-7)


def test_schnell_is_even():
    assert SCHNELL.sigmas(4, 4096).tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]


def test_a_static_shift():
    sigmas = Schedule(dynamic=False, shift=3.0).sigmas(2, 64)
    assert sigmas.tolist() == pytest.approx([1.0, 3 * 0.5 / (1 + 2 * 0.5), 0.0])


def test_own_sigmas_replace_the_even_ones_and_are_shifted():
    own = DEV.sigmas(99, 4096, [1.0, 0.5])
    assert own.tolist() == pytest.approx([1.0, math.exp(1.15) / (math.exp(1.15) + 1), 0.0], abs=1e-6)


@pytest.mark.parametrize("bad", [[], [0.5, 0.6], [1.0, 0.0], [1.5, 0.5], [float("nan")], [[1.0, 0.5]]])
def test_bad_sigmas_are_refused(bad):
    with pytest.raises(FluxError, match="sigmas must"):
        DEV.sigmas(4, 64, bad)


def test_no_steps_are_refused():
    with pytest.raises(FluxError, match="at least 1"):
        DEV.sigmas(0, 64)


def test_a_cut_schedule_meets_its_other_part():
    sigmas = DEV.sigmas(10, 4096)
    first, second = cut(sigmas, 0.0, 0.4), cut(sigmas, 0.4, 1.0)
    assert torch.equal(torch.cat([first, second[1:]]), sigmas)
    assert len(second) == 7


@pytest.mark.parametrize(("start", "end"), [(0.5, 0.5), (0.6, 0.5), (-0.1, 1.0), (0.0, 1.1)])
def test_a_senseless_range_is_refused(start, end):
    with pytest.raises(FluxError, match="denoise range"):
        cut(SCHNELL.sigmas(4, 64), start, end)


def test_a_range_without_a_step_says_so():
    with pytest.raises(FluxError, match="no step of 4"):
        cut(SCHNELL.sigmas(4, 64), 0.97, 1.0)
