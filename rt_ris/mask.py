"""Masks: from the logits of a network to the pixels of the picture.

This is the only definition of post-processing; evaluation uses it too. The way from the logit
grid to the picture is two resizes with a crop between them, each linear and separable.
Composed per axis they are one matrix, so the whole way is ``rows @ logits @ columns.T``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache, partial
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from rt_ris.errors import ShapeError
from rt_ris.image import Box, Prepared
from rt_ris.spec import MaskSpec, Upsample
from rt_ris.warp import Taps, affine, bicubic_corners, bilinear, fit_axis

Floats: TypeAlias = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a logit grid lies on a picture.

    Attributes:
        side: S, side of the network's square input, which the grid spans.
        box: the part of that input that shows the picture.
        size: height and width of the picture.
        warped: the picture was fitted by an affine warp, which is taken back.
    """

    side: int
    box: Box
    size: tuple[int, int]
    warped: bool = False

    @classmethod
    def of(cls, prepared: Prepared) -> Placement:
        """Where the logits of a prepared picture lie."""
        return cls(
            side=prepared.pixels.shape[1],
            box=prepared.box,
            size=prepared.size,
            warped=prepared.warped,
        )

    @classmethod
    def on_input(cls, side: int) -> Placement:
        """Of a grid that is looked at on the S x S input itself, where some papers evaluate."""
        return cls(side=side, box=Box(0, 0, side, side), size=(side, side))


def place(grid: Floats, placement: Placement, *, upsample: Upsample = "bilinear") -> Floats:
    """Resize a grid to the picture: grid -> S x S -> crop of the valid box -> original size.

    The first step equals ``torch.nn.functional.interpolate`` in the mode of ``upsample``, up to
    rounding. The second is bilinear, or, after a warp, OpenCV's ``warpAffine`` the other way.

    Args:
        grid: float32 [h, w], logits or probabilities.
        placement: where it lies.
        upsample: as in ``MaskSpec``.

    Returns:
        float32 [H, W].
    """
    box, (height, width) = placement.box, placement.size
    if placement.warped:
        longest = max(height, width)
        rows, columns = (
            _warped_axis(cells, placement.side, (length, longest), upsample, rows=vertical)
            for cells, length, vertical in (
                (grid.shape[0], height, True),
                (grid.shape[1], width, False),
            )
        )
    else:
        rows = _axis(grid.shape[0], placement.side, (box.top, box.bottom), height, upsample)
        columns = _axis(grid.shape[1], placement.side, (box.left, box.right), width, upsample)
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
            return sigmoid(self._place(self.logits))
        return np.clip(self._place(sigmoid(self.logits)), 0, 1)  # a cubic resize overshoots

    @cached_property
    def binary(self) -> npt.NDArray[np.bool_]:
        """The mask, bool [H, W], true on the thing; all false where ``exists`` is false."""
        if not self.exists:
            return np.zeros(self.size, dtype=np.bool_)
        placed, threshold = self._placed()
        return np.asarray(placed > threshold, dtype=np.bool_)

    def margin(self) -> Floats:
        """Float32 [H, W]: how far a pixel is above the threshold, should the thing exist."""
        placed, threshold = self._placed()
        return placed - threshold

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

    def _placed(self) -> tuple[Floats, np.float32]:
        """What decides on each pixel, float32 [H, W], and the threshold that it must exceed."""
        if self.spec.interpolate == "logits":
            return self._place(self.logits), np.float32(logit(self.spec.threshold))
        return self.probability, np.float32(self.spec.threshold)

    def _place(self, grid: Floats) -> Floats:
        return place(grid, self.placement, upsample=self.spec.upsample)


def logit(probability: float) -> float:
    """The inverse of the logistic function."""
    return math.log(probability / (1 - probability))


@lru_cache(maxsize=32)
def _axis(cells: int, side: int, crop: tuple[int, int], length: int, upsample: Upsample) -> Floats:
    """Both resizes of one axis in one matrix, float32 [length, cells], read-only."""
    cropped = _UPSAMPLE[upsample](cells, side).apply(np.eye(cells))[crop[0] : crop[1]]
    return _sealed(bilinear(len(cropped), length).apply(cropped))


@lru_cache(maxsize=32)
def _warped_axis(
    cells: int, side: int, lengths: tuple[int, int], upsample: Upsample, *, rows: bool
) -> Floats:
    """The resize of one axis and the way back out of a warp, as ``_axis``.

    ``lengths`` are those of this side of the picture and of its longer side.
    """
    length, longest = lengths
    scale, first = fit_axis(length, side, longest=longest)
    on_input = _UPSAMPLE[upsample](cells, side).apply(np.eye(cells))
    return _sealed(affine(side, length, scale=scale, offset=first, rows=rows).apply(on_input))


def _sealed(matrix: npt.NDArray[np.float64]) -> Floats:
    sealed = matrix.astype(np.float32)
    sealed.flags.writeable = False
    return sealed


_UPSAMPLE: Final[Mapping[Upsample, Callable[[int, int], Taps]]] = {
    "bilinear": bilinear,
    "bilinear_corners": partial(bilinear, corners=True),
    "bicubic_corners": bicubic_corners,
}
