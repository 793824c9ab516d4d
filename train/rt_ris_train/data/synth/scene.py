"""The scene graph: what is in a picture and where, which sentences are checked against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rt_ris_train.data.synth.vocabulary import NEAR_COLOURS, Vocabulary


@dataclass(frozen=True)
class Thing:
    """One object as it is seen.

    Attributes:
        noun: what it is, as specific as the tables say.
        colour: its colour, None where it has several or none that is clear.
        box: of its visible pixels, (left, top, right, bottom), right and bottom exclusive.
        area: number of its visible pixels.
        names: what it may certainly be called.
        possible_names: what someone might call it.
        sprite: where it comes from, '<source>:<key>'.
    """

    noun: str
    colour: str | None
    box: tuple[int, int, int, int]
    area: int
    names: frozenset[str]
    possible_names: frozenset[str]
    sprite: str

    @property
    def centre(self) -> tuple[float, float]:
        """Centre (x, y) of the box in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def diagonal(self) -> float:
        """Diagonal of the box in pixels."""
        left, top, right, bottom = self.box
        return float(((right - left) ** 2 + (bottom - top) ** 2) ** 0.5)

    def is_clearly(self, colour: str) -> bool:
        """Whether anyone would say that it has this colour."""
        return self.colour == colour

    def is_perhaps(self, colour: str) -> bool:
        """Whether someone could say that it has this colour."""
        return self.colour in (None, colour) or self.colour in NEAR_COLOURS[colour]


@dataclass(frozen=True)
class Scene:
    """Everything in one picture.

    Attributes:
        width: of the picture in pixels.
        height: of the picture in pixels.
        things: objects in drawing order, the hindmost first; sentences point to their indices.
        unmentionable: names that the background may deserve too; no sentence uses them.
    """

    width: int
    height: int
    things: tuple[Thing, ...]
    unmentionable: frozenset[str] = frozenset()

    def to_json(self) -> dict[str, Any]:
        """Plain data, without the names that the vocabulary derives."""
        things = [
            {
                "noun": thing.noun,
                "colour": thing.colour,
                "box": list(thing.box),
                "area": thing.area,
                "sprite": thing.sprite,
            }
            for thing in self.things
        ]
        size = {"width": self.width, "height": self.height}
        return {**size, "things": things, "unmentionable": sorted(self.unmentionable)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any], vocabulary: Vocabulary) -> Scene:
        """Read what `to_json` wrote."""
        return cls(
            width=plain["width"],
            height=plain["height"],
            things=tuple(_read_thing(thing, vocabulary) for thing in plain["things"]),
            unmentionable=frozenset(plain["unmentionable"]),
        )


def _read_thing(plain: Mapping[str, Any], vocabulary: Vocabulary) -> Thing:
    left, top, right, bottom = plain["box"]
    return Thing(
        noun=plain["noun"],
        colour=plain["colour"],
        box=(left, top, right, bottom),
        area=plain["area"],
        names=vocabulary.certain_names(plain["noun"]),
        possible_names=vocabulary.possible_names(plain["noun"]),
        sprite=plain["sprite"],
    )
