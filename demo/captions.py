"""Captions for scenes: truthful, in many wordings and word orders, each with the facts that it states.

Words decide what a picture shows, so what they leave open has a rule: a place that is not said is the middle, and of
"A next to B" the first stands on the left.
"""

import random
from dataclasses import dataclass

from . import words
from .facts import Facts, Relation, ThingFacts
from .reading import facts_of
from .scenes import ROWS, SKY_KINDS, SLOTS, USUAL_COLOR, Scene, Thing
from .words import with_article

__all__ = ["Caption", "caption", "facts_of"]


@dataclass(frozen=True)
class Caption:
    """A text and what it states."""

    text: str
    facts: Facts


def caption(scene: Scene, rng: random.Random, main_words: bool = False) -> Caption:
    """A random caption that is true of the scene; `main_words` leaves out the rarer synonyms."""
    return _Teller(scene, rng, main_words).tell()


class _Teller:
    """Tells one scene once; notes what it has said of each thing, in the order of mention."""

    def __init__(self, scene: Scene, rng: random.Random, main_words: bool) -> None:
        self.scene, self.rng, self.main_words = scene, rng, main_words
        self.things = list(scene.things)
        rng.shuffle(self.things)
        self.said: list[dict[str, str]] = [{"kind": thing.kind} for thing in self.things]
        self.relations: list[Relation] = []

    def tell(self) -> Caption:
        body, opening_fits = self._body()
        said_background = self.scene.background == "plain" or self._chance(0.94)
        text = self._with_background(body) if said_background else body
        if opening_fits and self._chance(0.16):
            text = self._pick(words.OPENINGS) + text
        background = (self.scene.background, self.scene.paper) if said_background else (None, None)
        facts = Facts(*background, tuple(ThingFacts(**said) for said in self.said), tuple(self.relations))
        return Caption(self._in_a_hand(text), facts)

    def _chance(self, share: float) -> bool:
        return self.rng.random() < share

    def _pick(self, choice: words.Words) -> str:
        return words.pick(choice, self.rng, self.main_words)

    # ------------------------------------------------------------ sentences
    def _body(self) -> tuple[str, bool]:
        """The things in words, and whether an opening such as "a picture of" may come before them."""
        related = self._related() if len(self.things) > 1 and self._chance(0.62) else None
        if related:
            return related, True
        places = [self._where(index) for index in range(len(self.things))]
        if all(places) and self._chance(0.16):
            return self._place_first(places), False
        named = [self._named(index) + self._verb(place) + _after(place) for index, place in enumerate(places)]
        counted = words.COUNTED.get(len(named), "") if self._chance(0.05) else ""
        return counted + self._listed(named), not counted

    def _listed(self, named: list[str]) -> str:
        last = (
            self.rng.choice((" and ", " and ", " with ", ", ")) if len(named) == 2 else self.rng.choice((" and ", ", "))
        )
        return named[0] if len(named) == 1 else ", ".join(named[:-1]) + last + named[-1]

    def _place_first(self, places: list[str]) -> str:
        link = self.rng.choice((" ", " ", " there is ", " is "))
        return self._listed([place + link + self._named(index) for index, place in enumerate(places)])

    def _related(self) -> str | None:
        """Sentences that say how things stand to each other; None if nothing can be said of the first two."""
        if self._chance(0.1) and (text := self._at_its_side()):
            return text + self._rest()
        word = self._relation(0, 1)
        if word is None:
            return None
        apart = self.things[0].row != self.things[1].row
        if len(self.things) == 2:
            return f"{self._named(0)} {word} {self._named(1)}" + (self._column(1) if apart else "")
        first, second = (self._named(index) + (_after(self._where(index)) if apart else "") for index in (0, 1))
        return f"{first} {word} {second}" + self._rest()

    def _rest(self) -> str:
        """The third thing, behind two that have been related."""
        if len(self.things) < 3:
            return ""
        word = self._relation(1, 2) if self._chance(0.4) else None
        if word:
            word = f"to the {word}" if word in ("left of", "right of") else word  # not "at the bottom left of"
            place = self._where(2) if self.things[1].row != self.things[2].row else ""
            return f" {word} {self._named(2)}" + _after(place)
        return self.rng.choice((" and ", " with ", ", ")) + self._named(2) + _after(self._where(2))

    def _at_its_side(self) -> str | None:
        """ "a tree with a house to its left"."""
        first, second = self.things[:2]
        if first.row != second.row:
            return None
        side = "left" if _column(second) < _column(first) else "right"
        self.relations.append(Relation(side, 1, 0))
        return f"{self._named(0)} with {self._named(1)} {self._pick(words.ITS_SIDE[side])}"

    def _relation(self, first: int, second: int) -> str | None:
        """Words for how two things stand to each other, where that is plain to see."""
        one, other = self.things[first], self.things[second]
        if one.row == other.row:
            left = _column(one) < _column(other)
            kind = "beside" if left and self._chance(0.6) else "left" if left else "right"
        else:
            kind = self._upright(one, other)
        if kind is None:
            return None
        self.relations.append(Relation(kind, first, second))
        return self._pick(words.RELATIONS[kind])

    def _upright(self, one: Thing, other: Thing) -> str | None:
        """Above or below, if the two are stacked or the upper one belongs into the sky."""
        above = ROWS[one.row] < ROWS[other.row]
        upper = one if above else other
        if abs(one.x - other.x) < 0.06 or len(self.things) > 2 or upper.kind in SKY_KINDS:
            return "above" if above else "below"
        return None

    # ------------------------------------------------------------ things
    def _named(self, index: int) -> str:
        """The thing with what is said of it: size, colour, name."""
        thing, said = self.things[index], self.said[index]
        parts, afterwards = [], ""
        if thing.size and self._chance(0.85):
            parts.append(self._pick(words.SIZES[thing.size]))
            said["size"] = thing.size
        elif self._chance(0.06):
            parts.append(self._pick(words.PRAISE))
        usual = USUAL_COLOR.get(thing.kind) == thing.color or thing.kind == "moon"
        if self._chance(0.3 if usual else 0.93):
            said["color"], color = thing.color, self._pick(words.COLORS[thing.color])
            if self._chance(0.03):
                afterwards = " " + self._pick(words.AFTERWARDS).format(color)
            else:
                parts.append(color)
        noun = " ".join([*parts, self._pick(words.NOUNS[thing.kind])])
        known = thing.kind in ("sun", "moon") and self._chance(0.5)
        return (f"the {noun}" if known else with_article(noun)) + afterwards

    def _where(self, index: int) -> str:
        """Row (when it must be said, or by chance) and column; nothing said of the column means the middle."""
        thing, said = self.things[index], self.said[index]
        column = self._chance(0.25 if thing.slot == "middle" else 0.95)
        row = self._row(thing)
        if row is None:
            return self._column(index).strip() if column else ""
        said["row"] = thing.row
        if column and thing.slot != "middle" and self._chance(0.5):
            said["place"] = thing.slot
            return self._pick(words.CORNERS[thing.row]).format(thing.slot)
        said.update({"place": thing.slot} if column else {})
        return self._pick(row) + (f" {self._pick(words.PLACES[thing.slot])}" if column else "")

    def _row(self, thing: Thing) -> words.Words | None:
        """The words for the row of a thing, if it is to be said: always where it is unusual or the paper is plain."""
        if thing.row == "mid":
            return None
        plain = self.scene.background == "plain"
        unusual = (thing.row == "top") != (thing.kind in SKY_KINDS)
        if not (plain or unusual or (thing.row == "top" and self._chance(0.25))):
            return None
        if plain:
            return words.PAPER_ROWS[thing.row]
        return words.SKY_ROW if thing.row == "top" else words.GROUND_ROW

    def _column(self, index: int) -> str:
        thing = self.things[index]
        if self._chance(0.75 if thing.slot == "middle" else 0.05):
            return ""
        self.said[index]["place"] = thing.slot
        return " " + self._pick(words.PLACES[thing.slot])

    def _verb(self, place: str) -> str:
        return f" {self._pick(words.VERBS)}" if place and self._chance(0.05) else ""

    # ------------------------------------------------------------ the whole text
    def _with_background(self, body: str) -> str:
        if self.scene.background == "plain":
            color = self._pick(words.COLORS[self.scene.paper])
            where = words.on_paper(self._pick(words.PAPERS), color)
        else:
            where = self._pick(words.BACKGROUNDS[self.scene.background])
        if self._chance(0.2):
            return f"{where}{self.rng.choice((', ', ', ', ' there is '))}{body}"
        return body + self.rng.choice((" ", " ", ", ")) + where

    def _in_a_hand(self, text: str) -> str:
        """Articles left out, a full stop, a capital: as people type."""
        if self._chance(0.08):
            text = text.replace(" a ", " ").replace(" an ", " ").replace(" the ", " ")
        if self._chance(0.1):
            text += "."
        return text[0].upper() + text[1:] if self._chance(0.15) else text


def _after(place: str) -> str:
    return f" {place}" if place else ""


def _column(thing: Thing) -> int:
    return SLOTS.index(thing.slot)
