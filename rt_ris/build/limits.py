"""The limits that both gates share: the exporter's and the one that ``rt-ris verify`` applies.

A *tied* sentence has a score so close to the threshold of a hard decision that rounding decides,
and then two right implementations differ by more than rounding. A tie loosens the limit only from
the stage that decides on, only for a bounded share of the sentences, and never without an end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from rt_ris.errors import BundleError
from rt_ris.manifest import PARITY

PROVING: Final = (0.05, 0.95)
"""Shares of the picture between which a mask proves something: an empty or full one does not."""

TIED_ERROR: Final = 0.25
"""What a tie may do at most, as a relative error: it changes single pixels, not the picture."""

TIED_SHARE: Final = 0.25
"""The most sentences that a tie may excuse at one stage; a real fault shows on most of them."""

TIED_FLIPS: Final = 0.01
"""The most pixels, as a share of the picture, on the other side in the mask of a tied sentence."""

MASK_BAND: Final = 0.1
"""Half width of the band around a mask's threshold within which rounding may turn a pixel, in rms
of the mask's logits; the widest, that of half precision."""

FLIP_SHARE: Final = 0.01
"""The most pixels of a mask, as a share of the picture, that may turn within the band; the same."""

EXISTENCE_BAND: Final = 1.0e-3
"""Half width, in logits, within which a verdict on existence may fall either way."""


@dataclass(frozen=True, kw_only=True)
class Ties:
    """What a bundle's ``parity.json`` says about ties, and about pixels at the threshold.

    Attributes:
        sentences: those with a score in the tie band.
        deciding: ids of the stages that make hard decisions.
        error: the most a tied sentence may be off, as a relative error.
        share: the most sentences, as a share of all, that may need that looser limit.
        flips: the most pixels of a tied sentence's mask, as a share, on the other side.
        band: half width of the masks' band, in rms of a mask's logits.
        flip_share: the most pixels of any mask, as a share, that turn within the band; beyond it
            none may, but for tied sentences.
    """

    sentences: frozenset[str] = frozenset()
    deciding: frozenset[str] = frozenset()
    error: float = TIED_ERROR
    share: float = TIED_SHARE
    flips: float = TIED_FLIPS
    band: float = MASK_BAND
    flip_share: float = FLIP_SHARE


def turned_pixels(
    found: npt.NDArray[np.float32], truth: npt.NDArray[np.float32], *, band: float
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Pixels on the other side of the threshold, bool [H, W]: those within the band, those beyond.

    Args:
        found: a mask's margin, float32 [H, W].
        truth: the margin that it is compared with; the band is about its threshold.
        band: half width, in rms of the truth's margin.
    """
    differs = (found > 0) != (truth > 0)
    near = np.abs(truth) <= band * float(np.sqrt(np.mean(np.square(truth, dtype=np.float64))))
    return differs & near, differs & ~near


def verdict_is_settled(probability: float, threshold: float) -> bool:
    """True if rounding cannot turn a verdict: the existence logit is beyond the band.

    Args:
        probability: of existence, 0..1.
        threshold: strictly between 0 and 1.
    """
    return abs(probability - threshold) > EXISTENCE_BAND * threshold * (1 - threshold)


def read_ties(record: object) -> Ties:
    """Read the part of ``parity.json`` on which readers rely.

    A record may ask for stricter limits than this module's and gets no looser ones.

    Args:
        record: the parsed document.

    Raises:
        BundleError: it breaks the format, or asks for looser limits.
    """
    document = _object(record)
    return Ties(
        sentences=frozenset(_texts(document, "masks", key="sentence", flag="tied")),
        deciding=frozenset(_texts(document, "stages", key="id", flag="decides")),
        error=_limit(document, "tied_error", TIED_ERROR),
        share=_limit(document, "tied_share", TIED_SHARE),
        flips=_limit(document, "tied_flips", TIED_FLIPS),
        band=_limit(document, "mask_band", MASK_BAND),
        flip_share=_limit(document, "flip_share", FLIP_SHARE),
    )


def _texts(document: Mapping[str, object], name: str, *, key: str, flag: str) -> list[str]:
    """The texts of those entries of a list that carry a flag."""
    listed = document.get(name, [])
    if not isinstance(listed, list):
        raise _broken(f"'{name}' is no list")
    texts = []
    for entry in map(_object, listed):
        text, flagged = entry.get(key), entry.get(flag, False)
        if not isinstance(text, str) or not isinstance(flagged, bool):
            raise _broken(
                f"an entry of '{name}' has no text '{key}' or no true or false as '{flag}'"
            )
        if flagged:
            texts.append(text)
    return texts


def _limit(document: Mapping[str, object], name: str, most: float) -> float:
    value = document.get(name, most)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise _broken(f"'{name}' is {value!r}; accepted is 0 to {most}")
    return float(value)


def _object(value: object) -> Mapping[str, object]:
    if not isinstance(value, dict):
        raise _broken(f"{value!r:.40} stands where an object is expected")
    return value


def _broken(what: str) -> BundleError:
    return BundleError(f"{PARITY} breaks its format: {what}. Export the bundle again.")


def relative_error(found: npt.NDArray[Any], truth: npt.NDArray[Any]) -> float:
    """``||found - truth||_2 / scale(truth)``; infinite where either is not finite."""
    a, b = found.astype(np.float64), truth.astype(np.float64)
    if not np.isfinite(a).all() or not np.isfinite(b).all():
        return float("inf")
    difference = float(np.linalg.norm(a - b))
    if difference == 0.0:
        return 0.0
    norm = scale(b)
    return difference / norm if norm else float("inf")


def scale(truth: npt.NDArray[Any]) -> float:
    """``||truth||_2``; at least 1 for a single number, such as a logit that may be near zero."""
    norm = float(np.linalg.norm(truth.astype(np.float64)))
    return max(norm, 1.0) if truth.size == 1 else norm
