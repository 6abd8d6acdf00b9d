"""The words of captions, each with its weight, in one place for the writer (`captions`) and the reader (`reading`)."""

import random
from collections.abc import Mapping

Words = Mapping[str, float]
MAIN = 2.0

NOUNS: dict[str, Words] = {
    "house": {"house": 6, "cottage": 2, "home": 2, "hut": 1, "cabin": 1, "building": 0.5},
    "tree": {"tree": 8, "oak": 0.5},
    "car": {"car": 8, "automobile": 0.5, "vehicle": 0.5},
    "flower": {"flower": 8, "blossom": 1, "bloom": 0.7, "daisy": 0.7},
    "boat": {"boat": 5, "sailing boat": 2, "ship": 2, "sailboat": 1, "yacht": 0.5},
    "fish": {"fish": 1},
    "sun": {"sun": 1},
    "moon": {"moon": 5, "crescent moon": 2, "half moon": 0.7},
    "star": {"star": 1},
    "cloud": {"cloud": 1},
    "balloon": {"balloon": 5, "hot air balloon": 5, "air balloon": 1},
    "heart": {"heart": 8, "love heart": 0.7},
}
COLORS: dict[str, Words] = {
    "red": {"red": 9, "crimson": 0.4, "scarlet": 0.4},
    "orange": {"orange": 1},
    "yellow": {"yellow": 9, "golden": 0.7},
    "green": {"green": 1},
    "blue": {"blue": 1},
    "purple": {"purple": 8, "violet": 1, "lilac": 0.4},
    "pink": {"pink": 8, "rosy": 0.4},
    "white": {"white": 1},
    "brown": {"brown": 1},
}
SIZES: dict[str, Words] = {
    "small": {"small": 5, "little": 3, "tiny": 2},
    "large": {"large": 4, "big": 4, "huge": 2, "giant": 0.7, "great": 0.4},
}
PLACES: dict[str, Words] = {
    "left": {"on the left": 5, "at the left": 2, "on the left side": 2, "on the left hand side": 0.7},
    "right": {"on the right": 5, "at the right": 2, "on the right side": 2, "on the right hand side": 0.7},
    "middle": {"in the middle": 5, "in the center": 2, "in the centre": 1, "at the center": 0.5},
}
SKY_ROW: Words = {"in the sky": 4, "at the top": 4, "high up": 1, "up in the sky": 1}
GROUND_ROW: Words = {"on the ground": 4, "at the bottom": 4, "down on the ground": 1}
PAPER_ROWS: dict[str, Words] = {"top": {"at the top": 5, "high up": 1}, "bottom": {"at the bottom": 5, "down below": 1}}
CORNERS: dict[str, Words] = {
    "top": {"in the top {} corner": 4, "at the top {}": 4, "in the upper {} corner": 1},
    "bottom": {"in the bottom {} corner": 4, "at the bottom {}": 4, "in the lower {} corner": 1},
}
RELATIONS: dict[str, Words] = {
    "beside": {"next to": 5, "beside": 4, "near": 3, "close to": 1, "alongside": 0.5},
    "left": {"to the left of": 4, "left of": 4, "on the left of": 1},
    "right": {"to the right of": 4, "right of": 4, "on the right of": 1},
    "above": {"above": 6, "over": 4, "high above": 1},
    "below": {"under": 5, "below": 5, "beneath": 1, "underneath": 0.7},
}
ITS_SIDE: dict[str, Words] = {
    "left": {"to its left": 2, "on its left": 1},
    "right": {"to its right": 2, "on its right": 1},
}
BACKGROUNDS: dict[str, Words] = {
    "meadow": {
        "on a meadow": 2,
        "on a green meadow": 2,
        "in a green field": 2,
        "on the grass": 2,
        "on a sunny day": 2,
        "in summer": 2,
        "by day": 2,
        "in a meadow": 1,
        "on green grass": 0.5,
        "in the grass": 0.5,
        "in a field": 0.5,
        "in spring": 0.5,
        "in the daytime": 0.5,
        "in the countryside": 0.5,
        "on a summer day": 0.5,
    },
    "night": {
        "at night": 5,
        "in the night": 2,
        "under a starry sky": 2,
        "in a dark night": 2,
        "by night": 1,
        "on a dark night": 0.7,
        "at midnight": 0.5,
        "on a starry night": 0.7,
        "under the stars": 0.5,
    },
    "sunset": {
        "at sunset": 5,
        "in the evening": 2,
        "in the evening light": 2,
        "at dusk": 2,
        "at sundown": 0.7,
        "during sunset": 0.7,
        "under an evening sky": 0.5,
        "in the sunset": 0.5,
    },
    "sea": {
        "at sea": 2,
        "by the sea": 2,
        "on the sea": 2,
        "in the sea": 2,
        "on the water": 2,
        "on the ocean": 2,
        "in the ocean": 1,
        "by the ocean": 0.5,
        "on the waves": 0.5,
        "in the water": 0.7,
        "out at sea": 0.5,
        "on the blue sea": 0.5,
    },
    "snow": {
        "in the snow": 5,
        "on a snowy day": 2,
        "in winter": 2,
        "on snow": 2,
        "on the snow": 0.7,
        "in a snowy field": 0.5,
        "in the winter": 0.7,
        "in a winter landscape": 0.5,
        "in snowy weather": 0.3,
    },
}
PAPERS: Words = {
    "on {a} {} background": 4,
    "on a plain {} background": 4,
    "on {}": 3,
    "against {a} {} background": 0.7,
    "on {} paper": 0.7,
    "with {a} {} background": 0.7,
}
OPENINGS: Words = {
    "a picture of ": 3,
    "a drawing of ": 3,
    "an illustration of ": 2,
    "a storybook picture of ": 2,
    "storybook scene with ": 2,
    "a painting of ": 2,
    "there is ": 2,
    "draw ": 2,
    "an image of ": 1,
    "please draw ": 0.5,
    "show me ": 0.5,
    "a cartoon of ": 0.7,
    "i see ": 0.5,
    "a childrens drawing of ": 0.5,
    "paint me ": 0.4,
    "we see ": 0.4,
}
COUNTED = {2: "two things: ", 3: "three things: "}
PRAISE: Words = {"cute": 3, "lovely": 3, "pretty": 3, "nice": 3, "beautiful": 1, "old": 1, "bright": 1, "happy": 0.5}
VERBS: Words = {"is": 2, "stands": 1, "can be seen": 0.5, "sits": 0.5}
AFTERWARDS: Words = {"that is {}": 2, "in {}": 1, "painted {}": 0.5}

# Words that only people use; the reader knows them too.
ALSO_BACKGROUNDS: dict[str, tuple[str, ...]] = {
    "meadow": (
        "meadow",
        "grass",
        "field",
        "sunny",
        "summer",
        "lawn",
        "garden",
        "daylight",
        "spring",
        "countryside",
        "hills",
    ),
    "night": ("night", "midnight", "starry", "night time"),
    "sunset": ("sunset", "dusk", "evening", "sundown", "twilight"),
    "sea": ("sea", "ocean", "water", "waves", "lake", "beach", "seaside"),
    "snow": ("snow", "winter", "snowy", "wintry", "in white snow", "snowfield"),
}
ALSO_PLACES = {
    "left": ("to the left", "left", "far left"),
    "right": ("to the right", "right", "far right"),
    "middle": ("middle", "center", "centre", "centered"),
}
ALSO_ROWS = {"top": ("in the air", "up high", "above everything", "on top"), "bottom": ("bottom", "down below")}


def pick(words: Words, rng: random.Random, main: bool = False) -> str:
    """One of the words, by weight; `main` leaves out those of a weight below 2, unless all are."""
    usual = {word: weight for word, weight in words.items() if weight >= MAIN} if main else {}
    words = usual or words
    return rng.choices(tuple(words), tuple(words.values()))[0]


def with_article(noun_phrase: str) -> str:
    """The phrase behind "a" or "an"."""
    return ("an " if noun_phrase[0] in "aeiou" else "a ") + noun_phrase


def on_paper(pattern: str, color: str) -> str:
    """A pattern of PAPERS with the colour put in, and its article where the pattern asks for one."""
    return pattern.replace("{a} {}", with_article(color)).replace("{}", color)
