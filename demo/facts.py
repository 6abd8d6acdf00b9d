"""What a caption states about a picture, and nothing that it leaves open."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ThingFacts:
    """A thing that is there; None is what the words do not say."""

    kind: str
    color: str | None = None
    size: str | None = None
    place: str | None = None
    row: str | None = None


@dataclass(frozen=True)
class Relation:
    """`first` is `kind` (left, right, above, below, beside) of `second`; both are indices into the things."""

    kind: str
    first: int
    second: int


@dataclass(frozen=True)
class Facts:
    """Background, the colour of the paper if it is plain, things in the order of their mention, relations."""

    background: str | None = None
    paper: str | None = None
    things: tuple[ThingFacts, ...] = ()
    relations: tuple[Relation, ...] = ()
