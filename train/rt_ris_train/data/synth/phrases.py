"""Ways to refer to things in a scene: for each kind of sentence, programs and their words.

Whether a program is true of the scene, and how many things it finds, is decided elsewhere
(`sentences`): a maker may propose what turns out to be false.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rt_ris_train.data.synth.programs import Program, Targets, agreed_targets
from rt_ris_train.data.synth.scene import Scene
from rt_ris_train.data.synth.vocabulary import COLOURS, Vocabulary


@dataclass(frozen=True)
class Candidate:
    """A program with the ways to say it.

    Attributes:
        many: False where the words promise one thing, True where several, None for no target.
        needless: the noun alone would do.
    """

    kind: str
    program: Program
    phrases: tuple[str, ...]
    many: bool | None = False
    needless: bool = False


class Subject:
    """What the phrase makers need to know of a scene.

    Attributes:
        groups: for every noun that can be counted, the things it certainly fits.
        masses: the same for nouns without a plural, such as 'furniture'.
        anchors: simple descriptions of single things, to relate others to.
        anchored: what the words of each anchor refer to.
    """

    def __init__(self, scene: Scene, vocabulary: Vocabulary) -> None:
        """Find out which nouns are beyond dispute."""
        self.scene = scene
        self.vocabulary = vocabulary
        names = sorted({name for thing in scene.things for name in thing.names})
        found = {name: agreed_targets(("named", name), scene) for name in names}
        known: dict[str, Targets] = {n: t for n, t in found.items() if t}
        self.groups = {n: t for n, t in known.items() if vocabulary.plural(n)}
        self.masses = {n: t for n, t in known.items() if not vocabulary.plural(n)}
        self.anchors = list(self._anchors())
        self.anchored = {w: agreed_targets(p, scene) or frozenset() for p, w in self.anchors}

    def _anchors(self) -> Iterator[tuple[Program, str]]:
        """Simple descriptions of one thing, to relate others to."""
        for noun, targets in self.groups.items():
            if len(targets) == 1:
                yield ("named", noun), noun
                continue
            for colour in COLOURS:
                program: Program = ("coloured", ("named", noun), colour)
                found = agreed_targets(program, self.scene)
                if found and len(found) == 1 and colour != noun:
                    yield program, f"{colour} {noun}"

    def repeated(self) -> list[str]:
        """Nouns that fit two things or more."""
        return [noun for noun, targets in self.groups.items() if len(targets) > 1]

    def plural(self, noun: str) -> str:
        """The plural; every noun of `groups` has one."""
        return self.vocabulary.nouns[noun].plural or noun

    def colours(self, noun: str) -> list[str]:
        """Colours of the things that fit a noun; nobody says 'orange orange'."""
        seen = {self.scene.things[index].colour for index in self.groups[noun]}
        return [colour for colour in COLOURS if colour in seen and colour != noun]

    def absent_nouns(self) -> list[str]:
        """Nouns that nobody would use for anything in the picture."""
        used = self.scene.unmentionable.union(*(t.possible_names for t in self.scene.things))
        nouns = self.vocabulary.nouns.values()
        return [noun.name for noun in nouns if noun.plural and noun.name not in used]


def _article(phrase: str) -> str:
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def _category(subject: Subject, rng: np.random.Generator) -> Iterator[Candidate]:
    for noun, targets in subject.groups.items():
        if len(targets) == 1:
            phrases = (noun, f"the {noun}", _article(noun), f"the {noun} in the picture")
            yield Candidate("category", ("named", noun), phrases)


def _colour(subject: Subject, rng: np.random.Generator) -> Iterator[Candidate]:
    for noun, targets in subject.groups.items():
        for colour in subject.colours(noun):
            phrases = (
                f"{colour} {noun}",
                f"the {colour} {noun}",
                f"the {noun} that is {colour}",
                f"the {colour} colored {noun}",
                f"{noun}, the {colour} one",
            )
            program = ("coloured", ("named", noun), colour)
            yield Candidate("colour", program, phrases, needless=len(targets) == 1)


def _size(subject: Subject, rng: np.random.Generator) -> Iterator[Candidate]:
    words = {
        "largest": ("largest", "biggest", "the largest", "the biggest", "big", "the big", "large"),
        "smallest": ("smallest", "the smallest", "tiniest", "small", "the small", "little"),
    }
    for noun in subject.repeated():
        plural = subject.plural(noun)
        for which, adjectives in words.items():
            phrases = [f"{adjective} {noun}" for adjective in adjectives]
            phrases.append(f"the {which} of the {plural}")
            yield Candidate("size", ("size", ("named", noun), which), tuple(phrases))


_EXTREME_WORDS: dict[str, tuple[str, ...]] = {
    "left": (
        "left {n}",
        "the left {n}",
        "{n} on the left",
        "the {n} on the left",
        "the leftmost {n}",
        "{n} on left",
        "far left {n}",
        "the {n} at the left side",
        "the {n} furthest to the left",
    ),
    "right": (
        "right {n}",
        "the right {n}",
        "{n} on the right",
        "the {n} on the right",
        "the rightmost {n}",
        "{n} on right",
        "far right {n}",
        "the {n} at the right side",
        "the {n} furthest to the right",
    ),
    "top": ("top {n}", "the {n} at the top", "{n} on top", "the highest {n}", "upper {n}"),
    "bottom": (
        "bottom {n}",
        "the {n} at the bottom",
        "the lowest {n}",
        "lower {n}",
        "{n} at bottom",
    ),
}


def _position(subject: Subject, rng: np.random.Generator) -> Iterator[Candidate]:
    yield from _extremes(subject)
    yield from _places(subject)


def _extremes(subject: Subject) -> Iterator[Candidate]:
    for noun in subject.repeated():
        for side, words in _EXTREME_WORDS.items():
            phrases = tuple(word.format(n=noun) for word in words)
            yield Candidate("position", ("extreme", ("named", noun), side), phrases)


def _places(subject: Subject) -> Iterator[Candidate]:
    for noun, targets in subject.groups.items():
        named: Program = ("named", noun)
        needless = len(targets) == 1
        middle = (f"middle {noun}", f"{noun} in the middle", f"the {noun} in the center")
        yield Candidate("position", ("middle", named), middle, needless=needless)
        for side in ("left", "right"):
            half = (f"the {noun} on the {side} side of the picture", f"{noun} on the {side} half")
            yield Candidate("position", ("half", named, side), half, needless=needless)
            for end in ("top", "bottom"):
                words = (
                    f"{end} {side} {noun}",
                    f"the {noun} in the {end} {side} corner",
                    f"{noun} in {end} {side}",
                )
                program = ("corner", named, end, side)
                yield Candidate("position", program, words, needless=needless)


_ORDINALS = {1: ("first", "1st"), 2: ("second", "2nd"), 3: ("third", "3rd"), 4: ("fourth", "4th")}


def _ordinal(subject: Subject, rng: np.random.Generator) -> Iterator[Candidate]:
    for noun in subject.repeated():
        for number, (word, figure) in _ORDINALS.items():
            if number > len(subject.groups[noun]) - (number == 1):
                continue
            for side in ("left", "right", "top", "bottom"):
                phrases = (
                    f"the {word} {noun} from the {side}",
                    f"{word} {noun} from the {side}",
                    f"{word} {noun} from {side}",
                    f"{figure} {noun} from the {side}",
                )
                program = ("ordinal", ("named", noun), side, number)
                yield Candidate("ordinal", program, phrases)


_RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left_of": (
        "{n} left of the {m}",
        "the {n} to the left of the {m}",
        "{n} on the left of the {m}",
    ),
    "right_of": (
        "{n} right of the {m}",
        "the {n} to the right of the {m}",
        "{n} on the right of the {m}",
    ),
    "above": ("{n} above the {m}", "the {n} above the {m}", "the {n} that is above the {m}"),
    "below": ("{n} below the {m}", "the {n} under the {m}", "the {n} that is below the {m}"),
    "next_to": ("{n} next to the {m}", "the {n} beside the {m}", "{n} right next to the {m}"),
}
_NEAREST_WORDS = (
    "the {n} closest to the {m}",
    "{n} nearest to the {m}",
    "the {n} nearest the {m}",
    "closest {n} to the {m}",
)


def _fill(patterns: Sequence[str], noun: str, other: str) -> tuple[str, ...]:
    return tuple(pattern.format(n=noun, m=other) for pattern in patterns)


def _relation(subject: Subject, rng: np.random.Generator) -> Iterator[Candidate]:
    for noun, targets in subject.groups.items():
        for anchor, words in subject.anchors:
            if targets & subject.anchored[words]:
                continue
            for relation, patterns in _RELATION_WORDS.items():
                phrases = _fill(patterns, noun, words)
                program = ("related", ("named", noun), relation, anchor)
                yield Candidate("relation", program, phrases, needless=len(targets) == 1)
            if len(targets) > 1:
                phrases = _fill(_NEAREST_WORDS, noun, words)
                yield Candidate("relation", ("nearest", ("named", noun), anchor), phrases)


def _negation(subject: Subject, rng: np.random.Generator) -> Iterator[Candidate]:
    for noun in subject.repeated():
        named: Program = ("named", noun)
        for colour in subject.colours(noun):
            phrases = (
                f"the {noun} that is not {colour}",
                f"{noun} that isn't {colour}",
                f"the {noun} which is not {colour}",
            )
            yield Candidate("negation", ("except", named, ("coloured", named, colour)), phrases)
        yield from _other_kinds(subject, noun)
        for side in ("left", "right"):
            places = (f"the {noun} that is not on the {side}", f"{noun} not on the {side} side")
            yield Candidate("negation", ("except", named, ("half", named, side)), places)


def _other_kinds(subject: Subject, kind: str) -> Iterator[Candidate]:
    """'The animal that is not a dog'."""
    for noun, targets in subject.groups.items():
        if targets < subject.groups[kind]:
            words = (
                f"the {kind} that is not {_article(noun)}",
                f"{kind} that isn't {_article(noun)}",
                f"the {kind} other than the {noun}",
            )
            yield Candidate("negation", ("except", ("named", kind), ("named", noun)), words)


def _group(subject: Subject, rng: np.random.Generator) -> Iterator[Candidate]:
    for noun in subject.repeated():
        plural = subject.plural(noun)
        is_kind = any(noun != subject.scene.things[i].noun for i in subject.groups[noun])
        if not is_kind:
            continue
        phrases = (f"every {noun}", f"all the {plural}", f"the {plural}", f"all {plural}", plural)
        yield Candidate("group", ("named", noun), phrases, many=True)
    for noun in subject.masses:
        words = (f"all the {noun}", f"the {noun}", f"all {noun}")
        yield Candidate("group", ("named", noun), words, many=True)


_NUMBERS = {2: "two", 3: "three", 4: "four", 5: "five", 6: "six", 7: "seven"}


def _plural(subject: Subject, rng: np.random.Generator) -> Iterator[Candidate]:
    for noun in subject.repeated():
        plural = subject.plural(noun)
        named: Program = ("named", noun)
        count = len(subject.groups[noun])
        phrases = [
            f"the {plural}",
            f"all the {plural}",
            f"{plural}",
            f"the {_NUMBERS[count]} {plural}",
        ]
        phrases += [f"both {plural}", f"both of the {plural}"] if count == 2 else []
        yield Candidate("plural", named, tuple(phrases), many=True)
        for colour in subject.colours(noun):
            words = (f"{colour} {plural}", f"the {colour} {plural}", f"all the {colour} {plural}")
            yield Candidate("plural", ("coloured", named, colour), words, many=True)
        for side in ("left", "right"):
            places = (f"the {plural} on the {side}", f"{plural} on the {side} side")
            yield Candidate("plural", ("half", named, side), places, many=True)
    yield from _pairs(subject)


def _pairs(subject: Subject) -> Iterator[Candidate]:
    """'The dog and the cat'."""
    for first, first_words in subject.anchors:
        for second, second_words in subject.anchors:
            if not subject.anchored[first_words] & subject.anchored[second_words]:
                phrases = (
                    f"the {first_words} and the {second_words}",
                    f"{first_words} and {second_words}",
                )
                yield Candidate(
                    "plural", ("both", first, second), phrases, many=True, needless=True
                )


def _no_target(subject: Subject, rng: np.random.Generator) -> Iterator[Candidate]:
    for maker in (_absent, _wrong_colour, _false_relation, _false_place):
        yield from _any_few(list(maker(subject, rng)), rng)


def _any_few(candidates: list[Candidate], rng: np.random.Generator) -> list[Candidate]:
    """A few of many, so that each way to be wrong has its share."""
    return [candidates[index] for index in rng.permutation(len(candidates))[:10]]


def _absent(subject: Subject, rng: np.random.Generator) -> Iterator[Candidate]:
    """Nouns that are not there: some of the same kind as what is there, some at random."""
    absent = subject.absent_nouns()
    kinds = {kind for noun in subject.groups for kind in subject.vocabulary.nouns[noun].is_a}
    akin = [noun for noun in absent if kinds & set(subject.vocabulary.nouns[noun].is_a)]
    for pool in (akin, absent):
        for noun in _sample(pool, 3, rng):
            side = ("left", "right")[int(rng.integers(2))]
            colour = COLOURS[int(rng.integers(7))]
            yield Candidate("no_target", ("named", noun), (noun, f"the {noun}"), many=None)
            words = (f"{side} {noun}", f"the {noun} on the {side}", f"{noun} on {side}")
            yield Candidate("no_target", ("extreme", ("named", noun), side), words, many=None)
            if colour != noun:
                words = (f"{colour} {noun}", f"the {colour} {noun}", f"the {noun} that is {colour}")
                program = ("coloured", ("named", noun), colour)
                yield Candidate("no_target", program, words, many=None)


def _sample(pool: Sequence[str], count: int, rng: np.random.Generator) -> list[str]:
    return [pool[index] for index in rng.permutation(len(pool))[:count]]


def _wrong_colour(subject: Subject, rng: np.random.Generator) -> Iterator[Candidate]:
    for noun in subject.groups:
        for colour in COLOURS:
            if colour != noun:
                phrases = (
                    f"{colour} {noun}",
                    f"the {colour} {noun}",
                    f"the {noun} that is {colour}",
                )
                program = ("coloured", ("named", noun), colour)
                yield Candidate("no_target", program, phrases, many=None)


def _false_relation(subject: Subject, rng: np.random.Generator) -> Iterator[Candidate]:
    for noun, targets in subject.groups.items():
        for anchor, words in subject.anchors:
            if targets & subject.anchored[words]:
                continue
            for relation, patterns in _RELATION_WORDS.items():
                phrases = _fill(patterns, noun, words)
                program = ("related", ("named", noun), relation, anchor)
                yield Candidate("no_target", program, phrases, many=None)


def _false_place(subject: Subject, rng: np.random.Generator) -> Iterator[Candidate]:
    """'The dog in the top left corner' where no dog is near it, 'third dog' of two."""
    for noun, targets in subject.groups.items():
        for end in ("top", "bottom"):
            for side in ("left", "right"):
                phrases = (f"the {noun} in the {end} {side} corner", f"{end} {side} {noun}")
                program: Program = ("corner", ("named", noun), end, side)
                yield Candidate("no_target", program, phrases, many=None)
        number = len(targets) + 1
        if 2 < number <= max(_ORDINALS):
            word, figure = _ORDINALS[number]
            phrases = (f"the {word} {noun} from the left", f"{figure} {noun} from the left")
            yield Candidate(
                "no_target", ("ordinal", ("named", noun), "left", number), phrases, many=None
            )


# A maker draws from the generator only where it has to choose among too many.
MAKERS: dict[str, Callable[[Subject, np.random.Generator], Iterator[Candidate]]] = {
    "category": _category,
    "colour": _colour,
    "size": _size,
    "position": _position,
    "ordinal": _ordinal,
    "relation": _relation,
    "negation": _negation,
    "group": _group,
    "plural": _plural,
    "no_target": _no_target,
}
