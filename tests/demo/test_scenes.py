"""The renderer: the same scene is the same picture, at any size."""

import random

import numpy as np
import pytest

from fluxcanvas.demo.drawing import render
from fluxcanvas.demo.scenes import BACKGROUNDS, KINDS, TRAINING, USUAL, sample_scene


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
