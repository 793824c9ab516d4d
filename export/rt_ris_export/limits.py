"""What the gate allows, by the precision of the arithmetic."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from rt_ris.build.limits import FLIP_SHARE, MASK_BAND, TIED_ERROR, TIED_FLIPS, TIED_SHARE


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The gate's limits.

    Attributes:
        alone: relative error of a stage output, the stage fed with PyTorch's activations.
        tolerance: the same, the stage fed with what the exported stages before it made.
        mask_iou: of masks that prove something.
        mask_band: half width of the masks' tie band, in rms of the mask's logits.
        tie_band: half width within which rounding may turn a hard decision, in rms of its scores.
        flip_share: the most pixels of a mask, as a share of the picture, that may flip inside the
            tie band.
        oiou: points of 100 by which oIoU on labelled sentences may change.
        tied_error: relative error of what a tie excuses.
        tied_share: the most samples that ties may excuse at one stage.
        tied_flips: the most pixels of a tied sentence, as a share, beyond the masks' band.
    """

    alone: float
    tolerance: float
    mask_iou: float
    mask_band: float
    tie_band: float
    flip_share: float
    oiou: float
    tied_error: float = TIED_ERROR
    tied_share: float = TIED_SHARE
    tied_flips: float = TIED_FLIPS


LIMITS: Final[Mapping[str, Limits]] = {
    # Graphs stay near 1e-6; the tie band is some ten times what float32 rounds off.
    "fp32": Limits(
        alone=1.0e-4,
        tolerance=1.0e-4,
        mask_iou=0.99,
        mask_band=1.0e-3,
        tie_band=1.0e-5,
        flip_share=1.0e-3,
        oiou=0.1,
    ),
    # A half has three digits, 5e-4 a rounding; deep stages stay near 1e-3. Where a mean is taken
    # off what hardly varies, as DMMI's instance norms do with random weights, a digit is lost at
    # each: 1.5e-2 alone, the worst of the five toy sizes. Faults of the graph itself were found
    # before, by the gate of float32.
    "fp16": Limits(
        alone=3.0e-2,
        tolerance=1.0e-1,
        mask_iou=0.98,
        mask_band=MASK_BAND,
        tie_band=2.0e-3,
        flip_share=FLIP_SHARE,
        oiou=0.5,
    ),
}
