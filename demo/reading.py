"""Reads a caption back into facts, so that a picture can be judged by its prompt alone."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from . import words
from .facts import Facts, Relation, ThingFacts
from .scenes import SLOTS

ARTICLES = ("a", "an", "the")
SEPARATORS = (",", ".", ";", ":", "and", "with")
Meaning = tuple[str, str]


def facts_of(text: str) -> Facts:
    """The facts that a text in the captions' language states; words that are not known are passed over."""
    reader = _Reader()
    tokens = _tokens(text)
    position = 0
    while position < len(tokens):
        length = next(
            (
                n
                for n in range(min(LONGEST, len(tokens) - position), 0, -1)
                if tuple(tokens[position : position + n]) in PHRASES
            ),
            0,
        )
        for role, value in PHRASES.get(tuple(tokens[position : position + length]), ()):
            reader.hear(role, value)
        position += max(1, length)
    return reader.facts()


def _tokens(text: str) -> list[str]:
    found = re.findall(r"[a-z]+|[,.;:]", text.lower().replace("'", "").replace("-", " "))
    return [token for token in found if token not in ARTICLES]


@dataclass
class _Reader:
    """Attributes wait for their noun; places belong to the last noun of the clause, or wait for the first."""

    background: str | None = None
    paper: str | None = None
    things: list[dict[str, str]] = field(default_factory=list)
    relations: list[Relation] = field(default_factory=list)
    waiting: dict[str, str] = field(default_factory=dict)
    relation: str | None = None
    clause_has_noun: bool = False

    def hear(self, role: str, value: str) -> None:
        getattr(self, f"_hear_{role}")(value)

    def facts(self) -> Facts:
        things = tuple(ThingFacts(**thing) for thing in self.things)
        return Facts(self.background, self.paper, things, tuple(self.relations))

    def _hear_separator(self, _: str) -> None:
        self.clause_has_noun = False

    def _hear_kind(self, kind: str) -> None:
        self.things.append({"kind": kind, **self.waiting})
        if self.relation and len(self.things) > 1:
            self.relations.append(Relation(self.relation, len(self.things) - 2, len(self.things) - 1))
        self.waiting, self.relation, self.clause_has_noun = {}, None, True

    def _hear_color(self, color: str) -> None:
        self.waiting["color"] = color

    def _hear_size(self, size: str) -> None:
        self.waiting["size"] = size

    def _hear_color_after(self, color: str) -> None:
        if self.things:
            self.things[-1]["color"] = color

    def _hear_place(self, place: str) -> None:
        self._target()["place"] = place

    def _hear_row(self, row: str) -> None:
        self._target()["row"] = row

    def _target(self) -> dict[str, str]:
        return self.things[-1] if self.clause_has_noun else self.waiting

    def _hear_relation(self, relation: str) -> None:
        self.relation = relation

    def _hear_its_side(self, side: str) -> None:
        if len(self.things) > 1:
            self.relations.append(Relation(side, len(self.things) - 1, len(self.things) - 2))

    def _hear_background(self, background: str) -> None:
        if self.background != "plain":
            self.background = background

    def _hear_paper(self, color: str) -> None:
        self.background, self.paper = "plain", color


def _entries() -> Iterator[tuple[str, tuple[Meaning, ...]]]:
    """Every phrase with what it means; later entries do not replace earlier ones."""
    for separator in SEPARATORS:
        yield separator, (("separator", ""),)
    for role, table in (
        ("kind", words.NOUNS),
        ("color", words.COLORS),
        ("size", words.SIZES),
        ("place", words.PLACES),
        ("relation", words.RELATIONS),
        ("its_side", words.ITS_SIDE),
        ("row", words.PAPER_ROWS),
        ("background", words.BACKGROUNDS),
        ("row", {"top": words.SKY_ROW, "bottom": words.GROUND_ROW}),
        ("background", words.ALSO_BACKGROUNDS),
        ("place", words.ALSO_PLACES),
        ("row", words.ALSO_ROWS),
    ):
        for value, phrases in table.items():
            for phrase in phrases:
                yield phrase, ((role, value),)
    yield from _corner_entries()
    yield from _color_entries()


def _corner_entries() -> Iterator[tuple[str, tuple[Meaning, ...]]]:
    for row, patterns in words.CORNERS.items():
        for side in SLOTS:
            for pattern in (*patterns, "{row} {{}}", "at the {{}} {row}", "on the {row} {{}}"):
                phrase = pattern.format(row=row).format(side) if "{row}" in pattern else pattern.format(side)
                yield phrase, (("row", row), ("place", side))


def _color_entries() -> Iterator[tuple[str, tuple[Meaning, ...]]]:
    for color, synonyms in words.COLORS.items():
        for synonym in synonyms:
            for pattern in (*words.PAPERS, "{} background", "plain {} background", "{} paper"):
                yield words.on_paper(pattern, synonym), (("paper", color),)
            for pattern in words.AFTERWARDS:
                yield pattern.format(synonym), (("color_after", color),)


def _phrases() -> dict[tuple[str, ...], tuple[Meaning, ...]]:
    table: dict[tuple[str, ...], tuple[Meaning, ...]] = {}
    for phrase, meaning in _entries():
        table.setdefault(tuple(_tokens(phrase)), meaning)
    return table


PHRASES = _phrases()
LONGEST = max(map(len, PHRASES))
