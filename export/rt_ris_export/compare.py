"""The numbers of the gate: deviations of tensors and of masks."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from rt_ris.build.limits import (
    PROVING,
    relative_error,
    scale,
    turned_pixels,
    verdict_is_settled,
)
from rt_ris.mask import Mask
from rt_ris_export.parity_record import Deviation, MaskParity

Array = npt.NDArray[Any]
Values = Mapping[str, Array]


def deviation(found: Array, truth: Array) -> Deviation:
    """How far a tensor is from the truth; infinite where either is not finite."""
    relative = relative_error(found, truth)
    if relative == 0.0 or not np.isfinite(relative):
        return Deviation(relative=relative, peak=relative)
    peak = float(np.abs(found.astype(np.float64) - truth.astype(np.float64)).max())
    return Deviation(relative=relative, peak=peak * np.sqrt(truth.size) / scale(truth))


def by_sentence(found: Array, truth: Array) -> tuple[Deviation, ...]:
    """One deviation for each of the N entries of the first axis."""
    return tuple(deviation(a, b) for a, b in zip(found, truth, strict=True))


def compare_masks(
    found: Mask, truth: Mask, *, picture: str, expressions: int, tied: bool, band: float
) -> MaskParity:
    """Compare two answers to one sentence, pixel by pixel, as if the thing existed in both.

    Args:
        found: ours.
        truth: PyTorch's.
        picture: its name.
        expressions: N of the call.
        tied: a score lies at the threshold of a hard decision.
        band: half width of the masks' tie band, in rms of the logits.
    """
    margins = found.margin(), truth.margin()
    near, beyond = turned_pixels(*margins, band=band)
    inside, truly = (margin > 0 for margin in margins)
    union = int((inside | truly).sum())
    coverage = float(truly.mean())
    return MaskParity(
        picture=picture,
        sentence=truth.sentence,
        expressions=expressions,
        pixels=truly.size,
        coverage=coverage,
        proves=PROVING[0] <= coverage <= PROVING[1],
        iou=int((inside & truly).sum()) / union if union else 1.0,
        flips=int(near.sum()),
        flips_outside=int(beyond.sum()),
        existence_differs=found.exists != truth.exists,
        existence_turned=found.exists != truth.exists and _settled(truth),
        tied=tied,
    )


def _settled(mask: Mask) -> bool:
    """Whether the verdict on existence is beyond rounding."""
    threshold = mask.spec.existence_threshold
    if mask.existence is None or threshold is None:
        return True
    return verdict_is_settled(mask.existence, threshold)
