"""Captions say what is true, and are read back into exactly what they say."""

import random

import pytest

from fluxcanvas.demo.captions import caption, facts_of
from fluxcanvas.demo.facts import Facts, Relation, ThingFacts
from fluxcanvas.demo.scenes import TRAINING, USUAL, sample_scene


def told(seed, count, mixture=USUAL, **options):
    rng = random.Random(seed)
    pairs = []
    for _ in range(count):
        scene = sample_scene(rng, mixture)
        pairs.append((scene, caption(scene, rng, **options)))
    return pairs


@pytest.mark.parametrize("mixture", [USUAL, TRAINING])
def test_every_caption_is_read_back_into_its_facts(mixture):
    for _, one in told("inverse", 3000, mixture):
        assert facts_of(one.text) == one.facts, one.text


def test_captions_are_true():
    for scene, one in told("true", 1500):
        things = {thing.kind: thing for thing in scene.things}
        facts = one.facts
        assert facts.background in (None, scene.background) and facts.paper in (None, scene.paper)
        assert {stated.kind for stated in facts.things} == set(things)
        for stated in facts.things:
            thing = things[stated.kind]
            assert stated.color in (None, thing.color)
            assert stated.size in (None, thing.size)
            assert stated.place in (None, thing.slot)
            assert stated.row in (None, thing.row)
        for relation in facts.relations:
            first, second = (things[facts.things[index].kind] for index in (relation.first, relation.second))
            holds = {
                "left": first.x < second.x,
                "right": first.x > second.x,
                "above": first.y < second.y,
                "below": first.y > second.y,
                "beside": first.x < second.x and first.row == second.row,
            }
            assert holds[relation.kind], one.text


def test_captions_come_in_many_wordings():
    texts = [one.text for _, one in told("wordings", 2000)]
    assert len(set(texts)) > 1900
    for phrase in ("cottage", "hot air balloon", "to its left", "in the top left corner", "There is", "three things:"):
        assert any(phrase.lower() in text.lower() for text in texts), phrase


def test_main_words_leave_out_synonyms():
    texts = " ".join(one.text for _, one in told("main", 800, main_words=True))
    assert "house" in texts and "yacht" not in texts and "lilac" not in texts


@pytest.mark.parametrize(
    "text, facts",
    [
        (
            "a red house next to a green tree under the moon at night",
            Facts(
                "night",
                None,
                (ThingFacts("house", "red"), ThingFacts("tree", "green"), ThingFacts("moon")),
                (Relation("beside", 0, 1), Relation("below", 1, 2)),
            ),
        ),
        ("A purple heart, please, on a yellow background!", Facts("plain", "yellow", (ThingFacts("heart", "purple"),))),
        (
            "On the left there is a tiny boat and on the right a big fish; the sea is calm",
            Facts("sea", None, (ThingFacts("boat", None, "small", "left"), ThingFacts("fish", None, "large", "right"))),
        ),
        (
            "snowy winter scene: a brown cabin, and a star in the upper left corner",
            Facts("snow", None, (ThingFacts("house", "brown"), ThingFacts("star", None, None, "left", "top"))),
        ),
        (
            "a hot-air balloon over a car that is blue",
            Facts(None, None, (ThingFacts("balloon"), ThingFacts("car", "blue")), (Relation("above", 0, 1),)),
        ),
        ("nothing that the judge knows", Facts()),
        ("", Facts()),
    ],
)
def test_people_are_understood(text, facts):
    assert facts_of(text) == facts
