"""Programs on scenes drawn by hand: what is clear, and what is disputed."""

from __future__ import annotations

import numpy as np
import pytest

from rt_ris_train.data.synth.programs import (
    Program,
    agreed_targets,
    evaluate,
    from_json,
    subprograms,
)
from rt_ris_train.data.synth.scene import Scene, Thing
from rt_ris_train.data.synth.sentences import KINDS, tell
from rt_ris_train.data.synth.vocabulary import default_vocabulary

WORDS = default_vocabulary()
DOG: Program = ("named", "dog")


def thing(noun: str, x: float, y: float, *, side: int = 40, colour: str | None = None) -> Thing:
    half = side // 2
    return Thing(
        noun=noun,
        colour=colour,
        box=(int(x) - half, int(y) - half, int(x) + half, int(y) + half),
        area=side * side,
        names=WORDS.certain_names(noun),
        possible_names=WORDS.possible_names(noun),
        sprite="none:",
    )


def scene(*things: Thing, unmentionable: frozenset[str] = frozenset()) -> Scene:
    return Scene(400, 300, things, unmentionable)


DOGS = scene(
    thing("dog", 60, 150, colour="brown"),
    thing("dog", 200, 150, side=80, colour="white"),
    thing("dog", 340, 150, colour="red"),
    thing("car", 200, 40, colour="red"),
)


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (DOG, {0, 1, 2}),
        (("named", "animal"), {0, 1, 2}),
        (("named", "cat"), set()),
        (("coloured", DOG, "white"), {1}),
        (("extreme", DOG, "left"), {0}),
        (("extreme", DOG, "right"), {2}),
        (("ordinal", DOG, "left", 2), {1}),
        (("ordinal", DOG, "right", 3), {0}),
        (("ordinal", DOG, "right", 4), set()),
        (("half", DOG, "left"), {0}),
        (("middle", DOG), {1}),
        (("size", DOG, "largest"), {1}),
        (("corner", ("named", "car"), "bottom", "left"), set()),
        (("related", DOG, "below", ("named", "car")), {1}),
        (("related", DOG, "above", ("named", "car")), set()),
        (("related", ("named", "car"), "above", ("size", DOG, "largest")), {3}),
        (("related", DOG, "left_of", ("size", DOG, "largest")), {0}),
        (("related", DOG, "right_of", ("size", DOG, "largest")), {2}),
        (("nearest", DOG, ("named", "car")), {1}),
        (("except", DOG, ("coloured", DOG, "white")), {0, 2}),
        (("both", ("named", "car"), ("coloured", DOG, "white")), {1, 3}),
    ],
)
def test_what_is_clear_is_found(program: Program, expected: set[int]) -> None:
    # 'below the car' is disputed for the dogs at the sides: see the next test.
    found = evaluate(program, DOGS, strict=True)
    assert found == expected


@pytest.mark.parametrize(
    "program",
    [
        ("coloured", DOG, "orange"),  # the red dog and the brown one are near
        ("related", DOG, "below", ("named", "car")),  # those at the sides are lower as well
        ("size", DOG, "smallest"),  # two of the same size
        ("related", DOG, "left_of", ("named", "dog")),  # of which dog?
        ("named", "wolf"),  # a dog may be taken for one
    ],
)
def test_what_is_disputed_is_not_used(program: Program) -> None:
    assert agreed_targets(program, DOGS) is None


def test_margins_are_needed_for_order_and_size() -> None:
    close = scene(thing("dog", 100, 100, side=40), thing("dog", 110, 200, side=44))
    assert agreed_targets(("extreme", DOG, "left"), close) is None
    assert agreed_targets(("size", DOG, "largest"), close) is None
    assert agreed_targets(("extreme", DOG, "top"), close) == frozenset({0})


def test_what_the_background_shows_is_not_mentioned() -> None:
    known = scene(thing("dog", 100, 100), unmentionable=frozenset({"tree"}))
    assert agreed_targets(("named", "tree"), known) is None


def test_next_to_needs_neighbours_side_by_side() -> None:
    row = scene(thing("dog", 100, 150), thing("car", 150, 150), thing("dog", 350, 150))
    assert agreed_targets(("related", DOG, "next_to", ("named", "car")), row) == frozenset({0})


def test_programs_survive_json() -> None:
    program: Program = ("except", DOG, ("half", DOG, "left"))
    assert from_json(["except", ["named", "dog"], ["half", ["named", "dog"], "left"]]) == program
    assert list(subprograms(program))[-1] == program


def test_scenes_survive_json() -> None:
    assert Scene.from_json(DOGS.to_json(), WORDS) == DOGS


def test_names_follow_the_table() -> None:
    assert WORDS.certain_names("rooster") == {"rooster", "chicken", "bird", "animal"}
    assert "crow" in WORDS.possible_names("bird")  # a bird may be of any sort
    assert "cow" in WORDS.possible_names("bull")
    assert WORDS.plural("mouse") == "mice"


@pytest.mark.parametrize("seed", range(8))
def test_sentences_mean_what_their_programs_find(seed: int) -> None:
    told = tell(DOGS, WORDS, np.random.default_rng(seed), count=9)
    assert told
    for expression in told:
        assert expression.kind in KINDS
        assert agreed_targets(expression.program, DOGS) == expression.targets
        assert (expression.kind == "no_target") == (not expression.targets)
        assert expression.text == expression.text.lower()
        assert expression.raw.lower().rstrip(".") == expression.text


def test_every_kind_can_be_told() -> None:
    kinds: set[str] = set()
    animals = scene(*DOGS.things, thing("cow", 60, 260, colour="brown"))
    for seed in range(40):
        kinds |= {e.kind for e in tell(animals, WORDS, np.random.default_rng(seed), count=9)}
    assert kinds == set(KINDS)
