"""What the gate measured, as it is written to ``parity.json``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rt_ris.bundle import Bundle
from rt_ris.manifest import PARITY, ParitySummary
from rt_ris.records import from_data, parse_json


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """How far a tensor a is from PyTorch's b.

    Attributes:
        relative: ||a - b||_2 / ||b||_2, the number that the gate looks at.
        peak: max|a - b| / rms(b).
    """

    relative: float
    peak: float


@dataclass(frozen=True, kw_only=True)
class TensorParity:
    """The worst deviations of one stage output over all samples.

    Attributes:
        name: of the tensor.
        isolated: the stage fed with PyTorch's own activations.
        chained: the stage fed with what the exported stages before it made, from pixels on.
    """

    name: str
    isolated: Deviation
    chained: Deviation


@dataclass(frozen=True, kw_only=True)
class StageParity:
    """One stage; samples counted in ``tied`` are not among its tensors' worst deviations.

    Attributes:
        id: of the stage.
        tensors: its outputs.
        decides: it makes hard decisions, so that a tied sentence may differ from here on.
        tied: samples whose deviation is beyond the limit and explained by a score at a hard
            decision, here or in an earlier stage.
    """

    id: str
    tensors: tuple[TensorParity, ...]
    decides: bool
    tied: int


@dataclass(frozen=True, kw_only=True)
class MaskParity:
    """One final mask at the picture's own size.

    Attributes:
        picture: name of the gate's picture.
        sentence: what was asked.
        expressions: N of the call.
        pixels: of the picture.
        coverage: share of the picture that PyTorch's mask covers, before the existence decision.
        proves: whether the coverage is one at which a comparison means something.
        iou: of the two masks; 1 if both are empty.
        flips: pixels that differ and lie within the tie band of the threshold.
        flips_outside: pixels that differ and lie beyond it.
        existence_differs: the two sides disagree on whether the thing is there.
        existence_turned: they do although PyTorch's logit is beyond the band around the threshold.
        tied: a score lies at the threshold of a hard decision inside a stage, so that another
            machine may decide otherwise and its tensors differ, whether or not they do here.
    """

    picture: str
    sentence: str
    expressions: int
    pixels: int
    coverage: float
    proves: bool
    iou: float
    flips: int
    flips_outside: int
    existence_differs: bool
    existence_turned: bool
    tied: bool


@dataclass(frozen=True, kw_only=True)
class LabelParity:
    """Both sides beside labels, where the gate's pictures have some.

    Attributes:
        sentences: that have a labelled target; one that was asked in two calls counts twice.
        trained: oIoU of PyTorch's masks, 0..100.
        exported: of ours.
        limit: points by which the two may differ.
    """

    sentences: int
    trained: float
    exported: float
    limit: float


@dataclass(frozen=True, kw_only=True)
class ParityRecord:
    """The gate's whole record.

    Attributes:
        alone: limit on relative deviations of stages alone.
        tolerance: limit on relative deviations along the chain.
        mask_iou_limit: limit on the IoU of masks that prove something.
        mask_band: half width of the masks' tie band, in rms of the mask's logits.
        tie_band: the same for hard decisions inside stages, in rms of their scores.
        existence_band: half width of the band around the existence threshold, in logits.
        flip_share: the most flips, as a share of a picture's pixels.
        tied_error: limit on the relative deviations of tied sentences.
        tied_share: the most samples that ties may excuse at one stage, as a share.
        tied_flips: the most ``flips_outside`` of a tied sentence, as a share of its pixels.
        seeded: the weights are random ones; then the logits count and the masks prove little.
        proving: number of masks that prove something.
        remedies: what a ladder has done to stages that missed.
        plain: the stages in exact arithmetic, where halves do not round; empty for a float32
            export.
        stages: in running order.
        masks: in the gate's order.
        labels: both sides beside labels; None where the gate's pictures have none.
    """

    alone: float
    tolerance: float
    mask_iou_limit: float
    mask_band: float
    tie_band: float
    existence_band: float
    flip_share: float
    tied_error: float
    tied_share: float
    tied_flips: float
    seeded: bool
    proving: int
    stages: tuple[StageParity, ...]
    masks: tuple[MaskParity, ...]
    remedies: tuple[str, ...] = ()
    plain: tuple[StageParity, ...] = ()
    labels: LabelParity | None = None

    def summary(self) -> ParitySummary:
        """The numbers that go into the manifest."""
        deviations = [
            max(tensor.isolated.relative, tensor.chained.relative)
            for stage in self.stages
            for tensor in stage.tensors
        ]
        return ParitySummary(
            relative_error_limit=self.tolerance,
            mask_iou_limit=self.mask_iou_limit,
            relative_error=max(deviations),
            mask_iou=min(mask.iou for mask in self.telling_masks()),
            flips=sum(mask.flips + mask.flips_outside for mask in self.masks),
            cases=len(self.masks),
        )

    def telling_masks(self) -> tuple[MaskParity, ...]:
        """The masks that prove something, or all if none does."""
        return tuple(mask for mask in self.masks if mask.proves) or self.masks


def read_record(bundle: Path) -> ParityRecord:
    """The record in a bundle.

    Raises:
        BundleError: there is no such bundle, or it is damaged.
    """
    return from_data(ParityRecord, parse_json(Bundle.open(bundle).read(PARITY)))


def worst(deviations: Iterable[Deviation]) -> Deviation:
    """The largest of each number; zeros if there are none."""
    listed = list(deviations)
    return Deviation(
        relative=max((entry.relative for entry in listed), default=0.0),
        peak=max((entry.peak for entry in listed), default=0.0),
    )
