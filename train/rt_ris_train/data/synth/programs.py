"""Sentences as programs: what a sentence refers to is computed, in two readings.

A program is nested tuples of words, so that JSON can hold it:

    ("named", noun)                       things called so
    ("coloured", P, colour)               those of P with this colour
    ("half", P, side)                     those of P in the left, right, top or bottom half
    ("middle", P)                         those of P in the middle of the picture
    ("corner", P, side, side)             those of P in a corner, e.g. "top", "left"
    ("extreme", P, side)                  the one of P that is furthest to a side
    ("ordinal", P, side, n)               the n-th of P counted from a side, from 1
    ("size", P, "largest" | "smallest")   by visible area
    ("related", P, relation, Q)           those of P left_of, right_of, above, below, next_to Q
    ("nearest", P, Q)                     the one of P nearest to Q
    ("except", P, Q)                      those of P that are not in Q
    ("both", P, Q)                        those of P and those of Q

P and Q are programs; Q of a relation must be one thing. The strict reading holds what nobody
would dispute, the loose one what someone might say. A program is used only where the two agree,
for it and for every program inside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, TypeAlias

from rt_ris_train.data.synth.scene import Scene, Thing

Program: TypeAlias = tuple[Any, ...]
Targets: TypeAlias = frozenset[int]

# Margins are shares of the picture's width or height unless said otherwise. They were set by
# looking at scenes: within them two people may answer differently.
_SIDE_STRICT, _SIDE_LOOSE = 0.42, 0.56
_MIDDLE_STRICT, _MIDDLE_LOOSE = 0.12, 0.25
_CORNER_STRICT, _CORNER_LOOSE = 0.34, 0.48
_ORDER_GAP = 0.07
_EXTREME_GAP = 0.10
_AREA_RATIO = 1.4
_DIAGONAL_RATIO = 1.12
_APART = 0.08
_NEXT_STRICT, _NEXT_LOOSE = 0.07, 0.25
_NEAREST_RATIO = 1.35

_SIDES = {"left": (0, 1), "right": (0, -1), "top": (1, 1), "bottom": (1, -1)}


def evaluate(program: Program, scene: Scene, *, strict: bool) -> Targets:
    """Indices of the things that the program refers to, in one of the two readings."""
    operation = _OPERATIONS[program[0]]
    return operation(program[1:], scene, strict)


def agreed_targets(program: Program, scene: Scene) -> Targets | None:
    """What the program refers to, or None where the readings differ anywhere in it."""
    for inner in subprograms(program):
        if evaluate(inner, scene, strict=True) != evaluate(inner, scene, strict=False):
            return None
    return evaluate(program, scene, strict=True)


def subprograms(program: Program) -> Iterator[Program]:
    """The program and every program inside it, innermost first."""
    for part in program:
        if isinstance(part, tuple):
            yield from subprograms(part)
    yield program


def from_json(plain: list[Any]) -> Program:
    """Read a program out of nested lists."""
    return tuple(from_json(part) if isinstance(part, list) else part for part in plain)


def _named(args: Program, scene: Scene, strict: bool) -> Targets:
    noun = args[0]
    if noun in scene.unmentionable:
        return frozenset() if strict else frozenset(range(len(scene.things)))
    return frozenset(
        index
        for index, thing in enumerate(scene.things)
        if noun in (thing.names if strict else thing.possible_names)
    )


def _coloured(args: Program, scene: Scene, strict: bool) -> Targets:
    inner, colour = args
    chosen = evaluate(inner, scene, strict=strict)
    test = Thing.is_clearly if strict else Thing.is_perhaps
    return frozenset(index for index in chosen if test(scene.things[index], colour))


def _from_side(thing: Thing, scene: Scene, side: str) -> float:
    """Distance of the centre from a side of the picture, 0 at that side and 1 at the other."""
    axis, direction = _SIDES[side]
    share = thing.centre[axis] / (scene.width, scene.height)[axis]
    return share if direction > 0 else 1 - share


def _half(args: Program, scene: Scene, strict: bool) -> Targets:
    inner, side = args
    limit = _SIDE_STRICT if strict else _SIDE_LOOSE
    chosen = evaluate(inner, scene, strict=strict)
    return frozenset(i for i in chosen if _from_side(scene.things[i], scene, side) < limit)


def _middle(args: Program, scene: Scene, strict: bool) -> Targets:
    def is_in(thing: Thing) -> bool:
        across = abs(_from_side(thing, scene, "left") - 0.5)
        down = abs(_from_side(thing, scene, "top") - 0.5)
        if strict:
            return across < _MIDDLE_STRICT and down < 2 * _MIDDLE_STRICT
        return across < _MIDDLE_LOOSE

    chosen = evaluate(args[0], scene, strict=strict)
    return frozenset(i for i in chosen if is_in(scene.things[i]))


def _corner(args: Program, scene: Scene, strict: bool) -> Targets:
    inner, *sides = args
    limit = _CORNER_STRICT if strict else _CORNER_LOOSE
    chosen = evaluate(inner, scene, strict=strict)
    return frozenset(
        i for i in chosen if all(_from_side(scene.things[i], scene, s) < limit for s in sides)
    )


def _extreme(args: Program, scene: Scene, strict: bool) -> Targets:
    inner, side = args
    ranked = _ranked(evaluate(inner, scene, strict=strict), scene, side)
    if not ranked:
        return frozenset()
    if strict and (ranked[0][0] > _SIDE_LOOSE or not _gap_after(ranked, 0, _EXTREME_GAP)):
        return frozenset()
    return frozenset({ranked[0][1]})


def _ordinal(args: Program, scene: Scene, strict: bool) -> Targets:
    inner, side, number = args
    ranked = _ranked(evaluate(inner, scene, strict=strict), scene, side)
    if len(ranked) < number:
        return frozenset()
    if strict and not all(_gap_after(ranked, place, _ORDER_GAP) for place in range(number)):
        return frozenset()
    return frozenset({ranked[number - 1][1]})


def _ranked(chosen: Targets, scene: Scene, side: str) -> list[tuple[float, int]]:
    return sorted((_from_side(scene.things[index], scene, side), index) for index in chosen)


def _gap_after(ranked: list[tuple[float, int]], place: int, gap: float) -> bool:
    return place + 1 >= len(ranked) or ranked[place + 1][0] - ranked[place][0] >= gap


def _size(args: Program, scene: Scene, strict: bool) -> Targets:
    inner, which = args
    chosen = evaluate(inner, scene, strict=strict)
    ranked = sorted(chosen, key=lambda i: scene.things[i].area, reverse=which == "largest")
    if strict and len(ranked) > 1:
        first, second = (scene.things[index] for index in ranked[:2])
        larger, smaller = (first, second) if which == "largest" else (second, first)
        if larger.area < _AREA_RATIO * smaller.area:
            return frozenset()
        if larger.diagonal < _DIAGONAL_RATIO * smaller.diagonal:
            return frozenset()
    return frozenset(ranked[:1])


def _related(args: Program, scene: Scene, strict: bool) -> Targets:
    inner, relation, anchor_program = args
    chosen = evaluate(inner, scene, strict=strict)
    anchor = _single(anchor_program, scene, strict)
    if anchor is None:
        return frozenset() if strict else chosen
    test = _RELATIONS[relation]
    things = scene.things
    return frozenset(
        i for i in chosen if i != anchor and test(things[i], things[anchor], scene, strict)
    )


def _single(program: Program, scene: Scene, strict: bool) -> int | None:
    found = evaluate(program, scene, strict=strict)
    return next(iter(found)) if len(found) == 1 else None


def _left_of(thing: Thing, anchor: Thing, scene: Scene, strict: bool) -> bool:
    return _before(thing, anchor, (scene.width, scene.height), axis=0, strict=strict)


def _above(thing: Thing, anchor: Thing, scene: Scene, strict: bool) -> bool:
    return _before(thing, anchor, (scene.width, scene.height), axis=1, strict=strict)


def _before(thing: Thing, anchor: Thing, size: tuple[int, int], *, axis: int, strict: bool) -> bool:
    along = anchor.centre[axis] - thing.centre[axis]
    if not strict:
        return along > -_APART / 2 * size[axis]
    across = abs(anchor.centre[1 - axis] - thing.centre[1 - axis])
    middle_is_clear = thing.box[axis + 2] < anchor.centre[axis] + 0.02 * size[axis]
    return along > _APART * size[axis] and across < along and middle_is_clear


def _next_to(thing: Thing, anchor: Thing, scene: Scene, strict: bool) -> bool:
    unit = min(scene.width, scene.height)
    across, down = (_gap(thing, anchor, axis) for axis in (0, 1))
    distance = float((max(across, 0) ** 2 + max(down, 0) ** 2) ** 0.5)
    if not strict:
        return distance < _NEXT_LOOSE * unit
    heights = (thing.box[3] - thing.box[1], anchor.box[3] - anchor.box[1])
    return distance < _NEXT_STRICT * unit and -down > 0.4 * min(heights)


def _gap(one: Thing, other: Thing, axis: int) -> float:
    """Pixels between two boxes along an axis; negative where they overlap."""
    return max(one.box[axis] - other.box[axis + 2], other.box[axis] - one.box[axis + 2])


def _nearest(args: Program, scene: Scene, strict: bool) -> Targets:
    inner, anchor_program = args
    chosen = evaluate(inner, scene, strict=strict)
    anchor = _single(anchor_program, scene, strict)
    if anchor is None:
        return frozenset() if strict else chosen
    x, y = scene.things[anchor].centre
    ranked = sorted(
        (((scene.things[i].centre[0] - x) ** 2 + (scene.things[i].centre[1] - y) ** 2) ** 0.5, i)
        for i in chosen
        if i != anchor
    )
    if strict and len(ranked) > 1 and ranked[1][0] < _NEAREST_RATIO * ranked[0][0]:
        return frozenset()
    return frozenset(index for _, index in ranked[:1])


def _except(args: Program, scene: Scene, strict: bool) -> Targets:
    kept = evaluate(args[0], scene, strict=strict)
    return kept - evaluate(args[1], scene, strict=not strict)


def _both(args: Program, scene: Scene, strict: bool) -> Targets:
    first, second = (evaluate(program, scene, strict=strict) for program in args)
    return first | second


def _turned(thing: Thing, scene: Scene) -> Thing:
    """The thing as seen in a picture turned by 180 degrees."""
    left, top, right, bottom = thing.box
    width, height = scene.width, scene.height
    return replace(thing, box=(width - right, height - bottom, width - left, height - top))


_RELATIONS: dict[str, Callable[[Thing, Thing, Scene, bool], bool]] = {
    "left_of": _left_of,
    "right_of": lambda thing, anchor, scene, strict: _left_of(
        _turned(thing, scene), _turned(anchor, scene), scene, strict
    ),
    "above": _above,
    "below": lambda thing, anchor, scene, strict: _above(
        _turned(thing, scene), _turned(anchor, scene), scene, strict
    ),
    "next_to": _next_to,
}
RELATIONS: tuple[str, ...] = tuple(_RELATIONS)

_OPERATIONS: dict[str, Callable[[Program, Scene, bool], Targets]] = {
    "named": _named,
    "coloured": _coloured,
    "half": _half,
    "middle": _middle,
    "corner": _corner,
    "extreme": _extreme,
    "ordinal": _ordinal,
    "size": _size,
    "related": _related,
    "nearest": _nearest,
    "except": _except,
    "both": _both,
}
