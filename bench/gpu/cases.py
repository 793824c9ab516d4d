"""Inputs for checking and timing the kernels; numpy only, so that every script can use them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from rt_ris_kernels.kernel import Array
from rt_ris_kernels.ops.masked_mutual_attention import logit, relevance

TIE_BAND = 1e-5
"""Scores closer to the threshold, in rms of the scores, may be decided either way."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes and kind of one call.

    Attributes:
        shared: one z_v for all expressions.
        mean: standard deviation of the channels' means; 16 overflows sums in plain float16.
        masked_rows: share of the pixels that no word concerns.
        padded: whether every sentence ends in padded words; else only the first is full.
    """

    dtype: str = "float16"
    expressions: int = 1
    pixels: int = 4096
    words: int = 25
    channels: int = 256
    shared: bool = True
    normalize: int = 0
    threshold: float = 0.5
    mean: float = 0.0
    masked_rows: float = 0.1
    padded: bool = True
    seed: int = 0

    @property
    def name(self) -> str:
        """Short, for tables."""
        kind = "shared" if self.shared else "separate"
        return (
            f"{self.dtype} N={self.expressions} {kind} P={self.pixels} L={self.words} "
            f"C={self.channels} mean={self.mean:g} normalize={self.normalize} seed={self.seed}"
        )

    @property
    def sizes(self) -> dict[str, Any]:
        """As a launcher's ``geometry`` takes them."""
        return {
            "expressions": self.expressions,
            "pixels": self.pixels,
            "words": self.words,
            "channels": self.channels,
            "dtype": self.dtype,
        }

    @property
    def attributes(self) -> dict[str, float | int]:
        """Of the operator."""
        return {
            "threshold": self.threshold,
            "scale": 1.0,
            "epsilon": 1e-5,
            "normalize": self.normalize,
        }


def draw(case: Case) -> tuple[list[Array], int]:
    """Inputs in operator order, and how many pixels were moved away from a tie.

    A pixel with a score within the tie band is drawn again, so that two right implementations
    decide alike; the count says how many pixels a comparison leaves out.
    """
    rng = np.random.default_rng([case.seed, case.pixels, case.words, case.channels])
    images = 1 if case.shared else case.expressions
    offset = case.mean * rng.standard_normal(case.channels)
    z_l = rng.standard_normal((case.expressions, case.words, case.channels))
    z_l *= 2 / np.sqrt(case.channels * (1 + case.mean**2))
    mask = np.ones((case.expressions, case.words))
    if case.padded:
        for expression in range(case.expressions):
            mask[expression, max(1, case.words - 1 - expression % 4) :] = 0
    z_l = z_l.astype(case.dtype)
    z_v = (rng.standard_normal((images, case.pixels, case.channels)) + offset).astype(case.dtype)
    hidden = rng.random((images, case.pixels)) < case.masked_rows
    if case.mean == 0:
        _hide(z_v, z_l, hidden)
    moved = _leave_ties(z_v, z_l, case, rng)
    norms = [
        rng.uniform(0.5, 1.5, case.channels) if k % 2 == 0 else rng.standard_normal(case.channels)
        for k in range(4)
    ]
    return [z_v, z_l, *(array.astype(case.dtype) for array in (mask, *norms))], moved


def _hide(z_v: Array, z_l: Array, hidden: np.ndarray) -> None:
    """Turns the chosen pixels against every word of the expressions that see them."""
    for image, rows in enumerate(hidden):
        words = z_l.reshape(-1, z_l.shape[-1]) if len(z_v) == 1 else z_l[image]
        against = -np.linalg.pinv(words.astype(np.float64)) @ np.full(len(words), 3.0)
        z_v[image, rows] = against.astype(z_v.dtype)


def _leave_ties(z_v: Array, z_l: Array, case: Case, rng: np.random.Generator) -> int:
    moved = 0
    for _ in range(20):
        scores = relevance(z_v.astype(np.float64), z_l.astype(np.float64))
        band = TIE_BAND * np.sqrt(np.square(scores).mean())
        tied = (np.abs(scores - logit(case.threshold)) < band).any(axis=-1)
        tied = tied.any(axis=0, keepdims=True) if case.shared else tied
        if not tied.any():
            break
        moved += int(tied.sum())
        step = rng.uniform(0.9, 1.1, (int(tied.sum()), 1))
        z_v[tied] = (z_v[tied].astype(np.float64) * step).astype(z_v.dtype)
        if np.isclose(logit(case.threshold), 0):  # scaling cannot move a score across zero
            z_v[tied] += rng.standard_normal(z_v[tied].shape).astype(z_v.dtype) * 0.05
    return moved


CHECKS = (
    *(Case(seed=seed) for seed in range(3)),
    Case(words=1, padded=False),
    Case(words=80),
    Case(words=77, expressions=3, shared=False),
    Case(words=17, expressions=5, normalize=1),
    Case(words=77, expressions=2, normalize=1, mean=4.0),
    Case(pixels=4095),
    Case(pixels=1),
    Case(pixels=33, expressions=2, shared=False),
    Case(pixels=900, channels=128, words=32),
    Case(pixels=10007, channels=128, words=80, normalize=1),
    Case(expressions=16),
    Case(expressions=16, shared=False, words=77),
    Case(expressions=400, pixels=100, channels=128, words=9),
    Case(threshold=0.0, masked_rows=0.0),
    Case(threshold=0.9),
    Case(threshold=1.0),
    *(Case(mean=mean) for mean in (4.0, 16.0, 64.0)),
    Case(mean=64.0, channels=128, words=80),
    *(Case(dtype="float32", seed=seed) for seed in range(2)),
    Case(dtype="float32", words=80, normalize=1, pixels=4097),
    Case(dtype="float32", words=1, padded=False, channels=128),
    Case(dtype="float32", expressions=16, shared=False, words=33),
    Case(dtype="float32", mean=64.0, channels=128, pixels=901),
)
