"""Measures of referring segmentation, accumulated over sentences in exact integers.

oIoU, mIoU and Pr@X count the sentences that have a target (LAVT, DMMI); a sentence without one
counts in no-target accuracy. gIoU and cIoU follow gRefCOCO's evaluator (ReLA). In points of 100.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import fsum
from typing import Final

import numpy as np
import numpy.typing as npt

Bool = npt.NDArray[np.bool_]
PRECISION_AT: Final = (0.5, 0.6, 0.7, 0.8, 0.9)


@dataclass(kw_only=True)
class Metrics:
    """Counts of one group of sentences; ``update`` adds a sentence, ``summary`` reads them."""

    sentences: int = 0
    targeted: int = 0
    absent: int = 0
    intersection: int = 0
    union: int = 0
    ious: list[float] = field(default_factory=list)
    generous_intersection: int = 0
    generous_union: int = 0
    rejected_absent: int = 0
    accepted_targeted: int = 0

    def update(
        self, predicted: Bool, target: Bool, *, absent: bool, rejected: bool = False
    ) -> None:
        """Add one sentence.

        Args:
            predicted: bool [H, W]; no true pixel means "there is no such thing".
            target: bool [H, W]. It may be without a true pixel although the sentence has a target,
                as a thin one is on a small grid; the sentence's IoU is then 0.
            absent: the sentence has no target.
            rejected: "there is no such thing" was decided although the mask has true pixels. The
                mask then counts as empty, except in the union of cIoU (ReLA).
        """
        intersection = int(np.count_nonzero(predicted & target))
        union = int(np.count_nonzero(predicted | target))
        found = bool(predicted.any()) and not rejected
        self.sentences += 1
        if absent:
            self.absent += 1
            self.rejected_absent += not found
            self.generous_union += union if found else 0
            return
        self.targeted += 1
        self.accepted_targeted += found
        self.generous_union += union
        if not found:
            intersection, union = 0, int(np.count_nonzero(target))
        self.generous_intersection += intersection
        self.intersection += intersection
        self.union += union
        self.ious.append(intersection / union if union else 0.0)

    def add(self, other: Metrics) -> None:
        """Add the sentences of another group; their order does not matter, to the last digit."""
        for counted in fields(self):
            mine, theirs = getattr(self, counted.name), getattr(other, counted.name)
            setattr(self, counted.name, mine + theirs)

    def summary(self, *, strict: bool = False) -> dict[str, float | int | None]:
        """Measures in points of 100; None where no sentence of the kind was seen.

        Args:
            strict: Pr@X counts sentences above X (ETRIS, CRIS, PhraseCut), not at X and above it
                (LAVT, DMMI, ReLA).
        """
        reach = operator.gt if strict else operator.ge
        precision = {
            f"Pr@{bound}": _percent(sum(reach(iou, bound) for iou in self.ious), self.targeted)
            for bound in PRECISION_AT
        }
        return {
            "sentences": self.sentences,
            "targeted": self.targeted,
            "no_target": self.absent,
            "oIoU": _percent(self.intersection, self.union if self.targeted else 0),
            "mIoU": _percent(fsum(self.ious), self.targeted),
            **precision,
            "gIoU": _percent(fsum((*self.ious, self.rejected_absent)), self.sentences),
            "cIoU": _percent(self.generous_intersection, self.generous_union),
            "N_acc": _percent(self.rejected_absent, self.absent),
            "T_acc": _percent(self.accepted_targeted, self.targeted),
        }


def _percent(part: float, whole: float) -> float | None:
    return 100.0 * part / whole if whole else None


class MetricsByKind:
    """The measures over all sentences and for each kind of sentence."""

    def __init__(self) -> None:
        self.overall = Metrics()
        self.kinds: dict[str, Metrics] = {}

    def update(
        self,
        predicted: Bool,
        target: Bool,
        *,
        absent: bool,
        rejected: bool = False,
        kind: str | None = None,
    ) -> None:
        """Add one sentence, as ``Metrics.update`` takes it."""
        groups = [self.overall]
        if kind is not None:
            groups.append(self.kinds.setdefault(kind, Metrics()))
        for group in groups:
            group.update(predicted, target, absent=absent, rejected=rejected)

    def add(self, other: MetricsByKind) -> None:
        """Add the sentences that another has counted."""
        self.overall.add(other.overall)
        for kind, metrics in other.kinds.items():
            self.kinds.setdefault(kind, Metrics()).add(metrics)

    def summary(
        self, *, strict: bool = False
    ) -> dict[str, float | int | Mapping[str, object] | None]:
        """The overall measures, and under ``kinds`` those of each kind, by name."""
        kinds = {name: self.kinds[name].summary(strict=strict) for name in sorted(self.kinds)}
        return {**self.overall.summary(strict=strict), "kinds": kinds}
