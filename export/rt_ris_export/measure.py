"""The comparison: what exported stages and masks are beside what a network computes."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from rt_ris.backends import open_backend
from rt_ris.backends.base import Runner
from rt_ris.build.limits import EXISTENCE_BAND
from rt_ris.errors import ParityError
from rt_ris.manifest import StageArtefact
from rt_ris.records import to_data
from rt_ris.spec import (
    PIXELS,
    TOKEN_IDS,
    TOKEN_MASK,
    VALID_BOX,
    Dependency,
    StageSpec,
    TargetSpec,
)
from rt_ris_export import onnx_graph
from rt_ris_export.compare import Array, Values, by_sentence, deviation
from rt_ris_export.golden import GoldenCase
from rt_ris_export.half import PRODUCTS
from rt_ris_export.judge import MaskJudge
from rt_ris_export.limits import Limits
from rt_ris_export.parity_record import (
    Deviation,
    ParityRecord,
    StageParity,
    TensorParity,
    worst,
)
from rt_ris_export.rounding import Range, RoundingRunner
from rt_ris_export.ties import Opener, TieFinder, typed
from rt_ris_export.truth import Observation, counted
from rt_ris_export.widened import check_tables
from rt_ris_train.architecture import ReferringNetwork

_EXTERNAL: Final = frozenset({PIXELS, VALID_BOX, TOKEN_IDS, TOKEN_MASK})

Flags = npt.NDArray[np.bool_]


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
    seeded: bool = True,
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
        seeded: the weights are random ones, whose masks labels say nothing about.
        say: takes messages about progress.

    Returns:
        The record, the inputs and PyTorch's answers for each picture, and the ranges of halves.

    Raises:
        ParityError: a stage or a mask differs; ``stage`` is the first one.
    """
    runs = tuple(map(_Run.of, observed))
    stages: list[StageParity] = []
    ranges: dict[str, Sequence[Range]] = {}
    judge = MaskJudge(spec=network.mask, limits=limits, labelled=not seeded)
    with _told(stages, ranges):
        for traced in network.stages():
            say(f"comparing {traced.spec.id}")
            spec = traced.spec if specs is None else specs[traced.spec.id]
            before = [stage for stage in stages if stage.id not in settled]
            model = onnx_graph.load(graphs[spec.id])
            check_tables(model, traced.module)
            with _StageGate(
                spec,
                model,
                cause=loosest(before) if before else spec.id,
                of_image=network.graph().dependency(spec.id) is Dependency.IMAGE,
                limits=limits,
                opened=opened or _open,
            ) as gate:
                stages.append(gate.measure(runs))
                ranges[spec.id] = gate.ranges()
        for run in runs:
            judge.add(run, run.chained, tied=run.tied | run.excused)
        judge.judge(loosest(stages, settled))
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
        proving=sum(mask.proves for mask in judge.masks),
        stages=tuple(stages),
        masks=tuple(judge.masks),
        labels=judge.labels(),
    )
    golden = tuple(_golden(run) for run in runs if len(run.tokens.sentences) > 1)
    return Measured(record=record, golden=golden, ranges=ranges)


@contextmanager
def _told(stages: Sequence[StageParity], ranges: Mapping[str, Sequence[Range]]) -> Iterator[None]:
    """A miss carries what was measured until then."""
    try:
        yield
    except ParityError as error:
        error.measured = {"stages": to_data(stages), "ranges": to_data(ranges)}
        raise


class _StageGate:
    """One exported stage, open, beside the truth.

    Args:
        spec: its declaration.
        model: its graph.
        cause: to which stage a miss is put down that shows along the chain alone: what this one
            adds by itself has been within the limit then.
        of_image: it depends on nothing but the picture.
        limits: what is allowed.
        opened: opens a graph.
    """

    def __init__(
        self,
        spec: StageSpec,
        model: ModelProto,
        *,
        cause: str,
        of_image: bool,
        limits: Limits,
        opened: Opener,
    ) -> None:
        self.spec, self.limits = spec, limits
        self.cause, self.of_image = cause, of_image
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
            cause=self.spec.id if alone else self.cause,
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


def loosest(stages: Sequence[StageParity], settled: Collection[str] = ()) -> str:
    """The stage with the largest error of its own, to which a wrong mask is put down.

    Args:
        stages: what was measured.
        settled: ids of those that no remedy is left for, which count only where all are.
    """
    own = {stage.id: max(tensor.isolated.relative for tensor in stage.tensors) for stage in stages}
    return max([name for name in own if name not in settled] or own, key=own.__getitem__)


def _golden(run: _Run) -> GoldenCase:
    return GoldenCase(picture=run.sample.picture, tokens=run.tokens, values=run.truth)
