"""The judge: right about real renders, not fooled by other pictures, and able to say why."""

import random
from dataclasses import replace
from itertools import pairwise

import pytest
from PIL import Image

from fluxcanvas.demo import judge
from fluxcanvas.demo.captions import caption
from fluxcanvas.demo.drawing import render
from fluxcanvas.demo.evaluation import GROUPS, by_group, figures, groups, held_out
from fluxcanvas.demo.scenes import sample_scene

SEED = "renders that neither training nor the published figures use"


@pytest.fixture(scope="module")
def renders():
    return held_out(100, SEED)


def grades_of(images, captions):
    return [judge.grade(seen, told.facts) for seen, told in zip(judge.look(images), captions, strict=True)]


def test_real_renders_are_judged_right(renders):
    images, captions = zip(*renders, strict=True)
    found = figures(grades_of(images, captions))
    assert found.all >= 93
    assert all(share >= 93 for share in found.shares.values()), found.line()


def test_renders_at_256_pixels_are_judged_as_well():
    rng = random.Random(SEED)
    scenes = [sample_scene(rng) for _ in range(30)]
    captions = [caption(scene, rng) for scene in scenes]
    assert figures(grades_of([render(scene, 256) for scene in scenes], captions)).all >= 86


def test_pictures_of_other_captions_are_judged_wrong(renders):
    images, captions = zip(*renders, strict=True)
    found = figures(grades_of(images, captions[1:] + captions[:1]))
    assert found.all <= 3
    assert found.shares["background"] < 30 and found.shares["color"] < 20


def test_a_thing_painted_over_is_missed(renders):
    rng, missed, count = random.Random(1), 0, 40
    for _ in range(count):
        scene = sample_scene(rng)
        gone = rng.choice(scene.things)
        bare = replace(scene, things=tuple(thing for thing in scene.things if thing is not gone))
        grade = judge.grade(judge.look([render(bare)])[0], caption(scene, rng).facts)
        missed += any(reason == f"there: no well-formed {gone.kind}" for reason in grade.reasons)
    assert missed >= 0.9 * count


def test_follows_judges_a_picture_by_its_prompt_alone(renders):
    right = [judge.follows(image, told.text).ok for image, told in renders[:40]]
    wrong = [judge.follows(image, told.text) for (image, _), (_, told) in pairwise(renders[:40])]
    assert sum(right) >= 36
    assert sum(verdict.ok for verdict in wrong) <= 1
    assert all(verdict.reasons for verdict in wrong if not verdict.ok)


def test_reasons_name_what_is_wrong():
    verdict = judge.follows(Image.new("RGB", (256, 256), (20, 30, 80)), "a red house on the left in the snow")
    assert not verdict.ok
    assert {reason.split(":")[0] for reason in verdict.reasons} >= {"background", "there", "color", "place"}


def test_a_thing_drawn_twice_is_told():
    rng, told = random.Random(5), 0
    for _ in range(40):
        scene = sample_scene(rng)
        while len(scene.things) < 2:
            scene = sample_scene(rng)
        first, second = scene.things[:2]
        twice = replace(scene, things=(first, replace(second, kind=first.kind, color=first.color)))
        told += judge.look([render(twice)])[0].things.get(first.kind, judge.SeenThing("", 0, 0, 0, False)).doubled
    assert told >= 30


@pytest.mark.parametrize("group", GROUPS)
def test_captions_of_one_sort_are_those_among_all(renders, group):
    among = [told for _, told in renders if group in groups(told)]
    some = held_out(3, SEED, group=group)
    assert [told for _, told in some] == among[:3] and 3 <= len(among) < 100
    grades = grades_of(*zip(*some, strict=True))
    assert by_group(grades, among[:3])[group] == pytest.approx(figures(grades).all, abs=0.1)
