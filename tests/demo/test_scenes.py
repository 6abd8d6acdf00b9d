"""The renderer: the same scene is the same picture, at any size."""

import random

import numpy as np
import pytest

from fluxcanvas.demo.drawing import render
from fluxcanvas.demo.scenes import BACKGROUNDS, KINDS, SKY_KINDS, TRAINING, USUAL, USUAL_COLOR, Mixture, sample_scene


def scenes(seed, count, mixture=USUAL):
    rng = random.Random(seed)
    return [sample_scene(rng, mixture) for _ in range(count)]


def test_the_same_seed_gives_the_same_scenes_and_pictures():
    first, again, other = scenes("one", 12), scenes("one", 12), scenes("two", 12)
    assert first == again != other
    for scene, twin in zip(first, again, strict=True):
        assert render(scene).tobytes() == render(twin).tobytes()
    assert render(first[0]).tobytes() != render(other[0]).tobytes()


@pytest.mark.parametrize("size", [64, 192, 256])
def test_a_scene_looks_the_same_at_every_size(size):
    for scene in scenes("sizes", 4):
        small, large = (np.asarray(render(scene, side).resize((32, 32)), np.float32) for side in (128, size))
        assert np.abs(small - large).mean() < 6


@pytest.mark.parametrize("mixture", [USUAL, TRAINING])
def test_scenes_hold_one_to_three_different_things_inside_the_picture(mixture):
    many = scenes("many", 400, mixture)
    assert {len(scene.things) for scene in many} == {1, 2, 3}
    assert {scene.background for scene in many} == set(BACKGROUNDS)
    assert {thing.kind for scene in many for thing in scene.things} == set(KINDS)
    for scene in many:
        assert len({thing.kind for thing in scene.things}) == len(scene.things)
        assert all(0 < thing.x < 1 and 0 < thing.y < 1 for thing in scene.things)
        assert all(thing.color != scene.paper for thing in scene.things)


def test_a_mixture_says_how_often_what_comes():
    """Each share beside that of the usual mixture; with a field at an end, it is none or all."""

    def share(mixture, holds):
        things = [(scene, thing) for scene in scenes("shares", 500, mixture) for thing in scene.things]
        return sum(holds(*each) for each in things) / len(things)

    def misplaced(scene, thing):
        return scene.background != "plain" and thing.row == ("bottom" if thing.kind in SKY_KINDS else "top")

    def unusual(scene, thing):
        return USUAL_COLOR.get(thing.kind, thing.color) != thing.color

    def among_its_like(scene, thing):
        return len({other.kind in SKY_KINDS for other in scene.things}) == 1

    def at_sea(scene, thing):
        return thing.kind in ("boat", "fish") and scene.background == "sea"

    cases = [
        (Mixture(backgrounds=(0, 0, 0, 0, 0, 1)), lambda scene, _: scene.background == "plain", 1),
        (Mixture(counts=(0, 0, 1)), lambda scene, _: len(scene.things) == 3, 1),
        (Mixture(sizes=(1, 0, 0)), lambda _, thing: thing.size == "small", 1),
        (Mixture(same_row=1), among_its_like, 1),
        (Mixture(factors=(("car", 0),)), lambda _, thing: thing.kind == "car", 0),
    ]
    for mixture, holds, all_or_none in cases:
        assert share(mixture, holds) == all_or_none != share(USUAL, holds)
    for mixture, holds, factor in (
        (Mixture(misplaced=0.2), misplaced, 1.8),
        (Mixture(usual_color=0.3), unusual, 1.5),
        (Mixture(factors=(("fish", 3),)), lambda _, thing: thing.kind == "fish", 1.8),
    ):
        assert share(mixture, holds) > factor * share(USUAL, holds) > 0
    assert share(Mixture(belonging=0), at_sea) < 0.7 * share(USUAL, at_sea)
