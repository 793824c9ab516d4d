"""The gate: what was exported must compute what PyTorch computes, from uint8 pixels on."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from rt_ris.backends import open_backend
from rt_ris.backends.base import Runner
from rt_ris.build.limits import EXISTENCE_BAND, PROVING
from rt_ris.errors import ParityError
from rt_ris.manifest import StageArtefact
from rt_ris.mask import Mask, Placement
from rt_ris.predictor import masks_of
from rt_ris.session import Segmentation
from rt_ris.spec import (
    EXISTENCE,
    LOGITS,
    PIXELS,
    TOKEN_IDS,
    TOKEN_MASK,
    VALID_BOX,
    Dependency,
    MaskSpec,
    StageSpec,
    TargetSpec,
)
from rt_ris_export import onnx_graph
from rt_ris_export.artefacts import GOLDEN, GRAPHS, NETWORK, PARITY
from rt_ris_export.compare import by_sentence, compare_masks, deviation
from rt_ris_export.gate_data import GateSample, samples_of, shipped_samples
from rt_ris_export.golden import GoldenCase, pack_golden
from rt_ris_export.half import PRODUCTS
from rt_ris_export.limits import LIMITS, Limits
from rt_ris_export.parity_record import (
    Deviation,
    MaskParity,
    ParityRecord,
    StageParity,
    TensorParity,
    worst,
)
from rt_ris_export.recipe import ExportRecipe
from rt_ris_export.rounding import RANGES, Range, RememberingRunner, RoundingRunner
from rt_ris_export.step import Context, Step
from rt_ris_export.steps.precision import TYPED
from rt_ris_export.third_party import check_conventions
from rt_ris_export.ties import Opener, TieFinder, typed
from rt_ris_export.truth import Observation, counted, observe
from rt_ris_train.architecture import ReferringNetwork

PLAIN_PICTURES: Final = 2
"""Pictures on which graphs are compared before they are narrowed; those narrowed see them all."""

_EXTERNAL: Final = frozenset({PIXELS, VALID_BOX, TOKEN_IDS, TOKEN_MASK})

Array = npt.NDArray[Any]
Flags = npt.NDArray[np.bool_]
Values = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True, eq=False)
class _Run(Observation):
    """The same call on the exported side.

    Attributes:
        chained: what the exported stages have computed so far, from pixels on.
        excused: bool [N], sentences that missed because of a tie.
        tied: bool [N], sentences with a score at a hard decision.
    """

    chained: dict[str, Array]
    excused: Flags
    tied: Flags

    @classmethod
    def of(cls, seen: Observation) -> _Run:
        """A run that begins."""
        count = len(seen.tokens.sentences)
        return cls(
            sample=seen.sample,
            prepared=seen.prepared,
            tokens=seen.tokens,
            truth=seen.truth,
            chained={name: seen.truth[name] for name in _EXTERNAL},
            excused=np.zeros(count, dtype=np.bool_),
            tied=np.zeros(count, dtype=np.bool_),
        )

    @property
    def label(self) -> str:
        return f"picture '{self.sample.name}' with {counted(len(self.tokens.sentences))}"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """What the gate found.

    Attributes:
        record: the comparison.
        golden: inputs and PyTorch's answers for each picture.
        ranges: of every half tensor, by stage id.
    """

    record: ParityRecord
    golden: tuple[GoldenCase, ...]
    ranges: Mapping[str, Sequence[Range]]


def measure(
    network: ReferringNetwork,
    graphs: Mapping[str, Path],
    *,
    observed: Sequence[Observation],
    limits: Limits,
    specs: Mapping[str, StageSpec] | None = None,
    opened: Opener | None = None,
    settled: Collection[str] = (),
    seeded: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> Measured:
    """Compare exported stages and masks with a network.

    Every stage is fed once with PyTorch's activations and once with what the exported stages
    before it made. One stage is open at a time, which bounds the memory.

    Args:
        network: the truth, in evaluation mode.
        graphs: ONNX files by stage id.
        observed: what the network makes of pictures and sentences.
        limits: what is allowed.
        specs: declarations of the graphs by stage id, where they are not the network's own.
        opened: opens a graph to run it; None takes ONNX Runtime.
        settled: ids of stages that no remedy is left for; while there are others, a wrong mask is
            put down to one of those.
        seeded: the weights are random, so that no mask need prove anything.
        say: takes messages about progress.

    Returns:
        The record, the inputs and PyTorch's answers for each picture, and the ranges of halves.

    Raises:
        ParityError: a stage or a mask differs, or no mask proves anything; ``stage`` is the first
            one.
    """
    runs = tuple(map(_Run.of, observed))
    stages = []
    ranges: dict[str, Sequence[Range]] = {}
    for plain in network.graph().stages:
        say(f"comparing {plain.id}")
        spec = plain if specs is None else specs[plain.id]
        model = onnx_graph.load(graphs[spec.id])
        with _StageGate(
            spec, model, network=network, limits=limits, opened=opened or _open
        ) as gate:
            stages.append(gate.measure(runs))
            ranges[spec.id] = gate.ranges()
    masks = tuple(
        mask for run in runs for mask in _compared_masks(run, network.mask, limits.mask_band)
    )
    _judge_masks(masks, loosest(stages, settled), limits)
    if not seeded:
        _judge_proof(masks, stages[-1].id)
    record = ParityRecord(
        alone=limits.alone,
        tolerance=limits.tolerance,
        mask_iou_limit=limits.mask_iou,
        mask_band=limits.mask_band,
        tie_band=limits.tie_band,
        existence_band=EXISTENCE_BAND,
        flip_share=limits.flip_share,
        tied_error=limits.tied_error,
        tied_share=limits.tied_share,
        tied_flips=limits.tied_flips,
        seeded=seeded,
        proving=sum(mask.proves for mask in masks),
        stages=tuple(stages),
        masks=masks,
    )
    golden = tuple(_golden(run) for run in runs if len(run.tokens.sentences) > 1)
    return Measured(record=record, golden=golden, ranges=ranges)


class _StageGate:
    """One exported stage, open, beside the truth."""

    def __init__(
        self,
        spec: StageSpec,
        model: ModelProto,
        *,
        network: ReferringNetwork,
        limits: Limits,
        opened: Opener,
    ) -> None:
        self.spec, self.limits = spec, limits
        self.of_image = network.graph().dependency(spec.id) is Dependency.IMAGE
        self.finder = TieFinder(spec=spec, model=model, opened=opened, band=limits.tie_band)
        self.runner = opened(spec, model)

    def __enter__(self) -> _StageGate:
        return self

    def __exit__(self, *_: object) -> None:
        self.runner.close()
        self.finder.close()

    def ranges(self) -> Sequence[Range]:
        """Of every half tensor, where the executor looks at them."""
        return self.runner.ranges if isinstance(self.runner, RoundingRunner) else ()

    def measure(self, runs: Sequence[_Run]) -> StageParity:
        """Run the stage on everything, extend the chains, and judge.

        Raises:
            ParityError: an output differs.
        """
        measured: dict[str, list[tuple[Deviation, Deviation]]] = {}
        for run, isolated in self._outputs(runs):
            if self.finder.decides:
                np.logical_or(run.tied, self.finder.tied(run.chained), out=run.tied)
            for tensor in self.spec.outputs:
                name = tensor.name
                alone = self._judge(run, name, isolated[name], inputs=run.truth)
                after = self._judge(run, name, run.chained[name], inputs=run.chained)
                measured.setdefault(name, []).append((alone, after))
        tensors = tuple(
            TensorParity(
                name=name,
                isolated=worst(pair[0] for pair in pairs),
                chained=worst(pair[1] for pair in pairs),
            )
            for name, pairs in measured.items()
        )
        return StageParity(
            id=self.spec.id,
            tensors=tensors,
            decides=self.finder.decides,
            tied=self._excused(runs),
        )

    def _outputs(self, runs: Sequence[_Run]) -> Iterator[tuple[_Run, Values]]:
        """Extend each run's chain; give what the stage makes of PyTorch's activations.

        A stage that reads nothing but pictures is not run again for the same picture.
        """
        made = {name for run in runs for name in run.chained if name not in _EXTERNAL}
        first = not made.intersection(tensor.name for tensor in self.spec.inputs)
        known: dict[str, tuple[Values, Values]] = {}
        for run in runs:
            if run.sample.name not in known or not self.of_image:
                made_here = self._run(run.chained)
                alone = made_here if first else self._run(run.truth)
                known[run.sample.name] = (made_here, alone)
            chained, isolated = known[run.sample.name]
            run.chained.update(chained)
            yield run, isolated

    def _run(self, inputs: Values) -> Values:
        """The stage's outputs; copied, as ONNX Runtime's own keep all of a session's memory."""
        made = self.runner.run(typed(inputs, self.spec))
        return {name: array.copy() for name, array in made.items()}

    def _judge(self, run: _Run, name: str, found: Array, *, inputs: Values) -> Deviation:
        """The worst deviation over what no tie excuses; a miss that none excuses is an error."""
        truth, tolerance = run.truth[name], self._limit(inputs is run.truth)
        rows = (deviation(found, truth),) if self.of_image else by_sentence(found, truth)
        missed = np.array([row.relative > tolerance for row in rows])
        if not missed.any():
            return worst(rows)
        excuse = self._excuse(run, inputs)
        for row, excused in zip(rows, excuse, strict=True):
            if row.relative > tolerance and not (
                excused and row.relative <= self.limits.tied_error
            ):
                raise self._error(run, name, row, alone=inputs is run.truth)
        np.logical_or(run.excused, missed, out=run.excused)
        return worst(row for row, miss in zip(rows, missed, strict=True) if not miss)

    def _limit(self, alone: bool) -> float:
        return self.limits.alone if alone else self.limits.tolerance

    def _excuse(self, run: _Run, inputs: Values) -> Flags:
        """Where a miss may come from a tie, here or, along the chain, in an earlier stage."""
        if self.of_image:
            return np.zeros(1, dtype=np.bool_)
        tied = self.finder.tied(inputs)
        return tied | run.excused if inputs is run.chained else tied

    def _excused(self, runs: Sequence[_Run]) -> int:
        excused = sum(int(run.excused.sum()) for run in runs)
        total = sum(len(run.excused) for run in runs)
        share = self.limits.tied_share
        if excused > share * total:
            raise ParityError(
                f"Stage '{self.spec.id}' differs from PyTorch on {excused} of {total} samples. "
                f"Scores at the threshold of a hard decision explain at most {share:.0%}.",
                stage=self.spec.id,
            )
        return excused

    def _error(self, run: _Run, name: str, row: Deviation, *, alone: bool) -> ParityError:
        fed = "PyTorch's activations" if alone else "the exported stages before it"
        return ParityError(
            f"Stage '{self.spec.id}' differs from PyTorch: relative error {row.relative:.2e} of "
            f"'{name}' (limit {self._limit(alone):.0e}, largest single difference "
            f"{row.peak:.1e} rms), {run.label}, fed by {fed}.{_overflow(self.ranges())} No bundle "
            "was written.",
            stage=self.spec.id,
            error=row.relative,
        )


def _overflow(ranges: Sequence[Range]) -> str:
    """Where halves first became no number, or infinite in a product; a mask's -inf is no fault."""
    for found in ranges:
        if found.nan or (found.infinite and found.node in PRODUCTS):
            return (
                f" Values left the range of float16 first in '{found.tensor}' ({found.node}): "
                f"{found.infinite} infinite, {found.nan} no number."
            )
    return ""


def _open(spec: StageSpec, model: ModelProto) -> Runner:
    artefact = StageArtefact(
        spec=spec, file=f"{spec.id}.onnx", target=TargetSpec(), multiply_adds=0, parameters=0
    )
    written = onnx_graph.serialise(model)
    return open_backend("onnxruntime").open_stage(
        artefact, written.graph, data=written.data, threads=None
    )


def _compared_masks(run: _Run, spec: MaskSpec, band: float) -> list[MaskParity]:
    found, truth = (_masks(run, values, spec) for values in (run.chained, run.truth))
    return [
        compare_masks(
            a, b, picture=run.sample.name, expressions=len(truth), tied=bool(tied), band=band
        )
        for a, b, tied in zip(found, truth, run.tied | run.excused, strict=True)
    ]


def _masks(run: _Run, values: Values, spec: MaskSpec) -> list[Mask]:
    found = Segmentation(logits=values[LOGITS], existence=values.get(EXISTENCE))
    return masks_of(found, placement=Placement.of(run.prepared), tokens=run.tokens, spec=spec)


def loosest(stages: Sequence[StageParity], settled: Collection[str] = ()) -> str:
    """The stage with the largest error of its own, to which a wrong mask is put down.

    Args:
        stages: what was measured.
        settled: ids of those that no remedy is left for, which count only where all are.
    """
    own = {stage.id: max(tensor.isolated.relative for tensor in stage.tensors) for stage in stages}
    return max([name for name in own if name not in settled] or own, key=own.__getitem__)


def _judge_masks(masks: Sequence[MaskParity], stage: str, limits: Limits) -> None:
    for mask in masks:
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


def _judge_proof(masks: Sequence[MaskParity], stage: str) -> None:
    """Refuse a gate in which every mask is nearly empty or nearly full."""
    if not any(mask.proves for mask in masks):
        raise ParityError(
            f"Nothing was proven: none of PyTorch's {len(masks)} masks on the gate's pictures "
            f"covers {PROVING[0]:.0%} to {PROVING[1]:.0%} of its picture, and empty or full masks "
            "agree whatever is wrong. Export a checkpoint that finds something on them, or add a "
            "picture with things it knows to the gate. No bundle was written.",
            stage=stage,
        )


def _golden(run: _Run) -> GoldenCase:
    return GoldenCase(picture=run.sample.picture, tokens=run.tokens, values=run.truth)


def _samples(recipe: ExportRecipe) -> tuple[GateSample, ...]:
    if recipe.gate is None:
        return shipped_samples()
    return samples_of(recipe.gate, split=recipe.gate_split)


def _run(context: Context) -> None:
    recipe, loaded = context.recipe, context.artefacts.get(NETWORK)
    context.say("pictures and masks, beside what others make of them")
    check_conventions()
    graphs = context.artefacts.get(TYPED)
    observed = observe(loaded.network, _samples(recipe), say=context.say)
    plain: tuple[StageParity, ...] = ()
    if recipe.precision == "fp16":
        context.say("the float32 graphs first: a fault there is none of half precision")
        first = measure(
            loaded.network,
            context.artefacts.get(GRAPHS),
            observed=observed[: 2 * PLAIN_PICTURES],  # two calls on each picture
            limits=LIMITS["fp32"],
            seeded=True,  # whether masks prove something is asked of what ships
            say=context.say,
        )
        plain = first.record.stages
    rounding = partial(RememberingRunner, memory={})
    while True:
        try:
            measured = measure(
                loaded.network,
                graphs.files,
                observed=observed,
                limits=recipe.limits(),
                specs=graphs.specs,
                opened=rounding if recipe.precision == "fp16" else None,
                settled=graphs.settled(),
                seeded=loaded.seeded,
                say=context.say,
            )
            break
        except ParityError as error:
            if recipe.remedy == "none" or not graphs.climb(error.stage):
                raise _advised(error, recipe, graphs.steps) from error
            context.say(f"{error} Remedy: {graphs.steps[-1]}")
    context.artefacts.put(
        PARITY, replace(measured.record, remedies=tuple(graphs.steps), plain=plain)
    )
    context.artefacts.put(GOLDEN, pack_golden(measured.golden))
    context.artefacts.put(RANGES, measured.ranges)


def _advised(error: ParityError, recipe: ExportRecipe, tried: Sequence[str]) -> ParityError:
    """A miss with what may help, or what was tried."""
    if recipe.precision == "fp32":
        return error
    advice = "--remedy auto computes more of it in float32, --precision fp32 all."
    if recipe.remedy == "auto":
        advice = f"Tried: {'; '.join(tried) or 'nothing that would help'}. Use --precision fp32."
    return ParityError(f"{error} {advice}", stage=error.stage, error=error.error)


PARITY_GATE = Step(
    name="parity", needs=(NETWORK, GRAPHS, TYPED), makes=(PARITY, GOLDEN, RANGES), run=_run
)
