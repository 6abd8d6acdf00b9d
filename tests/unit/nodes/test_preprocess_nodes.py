"""Control images, and the check that lets nothing pass unless it was checked."""

from __future__ import annotations

import json
import math

import pytest
import torch

from fluxcanvas.flux_runtime.errors import FluxError
from fluxcanvas.flux_runtime.integrity import NSFW, PIXTRAL, IntegrityChecker, Verdict
from fluxcanvas.flux_runtime.preprocess import depth
from fluxcanvas.nodes import NODE_CLASS_MAPPINGS, preprocess


def test_canny_draws_edges(run, picture):
    pytest.importorskip("cv2")
    image = torch.zeros(1, 40, 40, 3)
    image[:, 10:30, 10:30] = 1
    (edges,) = run("CannyMap", image=image)
    assert edges.shape == image.shape and edges[0, 20, 8:12].max() == 1 and edges[0, 20, 20].max() == 0


@pytest.mark.parametrize("low, high, fine", [(50, 200, True), (None, 3, True), (7, 7, True), (9, 8, False)])
def test_cannys_thresholds_are_judged_before_the_run(low, high, fine):
    verdict = NODE_CLASS_MAPPINGS["FluxCanvas_CannyMap"].VALIDATE_INPUTS(low=low, high=high)
    assert verdict is True if fine else "low (9) must not be above high (8)" in verdict
    assert "must be from 0" in NODE_CLASS_MAPPINGS["FluxCanvas_CannyMap"].VALIDATE_INPUTS(low=math.nan, high=1)


@pytest.fixture
def depth_model(tmp_path, save_depth_model):
    """A tiny depth model in the models folder."""
    folder = tmp_path / "models" / "depth" / "tiny"
    torch.manual_seed(0)
    save_depth_model(folder)
    preprocess._estimator.cache_clear()
    yield folder
    preprocess._estimator.cache_clear()


def test_depth_comes_from_a_model_of_the_folder_which_stays_loaded(run, picture, depth_model, monkeypatch):
    offered = NODE_CLASS_MAPPINGS["FluxCanvas_DepthMap"].INPUT_TYPES()["required"]["model"][0]
    assert offered == ["tiny", *preprocess.DEPTH_MODELS] and preprocess.DEPTH_MODELS[0] == depth.DEFAULT
    image = picture(42, 56, 2)
    (near,) = run("DepthMap", image=image, model="tiny")
    assert near.shape == image.shape and near.min() == 0 and near.max() == 1
    monkeypatch.setattr(depth.DepthEstimator, "load", lambda *_: pytest.fail("loaded again"))
    (far,) = run("DepthMap", image=image, model="tiny", invert=True)
    assert torch.allclose(far, 1 - near)


def test_a_depth_model_that_is_not_there_names_the_folders(run, picture):
    with pytest.raises(FluxError, match=r"'gone' is not in .*depth.*put it there"):
        run("DepthMap", image=picture(28, 28), model="gone")


class Judge(IntegrityChecker):
    """A checker with its verdict made up; all around it is the real one's."""

    def __init__(self, verdict):
        object.__setattr__(self, "verdict", verdict)

    def _judge(self, picture):
        if isinstance(self.verdict, Exception):
            raise self.verdict
        return self.verdict


@pytest.fixture
def judge(monkeypatch):
    """`judge(verdict)`: the next check comes to this verdict, or raises it."""

    def use(verdict):
        monkeypatch.setattr(IntegrityChecker, "load", lambda *sources, **options: Judge(verdict))

    return use


def test_the_integrity_models_are_the_published_ones():
    assert (PIXTRAL,) == preprocess.JUDGES and (NSFW,) == preprocess.CLASSIFIERS


def test_a_clean_picture_passes_unchanged(run, picture, judge):
    judge(Verdict(False, 0.1, "is fine"))
    image = picture(20, 30, 2)
    assert torch.equal(run("IntegrityCheck", image=image)[0], image)


@pytest.mark.parametrize(
    ("verdict", "said"),
    [
        (Verdict(True, 0.9, "shows a brand"), "the integrity check refuses this: picture 1 of 2 shows a brand"),
        (RuntimeError("out of memory"), "so no picture is passed on: out of memory"),
        (KeyError("yes"), "so no picture is passed on"),
    ],
)
def test_a_flagged_or_unchecked_picture_does_not_pass(run, picture, judge, verdict, said):
    judge(verdict)
    with pytest.raises(FluxError, match=said):
        run("IntegrityCheck", image=picture(20, 30, 2))


def test_a_picture_that_is_none_does_not_pass(run, judge):
    judge(Verdict(False, 0.0, "is fine"))
    with pytest.raises(FluxError):
        run("IntegrityCheck", image=torch.full((1, 8, 8, 3), math.nan))


def test_models_that_are_none_let_nothing_pass(run, picture, tmp_path):
    folder = tmp_path / "models" / "integrity" / "broken"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "llava"}))
    with pytest.raises(FluxError, match=r"integrity check|Pixtral"):
        run("IntegrityCheck", image=picture(16, 16), model="broken", classifier="broken")


def test_an_interruption_before_the_check_passes_nothing(run, host, picture, judge):
    judge(Verdict(False, 0.0, "is fine"))
    host.stop_at = 1
    with pytest.raises(host.Stopped):
        run("IntegrityCheck", image=picture(16, 16))
