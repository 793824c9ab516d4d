"""Verdicts on whole masks: beside PyTorch's, and beside labels."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rt_ris.build.limits import EXISTENCE_BAND, PROVING
from rt_ris.errors import ParityError
from rt_ris.mask import Mask, Placement
from rt_ris.predictor import masks_of
from rt_ris.session import Segmentation
from rt_ris.spec import EXISTENCE, LOGITS, MaskSpec
from rt_ris_export.compare import Values, compare_masks
from rt_ris_export.limits import Limits
from rt_ris_export.parity_record import LabelParity, MaskParity
from rt_ris_export.truth import Observation
from rt_ris_train.metrics import Metrics


@dataclass(kw_only=True)
class MaskJudge:
    """Compares the masks of one call after the other, then judges them all.

    Args:
        spec: how logits become masks.
        limits: what is allowed.
        labelled: compare both sides with labels, where pictures have some.
    """

    spec: MaskSpec
    limits: Limits
    labelled: bool = True
    masks: list[MaskParity] = field(default_factory=list)
    trained: Metrics = field(default_factory=Metrics)
    exported: Metrics = field(default_factory=Metrics)

    def add(self, seen: Observation, found: Values, *, tied: Iterable[bool]) -> None:
        """Compare the masks of a call.

        Args:
            seen: PyTorch's side.
            found: ours, by tensor.
            tied: for each sentence whether a score lies at a hard decision.
        """
        ours, truth = _masks(seen, found, self.spec), _masks(seen, seen.truth, self.spec)
        for mine, true, tie in zip(ours, truth, tied, strict=True):
            self.masks.append(
                compare_masks(
                    mine,
                    true,
                    picture=seen.sample.name,
                    expressions=len(truth),
                    tied=bool(tie),
                    band=self.limits.mask_band,
                )
            )
        targets = seen.sample.targets if self.labelled else ()
        for target, mine, true in zip(targets, ours, truth, strict=False):  # a call may ask less
            if target is not None:
                self.trained.update(true.margin() > 0, target, absent=False)
                self.exported.update(mine.margin() > 0, target, absent=False)

    def labels(self) -> LabelParity | None:
        """What labels say of both sides; None where the gate's pictures have none."""
        if not self.trained.targeted:
            return None
        return LabelParity(
            sentences=self.trained.targeted,
            trained=_oiou(self.trained),
            exported=_oiou(self.exported),
            limit=self.limits.oiou,
        )

    def judge(self, stage: str) -> None:
        """Refuse wrong masks.

        Args:
            stage: to which they are put down.

        Raises:
            ParityError: a mask differs, a verdict on existence, or oIoU.
        """
        for mask in self.masks:
            _judge(mask, stage, self.limits)
        labels = self.labels()
        if labels is not None and abs(labels.exported - labels.trained) > labels.limit:
            raise ParityError(
                f"oIoU on {labels.sentences} labelled sentences changes from {labels.trained:.2f} "
                f"to {labels.exported:.2f} (limit {labels.limit} points). No bundle was written.",
                stage=stage,
                error=abs(labels.exported - labels.trained),
            )


def _oiou(side: Metrics) -> float:
    found = side.summary()["oIoU"]
    assert found is not None  # some sentence has a target
    return float(found)


def _judge(mask: MaskParity, stage: str, limits: Limits) -> None:
    inside = int(limits.flip_share * mask.pixels)
    outside = int(limits.tied_flips * mask.pixels) if mask.tied else 0
    wrong = mask.proves and mask.iou < limits.mask_iou
    if wrong or mask.flips > inside or mask.flips_outside > outside:
        raise ParityError(
            f"The mask of '{mask.sentence}' on picture '{mask.picture}' differs from "
            f"PyTorch's: IoU {mask.iou:.4f} (limit {limits.mask_iou}), {mask.flips} pixels "
            f"within the tie band (limit {inside}), {mask.flips_outside} beyond it (limit "
            f"{outside}). No bundle was written.",
            stage=stage,
            error=1.0 - mask.iou,
        )
    if mask.existence_turned:
        raise ParityError(
            f"PyTorch and the exported stages disagree on whether '{mask.sentence}' is on "
            f"picture '{mask.picture}', although PyTorch's logit is more than "
            f"{EXISTENCE_BAND} from the threshold. No bundle was written.",
            stage=stage,
            error=1.0,
        )


def judge_proof(observed: Sequence[Observation], spec: MaskSpec) -> None:
    """Refuse a gate in which every mask is nearly empty or nearly full, before any comparison.

    Raises:
        ParityError: naming no stage, as none is wrong.
    """
    shares = [
        float(np.mean(mask.margin() > 0))
        for seen in observed
        for mask in _masks(seen, seen.truth, spec)
    ]
    if not any(PROVING[0] <= share <= PROVING[1] for share in shares):
        raise ParityError(
            f"Nothing was proven: none of PyTorch's {len(shares)} masks on the gate's pictures "
            f"covers {PROVING[0]:.0%} to {PROVING[1]:.0%} of its picture, and empty or full masks "
            "agree whatever is wrong. Export a checkpoint that finds something on them, or give "
            "pictures with things it knows (--gate). No bundle was written."
        )


def _masks(seen: Observation, values: Values, spec: MaskSpec) -> list[Mask]:
    found = Segmentation(logits=values[LOGITS], existence=values.get(EXISTENCE))
    return masks_of(found, placement=Placement.of(seen.prepared), tokens=seen.tokens, spec=spec)
