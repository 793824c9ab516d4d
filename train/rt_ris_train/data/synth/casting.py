"""The choice of a scene's objects: repeated nouns, so that sentences have to discriminate."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rt_ris_train.data.synth.colouring import PAINTS
from rt_ris_train.data.synth.sprites import GLYPHS, STAMPS, Sprite, SpriteLibrary
from rt_ris_train.data.synth.vocabulary import Vocabulary

_COUNTS = (2, 3, 4, 5, 6, 7)
_COUNT_WEIGHTS = (0.07, 0.2, 0.26, 0.22, 0.15, 0.1)
# How scenes draw on the two sources where both are there: photographs are nearer to the real task.
_STAMPS_ONLY, _MIXED = 0.7, 0.2
_PAINTED = 0.75  # of the objects that may take another colour
_PAINTABLE_WEIGHT = 2.5  # such objects are needed for sentences about colour
# Nouns of COCO come twice as often, as real questions are about them.
# fmt: off
_COMMON = frozenset(
    {
        "airplane", "apple", "backpack", "banana", "bear", "bed", "bicycle", "bird", "boat",
        "book", "bottle", "bowl", "broccoli", "bus", "cake", "car", "carrot", "cat", "chair",
        "clock", "couch", "cow", "cup", "dog", "donut", "elephant", "giraffe", "horse",
        "keyboard", "kite", "laptop", "man", "motorcycle", "orange", "person", "phone", "pizza",
        "sheep", "stop sign", "teddy bear", "toilet", "traffic light", "train", "truck",
        "umbrella", "woman", "zebra",
    }
)
# fmt: on


@dataclass(frozen=True)
class Role:
    """A sprite and the colour it is painted in (None: as it is)."""

    sprite: Sprite
    paint: str | None


def cast_roles(
    library: SpriteLibrary, vocabulary: Vocabulary, rng: np.random.Generator
) -> list[Role]:
    """Choose two to seven objects: several of one noun, perhaps of a second, and others."""
    sprites = _sources(library, rng)
    by_name = _group_by_name(sprites, vocabulary)
    count = int(rng.choice(_COUNTS, p=_COUNT_WEIGHTS))
    chosen: list[Sprite] = []
    while len(chosen) < count:
        room = count - len(chosen)
        repeats = min(room, int(rng.choice((1, 2, 3, 4), p=(0.3, 0.4, 0.22, 0.08))))
        chosen += _draw_group(by_name, repeats, rng)
    roles: list[Role] = []
    for sprite in chosen:
        taken = {role.paint for role in roles if role.sprite.noun == sprite.noun}
        roles.append(Role(sprite, _choose_paint(sprite, taken, rng)))
    return [roles[index] for index in rng.permutation(len(roles))]


def _sources(library: SpriteLibrary, rng: np.random.Generator) -> list[Sprite]:
    if len(library.sprites) == 1:
        return next(iter(library.sprites.values()))
    draw = rng.random()
    if draw < _STAMPS_ONLY:
        return library.sprites[STAMPS]
    if draw < _STAMPS_ONLY + _MIXED:
        return library.sprites[STAMPS] + library.sprites[GLYPHS]
    return library.sprites[GLYPHS]


def _group_by_name(sprites: Sequence[Sprite], vocabulary: Vocabulary) -> dict[str, list[Sprite]]:
    """Sprites under their noun and under the kind right above it."""
    groups: dict[str, list[Sprite]] = {}
    for sprite in sprites:
        for name in (sprite.noun, *vocabulary.nouns[sprite.noun].is_a):
            groups.setdefault(name, []).append(sprite)
    return groups


def _draw_group(
    by_name: dict[str, list[Sprite]], count: int, rng: np.random.Generator
) -> list[Sprite]:
    """Some sprites of one name: the same one again, or others of its name."""
    names = sorted(by_name)
    weights = np.array([_weight(name, by_name[name]) for name in names])
    name = names[int(rng.choice(len(names), p=weights / weights.sum()))]
    group = by_name[name]
    first = group[int(rng.integers(len(group)))]
    again = [first if rng.random() < 0.35 else group[int(rng.integers(len(group)))]]
    return [first, *(again[0] if n == 0 else _any_of(group, rng) for n in range(count - 1))]


def _weight(name: str, group: Sequence[Sprite]) -> float:
    paintable = sum(sprite.hue_may_change or sprite.may_be_tinted for sprite in group)
    common = 2.0 if name in _COMMON else 1.0
    return common * (_PAINTABLE_WEIGHT if 2 * paintable > len(group) else 1.0)


def _any_of(group: Sequence[Sprite], rng: np.random.Generator) -> Sprite:
    return group[int(rng.integers(len(group)))]


def _choose_paint(sprite: Sprite, taken: set[str | None], rng: np.random.Generator) -> str | None:
    """A colour for what can be painted; mostly another than things of the same noun have."""
    if not (sprite.hue_may_change or sprite.may_be_tinted) or rng.random() >= _PAINTED:
        return None
    free = [paint for paint in PAINTS if paint not in taken or rng.random() < 0.3]
    return free[int(rng.integers(len(free)))] if free else None
