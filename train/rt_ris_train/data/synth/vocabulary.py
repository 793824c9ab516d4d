"""What things are called: the noun, the kinds it belongs to, and what else one might call it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

from rt_ris.errors import DataError

# Colours that people mix up. Of two things with colours that are near, neither is called by the
# colour of the other, and neither is said not to have it.
NEAR_COLOURS: Mapping[str, frozenset[str]] = {
    "red": frozenset({"orange", "pink", "purple", "brown"}),
    "orange": frozenset({"red", "yellow", "brown"}),
    "yellow": frozenset({"orange", "white", "green"}),
    "green": frozenset({"yellow", "blue"}),
    "blue": frozenset({"purple", "gray", "green"}),
    "purple": frozenset({"blue", "pink", "red"}),
    "pink": frozenset({"red", "purple", "white"}),
    "brown": frozenset({"orange", "red", "gray", "black"}),
    "black": frozenset({"gray", "brown"}),
    "white": frozenset({"gray", "yellow", "pink"}),
    "gray": frozenset({"white", "black", "brown", "blue"}),
}
COLOURS: tuple[str, ...] = tuple(NEAR_COLOURS)


@dataclass(frozen=True)
class Noun:
    """One row of nouns.tsv.

    Attributes:
        name: the singular.
        plural: None where the word is not used in the plural.
        is_a: kinds that it certainly belongs to.
        could_be: other names that someone might use for it, rightly or not.
    """

    name: str
    plural: str | None
    is_a: tuple[str, ...]
    could_be: tuple[str, ...]


class Vocabulary:
    """The nouns and how they are related. Immutable."""

    def __init__(self, nouns: Iterable[Noun]) -> None:
        """Hold the nouns; every name that one mentions must be among them."""
        self.nouns: dict[str, Noun] = {noun.name: noun for noun in nouns}
        for noun in self.nouns.values():
            unknown = [n for n in (*noun.is_a, *noun.could_be) if n not in self.nouns]
            if unknown:
                raise DataError(f"nouns.tsv: '{noun.name}' mentions {unknown}, which have no row.")
        self._certain = {name: frozenset(self._climb(name)) for name in self.nouns}
        self._possible = {name: self._gather(name) for name in self.nouns}

    def certain_names(self, noun: str) -> frozenset[str]:
        """The noun and every kind it belongs to."""
        return self._certain[noun]

    def possible_names(self, noun: str) -> frozenset[str]:
        """Every name that someone might use for it: a 'bird' may be taken for any sort of bird."""
        return self._possible[noun]

    def plural(self, noun: str) -> str | None:
        """The plural of the noun, None where it has none."""
        return self.nouns[noun].plural

    def _climb(self, name: str) -> Iterator[str]:
        yield name
        for kind in self.nouns[name].is_a:
            yield from self._climb(kind)

    def _gather(self, name: str) -> frozenset[str]:
        certain = self._certain[name]
        others = [other for kind in certain for other in self.nouns[kind].could_be]
        sorts = [sort for sort, names in self._certain.items() if name in names]
        return certain.union(sorts, *(self._certain[other] for other in others))


def read_table(name: str) -> list[list[str]]:
    """Read the rows of a table of this package: tab-separated, `#` starts a comment line."""
    text = (files("rt_ris_train.data.synth") / "tables" / name).read_text(encoding="utf-8")
    return [line.split("\t") for line in text.splitlines() if line and not line.startswith("#")]


@cache
def default_vocabulary() -> Vocabulary:
    """The vocabulary of nouns.tsv."""
    return Vocabulary(_read_noun(row) for row in read_table("nouns.tsv"))


def _read_noun(row: list[str]) -> Noun:
    name, plural, is_a, could_be = (*row, "", "", "")[:4]
    return Noun(
        name=name,
        plural=None if plural == "*" else plural or f"{name}s",
        is_a=tuple(filter(None, is_a.split(","))),
        could_be=tuple(filter(None, could_be.split(","))),
    )
