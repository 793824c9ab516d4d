"""Resampling of one axis: the interpolations of PyTorch and the affine warp of OpenCV 4.

All of them are linear and act on rows and columns apart, so each is told by its *taps*: for every
sample that is wanted, some indices of samples that are there, and their weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

CUBIC: Final = -0.75
"""The free parameter of the cubic kernel, in OpenCV and in PyTorch."""

POSITIONS: Final = 32
"""OpenCV's warp looks at positions of a 32nd of a pixel."""

_COORDINATE_SCALE: Final = 1024
_HALF_POSITION: Final = _COORDINATE_SCALE // POSITIONS // 2


@dataclass(frozen=True, kw_only=True, eq=False)
class Taps:
    """Where each of n samples comes from.

    Attributes:
        index: int64 [k, n], of samples that are there.
        weight: float64 [k, n]; zero for what lies outside.
    """

    index: npt.NDArray[np.int64]
    weight: npt.NDArray[np.float64]

    def apply(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Resample the first axis, in the dtype of ``values``."""
        shape = (-1,) + (1,) * (values.ndim - 1)
        weight = self.weight.astype(values.dtype)
        parts = (
            values[index] * row.reshape(shape)
            for index, row in zip(self.index, weight, strict=True)
        )
        total: npt.NDArray[Any] = sum(parts, np.zeros((), dtype=values.dtype))
        return total


def bilinear(before: int, after: int, *, corners: bool = False) -> Taps:
    """PyTorch's ``interpolate(mode="bilinear")``: no anti-aliasing, edges repeated.

    Args:
        before: number of samples that are there.
        after: number of samples that are wanted.
        corners: align the centres of the first and last samples (``align_corners``), not the
            borders of the whole.
    """
    centre = np.maximum(_centres(before, after, corners=corners), 0.0)
    low = np.minimum(np.floor(centre).astype(np.int64), before - 1)
    high = np.minimum(low + 1, before - 1)
    weight = np.where(high > low, centre - low, 0.0)
    return Taps(index=np.stack((low, high)), weight=np.stack((1 - weight, weight)))


def bicubic_corners(before: int, after: int) -> Taps:
    """PyTorch's ``interpolate(mode="bicubic", align_corners=True)``, edges repeated."""
    centre = _centres(before, after, corners=True)
    first = np.floor(centre).astype(np.int64)
    index = np.clip(first + np.arange(-1, 3)[:, None], 0, before - 1)
    return Taps(index=index, weight=_cubic(centre - first))


def affine(
    before: int, after: int, *, scale: float, offset: float, rows: bool, linear: bool = False
) -> Taps:
    """One axis of OpenCV 4's ``warpAffine``, INTER_CUBIC or INTER_LINEAR, with a constant border.

    Sample x that is wanted lies at ``scale * x + offset`` of those that are there. OpenCV rounds
    that to a 1024th, for columns each summand alone, and then to a 32nd (imgproc/src/imgwarp.cpp).
    What a kernel reaches outside has weight zero: the border's share is what lacks to one.
    """
    along = scale * np.arange(after)
    if rows:
        fine = np.rint((along + offset) * _COORDINATE_SCALE)
    else:
        fine = np.rint(along * _COORDINATE_SCALE) + np.rint(offset * _COORDINATE_SCALE)
    position = (fine.astype(np.int64) + _HALF_POSITION) // (_COORDINATE_SCALE // POSITIONS)
    index = position // POSITIONS + (np.arange(2) if linear else np.arange(-1, 3))[:, None]
    inside = (index >= 0) & (index < before)
    after_it = (position % POSITIONS) / POSITIONS
    weight = np.stack((1 - after_it, after_it)) if linear else _cubic(after_it)
    return Taps(index=np.clip(index, 0, before - 1), weight=np.where(inside, weight, 0.0))


def fit_axis(length: int, side: int, *, longest: int) -> tuple[float, float]:
    """The scale and the offset in pixels that centre ``length`` in ``side``, corners unrounded.

    The corners are held in single precision, as by those who hand them to OpenCV's
    ``getAffineTransform`` (CRIS, ETRIS).

    Args:
        length: pixels of this side of the picture.
        side: S of the input.
        longest: the longer side of the picture, which fills the input.
    """
    scaled = length * (side / longest)
    low = (side - scaled) / 2
    first, last = float(np.float32(low)), float(np.float32(scaled + low))
    return (last - first) / length, first


def _centres(before: int, after: int, *, corners: bool) -> npt.NDArray[np.float64]:
    place = np.arange(after, dtype=np.float64)
    if not corners:
        return (place + 0.5) * (before / after) - 0.5
    return place * ((before - 1) / max(after - 1, 1))


def _cubic(fraction: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Weights [4, n] of the neighbours of points a fraction behind the second one (Keys)."""
    distance = np.abs(np.arange(-1, 3)[:, None] - fraction)
    near = ((CUBIC + 2) * distance - (CUBIC + 3)) * distance**2 + 1
    far = ((distance - 5) * distance + 8) * distance * CUBIC - 4 * CUBIC
    return np.where(distance <= 1, near, far)
