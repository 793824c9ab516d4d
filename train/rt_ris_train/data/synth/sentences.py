"""Sentences about a scene: every candidate is a program, and only undisputed ones are kept."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from rt_ris_train.data.synth.phrases import MAKERS, Candidate, Subject
from rt_ris_train.data.synth.programs import Program, Targets, agreed_targets
from rt_ris_train.data.synth.scene import Scene
from rt_ris_train.data.synth.vocabulary import Vocabulary

# How often each kind is drawn where it is possible.
KIND_WEIGHTS: dict[str, float] = {
    "category": 1.2,
    "colour": 2.6,
    "size": 1.3,
    "position": 2.0,
    "ordinal": 1.0,
    "relation": 1.8,
    "negation": 0.8,
    "group": 0.7,
    "plural": 1.0,
    "no_target": 1.4,
}
KINDS: tuple[str, ...] = tuple(KIND_WEIGHTS)
_SENTENCES_PER_REF = 3
_NO_TARGET_PER_SCENE = 2
# A phrase that tells apart where there is nothing to tell apart is rarely said, except for colour.
_NEEDLESS_SHARE = 0.25
_NEEDLESS_COLOUR_SHARE = 0.6
# 'The animal' is rarely said of what everyone calls a dog.
_GENERAL_SHARE = 0.2
_GENERAL = frozenset(
    (
        "animal",
        "person",
        "vehicle",
        "tool",
        "plant",
        "toy",
        "instrument",
        "furniture",
        "food",
        "fruit",
        "vegetable",
    )
)

_Pool: TypeAlias = "list[tuple[Candidate, Targets]]"


@dataclass(frozen=True)
class Expression:
    """A sentence and what it means.

    Attributes:
        kind: one of `KINDS`.
        text: lower-case, without a full stop.
        raw: as someone might type it.
        program: see `programs`.
        targets: indices of things in the scene; empty for 'no_target'.
    """

    kind: str
    text: str
    raw: str
    program: Program
    targets: Targets


def tell(
    scene: Scene, vocabulary: Vocabulary, rng: np.random.Generator, *, count: int
) -> list[Expression]:
    """Choose about `count` true, unambiguous sentences of different kinds about a scene."""
    subject = Subject(scene, vocabulary)
    pools = {kind: _true_ones(maker(subject, rng), scene, rng) for kind, maker in MAKERS.items()}
    contested = _contested(pools)
    chosen: list[Expression] = []
    while len(chosen) < count and any(pools.values()):
        kind = _draw_kind([kind for kind, pool in pools.items() if pool], rng)
        candidate, targets = pools[kind].pop()
        phrases = [p for p in candidate.phrases if p not in contested]
        if phrases and _is_welcome(candidate, targets, chosen):
            text = phrases[int(rng.integers(len(phrases)))]
            raw = _as_typed(text, rng)
            chosen.append(Expression(kind, text, raw, candidate.program, targets))
    return chosen


def _true_ones(candidates: Iterator[Candidate], scene: Scene, rng: np.random.Generator) -> _Pool:
    """Candidates whose readings agree on as many things as their words promise, shuffled."""
    kept: _Pool = []
    for candidate in candidates:
        if rng.random() >= _share_of(candidate):
            continue
        targets = agreed_targets(candidate.program, scene)
        if targets is not None and _fits(len(targets), candidate.many):
            kept.append((candidate, targets))
    return [kept[index] for index in rng.permutation(len(kept))]


def _share_of(candidate: Candidate) -> float:
    share = 1.0
    if candidate.needless:
        share = _NEEDLESS_COLOUR_SHARE if candidate.kind == "colour" else _NEEDLESS_SHARE
    if candidate.kind != "group" and _leading_noun(candidate.program) in _GENERAL:
        share *= _GENERAL_SHARE
    return share


def _leading_noun(program: Program) -> str:
    """The noun that the sentence is about."""
    noun = program[1]
    return noun if isinstance(noun, str) else _leading_noun(noun)


def _fits(count: int, many: bool | None) -> bool:
    if many is None:
        return count == 0
    return count > 1 if many else count == 1


def _contested(pools: dict[str, _Pool]) -> set[str]:
    """Texts that two programs would use for different things."""
    meanings: dict[str, set[Targets]] = {}
    for pool in pools.values():
        for candidate, targets in pool:
            for phrase in candidate.phrases:
                meanings.setdefault(phrase, set()).add(targets)
    return {phrase for phrase, targets in meanings.items() if len(targets) > 1}


def _draw_kind(kinds: Sequence[str], rng: np.random.Generator) -> str:
    weights = np.array([KIND_WEIGHTS[kind] for kind in kinds])
    return kinds[int(rng.choice(len(kinds), p=weights / weights.sum()))]


def _is_welcome(candidate: Candidate, targets: Targets, chosen: Sequence[Expression]) -> bool:
    if any(candidate.program == other.program for other in chosen):
        return False
    limit = _SENTENCES_PER_REF if targets else _NO_TARGET_PER_SCENE
    return sum(other.targets == targets for other in chosen) < limit


def _as_typed(text: str, rng: np.random.Generator) -> str:
    draw = rng.random()
    if draw < 0.5:
        return text
    capital = text[0].upper() + text[1:]
    return f"{capital}." if draw < 0.75 else capital
