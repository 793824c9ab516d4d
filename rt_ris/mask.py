"""Masks: from the logits of a network to the pixels of the picture.

This is the only definition of post-processing; evaluation uses it too. The way from the logit
grid to the picture is two bilinear resizes with a crop between them, each linear and separable.
Composed per axis they are one matrix, so the whole way is ``rows @ logits @ columns.T``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from rt_ris.errors import ShapeError
from rt_ris.image import Box, Pixels, Prepared
from rt_ris.spec import MaskSpec

Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a logit grid lies on a picture.

    Attributes:
        side: S, side of the network's square input, which the grid spans.
        box: the part of that input that shows the picture.
        size: height and width of the picture.
    """

    side: int
    box: Box
    size: tuple[int, int]

    @classmethod
    def of(cls, prepared: Prepared) -> Placement:
        """Where the logits of a prepared picture lie."""
        return cls(side=prepared.pixels.shape[1], box=prepared.box, size=prepared.size)


def place(grid: Floats, placement: Placement) -> Floats:
    """Resize a grid to the picture: grid -> S x S -> crop of the valid box -> original size.

    Equals two calls of ``torch.nn.functional.interpolate(mode="bilinear", align_corners=False)``
    with a crop between them, up to rounding.

    Args:
        grid: float32 [h, w], logits or probabilities.
        placement: where it lies.

    Returns:
        float32 [H, W].
    """
    box, (height, width) = placement.box, placement.size
    rows = _axis(grid.shape[0], placement.side, (box.top, box.bottom), height)
    columns = _axis(grid.shape[1], placement.side, (box.left, box.right), width)
    placed: Floats = rows @ grid @ columns.T
    return placed


def sigmoid(logits: Floats) -> Floats:
    """Logistic function without overflow, float32 of the same shape."""
    half = np.float32(0.5)
    probabilities: Floats = half * np.tanh(half * logits) + half
    return probabilities


@dataclass(frozen=True, kw_only=True, eq=False)
class Mask:
    """The answer to one sentence; pixels are computed when they are first asked for.

    Attributes:
        sentence: what was asked.
        logits: float32 [h, w], on the grid of the network.
        existence: probability that the thing is in the picture; None if the network does not say.
        truncated_after: the last word that was read, if the sentence was too long.
        placement: where the grid lies on the picture.
        spec: thresholds, and what is resized.
    """

    sentence: str
    logits: Floats
    existence: float | None
    truncated_after: str | None
    placement: Placement
    spec: MaskSpec

    def __post_init__(self) -> None:
        if self.logits.ndim != 2 or self.logits.dtype != np.float32:
            raise ShapeError(
                f"A mask got logits {self.logits.dtype} {list(self.logits.shape)}; accepted is "
                "float32 [h, w], one sentence at a time."
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the picture."""
        return self.placement.size

    @property
    def exists(self) -> bool:
        """False if the network says that nothing in the picture fits the sentence."""
        threshold = self.spec.existence_threshold
        return self.existence is None or threshold is None or self.existence >= threshold

    @cached_property
    def probability(self) -> Floats:
        """Float32 [H, W], 0..1: how likely a pixel belongs to the thing, should it exist."""
        if self.spec.interpolate == "logits":
            return sigmoid(place(self.logits, self.placement))
        return place(sigmoid(self.logits), self.placement)

    @cached_property
    def binary(self) -> npt.NDArray[np.bool_]:
        """The mask, bool [H, W], true on the thing; all false where ``exists`` is false."""
        if not self.exists:
            return np.zeros(self.size, dtype=np.bool_)
        threshold = self.spec.threshold
        if self.spec.interpolate == "logits":
            inside = place(self.logits, self.placement) > np.float32(logit(threshold))
        else:
            inside = self.probability > np.float32(threshold)
        return np.asarray(inside, dtype=np.bool_)

    @cached_property
    def score(self) -> float:
        """Mean probability over the mask's pixels, 0..1; 0 where the mask is empty."""
        return float(self.probability[self.binary].mean()) if self.binary.any() else 0.0

    @cached_property
    def box(self) -> Box | None:
        """The smallest box around the mask, in pixels of the picture; None where it is empty."""
        rows = np.flatnonzero(self.binary.any(axis=1))
        columns = np.flatnonzero(self.binary.any(axis=0))
        if not len(rows):
            return None
        return Box(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)


def logit(probability: float) -> float:
    """The inverse of the logistic function."""
    return math.log(probability / (1 - probability))


def overlay(
    image: Pixels,
    binary: npt.NDArray[np.bool_],
    *,
    colour: tuple[int, int, int] = (64, 255, 0),
    opacity: float = 0.45,
) -> Pixels:
    """Tint the pixels of a mask and draw its outline.

    Args:
        image: uint8 [H, W, 3].
        binary: bool [H, W].
        colour: RGB, 0..255.
        opacity: 0..1 of the tint; the outline is opaque.

    Returns:
        A new uint8 [H, W, 3].

    Raises:
        ShapeError: picture and mask differ in size.
    """
    if image.shape[:2] != binary.shape:
        raise ShapeError(
            f"The picture is {list(image.shape[:2])} and the mask {list(binary.shape)}; overlay() "
            "takes both at the same size."
        )
    tint = np.array(colour, dtype=np.float32)
    drawn: Pixels = image.copy()
    mixed = image[binary].astype(np.float32) * (1 - opacity) + tint * opacity
    drawn[binary] = np.round(mixed).astype(np.uint8)
    drawn[_outline(binary, width=max(1, max(binary.shape) // 400))] = tint.astype(np.uint8)
    return drawn


def _outline(binary: npt.NDArray[np.bool_], *, width: int) -> npt.NDArray[np.bool_]:
    """The mask's pixels within ``width`` steps of a pixel outside it."""
    inner = binary
    for _ in range(width):
        padded = np.pad(inner, 1)
        vertical = padded[:-2, 1:-1] & padded[2:, 1:-1]
        inner = inner & vertical & padded[1:-1, :-2] & padded[1:-1, 2:]
    return binary & ~inner


@lru_cache(maxsize=32)
def _axis(cells: int, side: int, crop: tuple[int, int], length: int) -> Floats:
    """Both resizes of one axis in one matrix, float32 [length, cells], read-only."""
    to_input = _taps(cells, side)
    rows = np.zeros((side, cells))
    for index, weight in to_input:
        rows[np.arange(side), index] += weight
    cropped = rows[crop[0] : crop[1]]
    composed = np.zeros((length, cells))
    for index, weight in _taps(len(cropped), length):
        composed += cropped[index] * weight[:, None]
    matrix = composed.astype(np.float32)
    matrix.flags.writeable = False
    return matrix


def _taps(
    before: int, after: int
) -> tuple[tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]], ...]:
    """Two source indices and their weights for each of ``after`` samples.

    Sample centres are aligned, edges are repeated: ``align_corners=False`` without anti-aliasing.
    """
    centre = np.maximum((np.arange(after) + 0.5) * (before / after) - 0.5, 0.0)
    low = np.minimum(np.floor(centre).astype(np.int64), before - 1)
    high = np.minimum(low + 1, before - 1)
    weight = np.where(high > low, centre - low, 0.0)
    return (low, 1 - weight), (high, weight)
