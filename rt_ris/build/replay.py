"""Replay a bundle's golden vectors: does this machine compute what PyTorch computed?

``golden.npz`` holds pictures, sentences and PyTorch's values (``docs/bundle.md``). The same gate
applies as when the bundle was made: the relative error ``||a - b||_2 / ||b||_2`` of every tensor,
sentence by sentence, the verdicts on existence, and the IoU of every mask that covers 5 to 95 % of
its picture. Tied sentences are judged too, by the looser limits of ``limits.py``.
"""

from __future__ import annotations

import io
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from rt_ris.backends.base import Array
from rt_ris.build.limits import (
    PROVING,
    Ties,
    read_ties,
    relative_error,
    turned_pixels,
    verdict_is_settled,
)
from rt_ris.bundle import Bundle
from rt_ris.errors import BundleError
from rt_ris.image import Prepared, prepare
from rt_ris.manifest import GOLDEN, PARITY, ParitySummary
from rt_ris.mask import Mask, Placement, sigmoid
from rt_ris.predictor import Predictor, masks_of
from rt_ris.records import parse_json
from rt_ris.session import Segmentation
from rt_ris.spec import (
    EXISTENCE,
    EXPRESSIONS,
    LOGITS,
    PIXELS,
    TOKEN_IDS,
    TOKEN_MASK,
    VALID_BOX,
    Dependency,
)
from rt_ris.text import Tokens, TruncationWarning

PICTURE_STEP: Final = "prepare"
TOKEN_STEP: Final = "tokenizer"
VERDICT_STEP: Final = "verdict"
PIXEL_STEP: Final = "pixels"
MASK_STEP: Final = "mask"
TIED_MASK_STEP: Final = "tied mask"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One comparison.

    Attributes:
        case: number of the picture in ``golden.npz``.
        step: id of the stage, or ``prepare``, ``tokenizer``, ``verdict``, ``pixels``, ``mask``,
            ``tied mask``.
        name: of the tensor, or the sentence, or what was counted.
        error: relative error; for a mask 1 - IoU; for exact steps and what is counted a share.
        limit: the most it may be.
    """

    case: int
    step: str
    name: str
    error: float
    limit: float

    @property
    def passed(self) -> bool:
        """True within the limit; never for NaN."""
        return self.error <= self.limit


@dataclass(frozen=True, kw_only=True)
class Replay:
    """All comparisons, in running order.

    Attributes:
        checks: each comparison.
        tied: sentences that needed the looser limit, because the gate found a score of theirs at
            the threshold of a hard decision.
        flips: pixels over all masks on the other side of the threshold.
    """

    checks: tuple[Check, ...]
    tied: int
    flips: int

    @property
    def first_miss(self) -> Check | None:
        """The first comparison beyond its limit."""
        return next((check for check in self.checks if not check.passed), None)

    def worst(self, *, masks: bool) -> float:
        """The largest error of the masks, or of everything else."""
        errors = (check.error for check in self.checks if (check.step == MASK_STEP) is masks)
        return max(errors, default=0.0)


def replay(bundle: Bundle, predictor: Predictor, *, counts: Sequence[int] = ()) -> Replay:
    """Compare what a predictor computes with a bundle's golden vectors.

    Args:
        bundle: whose vectors.
        predictor: computes.
        counts: also run each picture with so many of its sentences at once, repeated in turn where
            there are fewer; an engine has a profile of its own for 1, for a few and for many.

    Raises:
        BundleError: the bundle has no golden vectors, or they break the format.
    """
    ties = _ties(bundle)
    checks: list[Check] = []
    cases: list[_Case] = []
    for number, stored in enumerate(_cases(bundle)):
        for golden in (stored, *(_with(stored, count, bundle) for count in counts)):
            case = _Case(
                number, golden, predictor=predictor, limits=bundle.manifest.parity, ties=ties
            )
            checks += case.checks()
            cases.append(case)
    checks += _shares(cases, ties)
    return Replay(
        checks=tuple(checks),
        tied=sum(len(set().union(*case.excused.values())) for case in cases),
        flips=sum(case.flips() for case in cases),
    )


class _Case:
    """One picture with N sentences."""

    def __init__(
        self,
        number: int,
        golden: Mapping[str, Array],
        *,
        predictor: Predictor,
        limits: ParitySummary,
        ties: Ties,
    ) -> None:
        self.number, self.golden, self.predictor, self.limits = number, golden, predictor, limits
        self.sentences = [str(sentence) for sentence in golden["sentences"]]
        self.ties = ties
        self.tied = {row for row, text in enumerate(self.sentences) if text in ties.sentences}
        self.excused: dict[str, set[int]] = {}
        own = prepare(golden["picture"], predictor.image)
        self.prepared = Prepared(
            pixels=golden[PIXELS], valid_box=golden[VALID_BOX], box=own.box, size=own.size
        )
        self.own = own
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", TruncationWarning)  # of no interest to who verifies
            self.own_tokens = predictor.tokenizer.encode(self.sentences)
        self.tokens = Tokens(
            sentences=tuple(self.sentences),
            token_ids=golden[TOKEN_IDS],
            token_mask=golden[TOKEN_MASK],
            truncated_after=self.own_tokens.truncated_after,
        )
        self.values = predictor.session.trace(self.prepared, self.tokens)
        self.pairs = list(zip(self._masks(self.values), self._masks(golden), strict=True))
        self.turned = [
            turned_pixels(found.margin(), truth.margin(), band=ties.band)
            for found, truth in self.pairs
        ]

    def checks(self) -> Iterator[Check]:
        """All comparisons, in the order in which things are computed."""
        for step, name, own in (
            (PICTURE_STEP, PIXELS, self.own.pixels),
            (PICTURE_STEP, VALID_BOX, self.own.valid_box),
            (TOKEN_STEP, TOKEN_IDS, self.own_tokens.token_ids),
            (TOKEN_STEP, TOKEN_MASK, self.own_tokens.token_mask),
        ):
            share = _share_that_differs(own, self.golden[name])
            yield Check(case=self.number, step=step, name=name, error=share, limit=0.0)
        yield from self._tensor_checks()
        yield from self._verdict_checks()
        yield from self._mask_checks()
        yield from self._pixel_checks()
        yield from self._tied_mask_checks()

    def flips(self) -> int:
        """Pixels on the other side of the threshold."""
        return sum(int(pixels.sum()) for turned in self.turned for pixels in turned)

    def _tensor_checks(self) -> Iterator[Check]:
        graph = self.predictor.session.graph
        decided = False
        for stage in graph.stages:
            decided |= stage.id in self.ties.deciding
            loose = decided and graph.dependency(stage.id) is Dependency.BOTH
            for spec in stage.outputs:
                if spec.name in self.golden:
                    yield from self._row_checks(stage.id, spec.name, self.tied if loose else set())

    def _row_checks(self, stage: str, name: str, tied: set[int]) -> Iterator[Check]:
        """The worst row within the normal limit or beyond it, then the worst that a tie excuses."""
        found, truth = self.values[name], self.golden[name]
        errors = [relative_error(a, b) for a, b in zip(found, truth, strict=True)]
        limit, looser = self.limits.relative_error_limit, self.ties.error
        excused = {row for row in tied if not errors[row] <= limit}
        normal = max((error for row, error in enumerate(errors) if row not in excused), default=0.0)
        yield Check(case=self.number, step=stage, name=name, error=normal, limit=limit)
        if excused:
            self.excused.setdefault(stage, set()).update(excused)
            error = max(errors[row] for row in excused)
            yield Check(
                case=self.number, step=stage, name=f"{name} (tied)", error=error, limit=looser
            )

    def _verdict_checks(self) -> Iterator[Check]:
        """Verdicts on existence that differ although rounding could not turn them."""
        threshold = self.predictor.mask.existence_threshold
        if threshold is None:
            return
        found, truth = (sigmoid(values[EXISTENCE]) for values in (self.values, self.golden))
        settled = np.array([verdict_is_settled(float(one), threshold) for one in truth])
        share = float((((found >= threshold) != (truth >= threshold)) & settled).mean())
        yield Check(
            case=self.number, step=VERDICT_STEP, name="verdicts turned", error=share, limit=0.0
        )

    def _tied_mask_checks(self) -> Iterator[Check]:
        for row in sorted(self.tied):
            near, beyond = self.turned[row]
            share = float((near | beyond).mean())
            yield Check(
                case=self.number,
                step=TIED_MASK_STEP,
                name=self.sentences[row],
                error=share,
                limit=self.ties.flips,
            )

    def _pixel_checks(self) -> Iterator[Check]:
        """Pixels on the other side of the threshold, within the band around it and beyond."""
        for row, (near, beyond) in enumerate(self.turned):
            most = self.ties.flips if row in self.tied else 0.0
            for where, pixels, limit in (
                ("within", near, self.ties.flip_share),
                ("beyond", beyond, most),
            ):
                yield Check(
                    case=self.number,
                    step=PIXEL_STEP,
                    name=f"{where} the band: {self.sentences[row]}",
                    error=float(pixels.mean()),
                    limit=limit,
                )

    def _mask_checks(self) -> Iterator[Check]:
        for found, truth in self.pairs:
            inside, truly = found.binary, truth.binary
            if PROVING[0] <= truly.mean() <= PROVING[1]:
                iou = int((inside & truly).sum()) / int((inside | truly).sum())
                yield Check(
                    case=self.number,
                    step=MASK_STEP,
                    name=truth.sentence,
                    error=1 - iou,
                    limit=1 - self.limits.mask_iou_limit,
                )

    def _masks(self, values: Mapping[str, Array]) -> list[Mask]:
        """Masks as if each thing existed, so that a verdict near its threshold hides none."""
        found = Segmentation(logits=values[LOGITS], existence=None)
        placement, spec = Placement.of(self.prepared), self.predictor.mask
        return masks_of(found, placement=placement, tokens=self.tokens, spec=spec)


def _cases(bundle: Bundle) -> Sequence[Mapping[str, Array]]:
    if GOLDEN not in bundle.manifest.members:
        raise BundleError(
            f"The bundle {bundle.path} holds no {GOLDEN}; there is nothing to replay."
        )
    cases: dict[int, dict[str, Array]] = {}
    try:
        with np.load(io.BytesIO(bundle.read(GOLDEN)), allow_pickle=False) as stored:
            for key in stored.files:
                number, name = key.split("/", 1)
                cases.setdefault(int(number), {})[name] = stored[key]
    except (ValueError, OSError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"{GOLDEN} breaks its format: {error}. Export the bundle again."
        ) from error
    wanted = {"picture", "sentences", PIXELS, VALID_BOX, TOKEN_IDS, TOKEN_MASK, LOGITS}
    graph = bundle.manifest.graph()
    wanted |= {EXISTENCE} & set(graph.values)
    for number, case in cases.items():
        if wanted - set(case):
            lacking = sorted(wanted - set(case))[0]
            raise BundleError(f"{GOLDEN} lacks '{number}/{lacking}'. Export the bundle again.")
    if not cases:
        raise BundleError(f"{GOLDEN} is empty; there is nothing to replay.")
    return [cases[number] for number in sorted(cases)]


def _with(golden: Mapping[str, Array], count: int, bundle: Bundle) -> Mapping[str, Array]:
    """The same picture with another number of sentences."""
    graph = bundle.manifest.graph()
    names = {TOKEN_IDS, TOKEN_MASK, "sentences"}
    names |= {
        one.name for stage in graph.stages for one in stage.outputs if one.shape[0] == EXPRESSIONS
    }
    rows = np.arange(count) % len(golden["sentences"])
    return {name: array[rows] if name in names else array for name, array in golden.items()}


def _ties(bundle: Bundle) -> Ties:
    """What the bundle says about ties; without a record there are none."""
    if PARITY not in bundle.manifest.members:
        return Ties()
    return read_ties(parse_json(bundle.read(PARITY)))


def _shares(cases: Sequence[_Case], ties: Ties) -> Iterator[Check]:
    """Per stage the share of all sentences that a tie excuses, at the last picture that has one."""
    total = sum(len(case.sentences) for case in cases)
    for stage in dict.fromkeys(stage for case in cases for stage in case.excused):
        with_some = [case for case in cases if stage in case.excused]
        share = sum(len(case.excused[stage]) for case in with_some) / total
        yield Check(
            case=with_some[-1].number,
            step=stage,
            name="share of sentences excused by ties",
            error=share,
            limit=ties.share,
        )


def _share_that_differs(found: Array, truth: Array) -> float:
    if found.shape != truth.shape or found.dtype != truth.dtype:
        return 1.0
    return float((found != truth).mean())
