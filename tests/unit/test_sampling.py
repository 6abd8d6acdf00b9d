"""The loop with fakes: no weights are needed to test it."""

import math

import pytest
import torch

from fluxcanvas.flux_runtime.guidance import Cfg, Plain
from fluxcanvas.flux_runtime.inpaint import KeepOutside
from fluxcanvas.flux_runtime.sampling import Step, denoise
from fluxcanvas.flux_runtime.solvers import euler


def even(count: int) -> list[float]:
    return torch.linspace(1, 0, count + 1).tolist()


def read(x, sigma, step):
    return x, sigma


def error_of(count: int) -> float:
    """dx/dsigma = x has the closed form x(0) = x(1) / e."""
    x = denoise(lambda inputs: inputs[0], torch.ones(1, 1, 1), even(count), Plain(read), solver=euler)
    return abs(x.item() - math.exp(-1))


def test_euler_is_of_first_order():
    order = math.log2(error_of(64) / error_of(128))
    assert order == pytest.approx(1, abs=0.05)


def test_the_clean_estimate_is_exact_on_a_straight_path():
    clean, noise, seen = torch.full((1, 2, 4), 3.0), torch.randn(1, 2, 4), []
    final = denoise(
        lambda inputs: noise - clean,
        noise,
        even(5),
        Plain(read),
        solver=euler,
        watch=lambda step, x, c: seen.append((step, c)),
    )
    assert torch.allclose(final, clean, atol=1e-5)
    assert [step.index for step, _ in seen] == [0, 1, 2, 3, 4]
    assert all(torch.allclose(c, clean, atol=1e-5) for _, c in seen)


def test_a_watcher_can_stop_the_run_after_any_step():
    class Stop(Exception):
        pass

    calls = []

    def watch(step, x, clean):
        calls.append(step.index)
        if step.index == 1:
            raise Stop

    with pytest.raises(Stop):
        denoise(lambda inputs: inputs[0], torch.ones(1, 1, 1), even(9), Plain(read), solver=euler, watch=watch)
    assert calls == [0, 1]


def test_cfg_moves_away_from_the_negative():
    positive, negative = (lambda x, sigma, step: 3.0), (lambda x, sigma, step: 1.0)
    x = denoise(
        lambda value: torch.full((1, 1, 1), value),
        torch.zeros(1, 1, 1),
        [1.0, 0.0],
        Cfg(positive, negative, 4.0),
        solver=euler,
    )
    assert x.item() == -(1.0 + 4.0 * 2.0)


def test_outside_the_mask_the_source_comes_back():
    source, noise = torch.full((1, 2, 1), 7.0), torch.randn(1, 2, 1)
    mask = torch.tensor([1.0, 0.0]).reshape(1, 2, 1)
    kept = []
    x = denoise(
        lambda inputs: torch.ones(1, 2, 1),
        noise,
        even(4),
        Plain(read),
        solver=euler,
        constraints=[KeepOutside(source, noise, mask)],
        watch=lambda step, x, c: kept.append((step.sigma_next, x[0, 1, 0].item())),
    )
    assert x[0, 1, 0] == 7.0
    assert x[0, 0, 0] == pytest.approx(noise[0, 0, 0].item() - 1.0, abs=1e-5)
    for sigma, value in kept:
        assert value == pytest.approx(sigma * noise[0, 1, 0].item() + (1 - sigma) * 7.0, abs=1e-5)


def test_a_step_knows_the_part_of_the_run_it_lies_in():
    inside = [Step(i, 4, 1.0, 0.5).within(0.25, 0.75) for i in range(4)]
    assert inside == [False, True, True, False]
