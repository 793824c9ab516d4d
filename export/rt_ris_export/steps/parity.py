"""The gate: what was exported must compute what PyTorch computes, from uint8 pixels on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from rt_ris_train.architecture import ReferringNetwork

from rt_ris.backends import open_backend
from rt_ris.backends.base import Runner
from rt_ris.errors import ParityError
from rt_ris.image import Prepared, prepare
from rt_ris.manifest import StageArtefact
from rt_ris.mask import Mask, Placement, sigmoid
from rt_ris.session import Session, open_runners
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
from rt_ris.text import Tokenizer, Tokens
from rt_ris_export import onnx_graph
from rt_ris_export.artefacts import GOLDEN, GRAPHS, NETWORK, PARITY
from rt_ris_export.compare import MASK_BAND, by_sentence, compare_masks, deviation
from rt_ris_export.gate_data import GateSample, shipped_samples
from rt_ris_export.golden import GoldenCase, pack_golden
from rt_ris_export.parity_record import (
    Deviation,
    MaskParity,
    ParityRecord,
    StageParity,
    TensorParity,
    worst,
)
from rt_ris_export.step import Context, Step
from rt_ris_export.ties import TIE_BAND, TieFinder
from rt_ris_export.truth import activations

MASK_IOU_LIMIT: Final = 0.99
"""For masks that prove something; ties may still flip a pixel in a hundred."""

TIED_SHARE: Final = 0.25
"""The most samples that a tie may excuse at one stage; a real fault shows on most of them."""

TIED_ERROR: Final = 0.25
"""What a tie may do at most, as a relative error: it changes single pixels, not the picture."""

Array = npt.NDArray[Any]
Values = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One call on one picture with N sentences, on both sides."""

    sample: GateSample
    prepared: Prepared
    tokens: Tokens
    truth: Values
    chained: Values

    @property
    def label(self) -> str:
        count = len(self.tokens.sentences)
        return f"picture '{self.sample.name}' with {count} sentence{'s' if count > 1 else ''}"

    @property
    def placement(self) -> Placement:
        side = self.prepared.pixels.shape[1]
        return Placement(side=side, box=self.prepared.box, size=self.prepared.size)


def measure(
    network: ReferringNetwork,
    graphs: Mapping[str, Path],
    *,
    samples: Sequence[GateSample],
    tolerance: float,
    seeded: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[ParityRecord, tuple[GoldenCase, ...]]:
    """Compare exported stages and masks with a network.

    Every stage is fed once with PyTorch's activations and once with what the exported stages
    before it made. Each picture is asked about all its sentences at once and about the first
    alone.

    Args:
        network: the truth, in evaluation mode.
        graphs: ONNX files by stage id.
        samples: pictures and sentences.
        tolerance: limit on the relative error of every stage output.
        seeded: the weights are random; recorded only.
        say: takes messages about progress.

    Returns:
        The record, and the inputs and PyTorch's answers for each picture.

    Raises:
        ParityError: a stage or a mask differs; ``stage`` is the first one.
    """
    gate = _Gate(network=network, graphs=graphs, tolerance=tolerance)
    try:
        runs = tuple(run for sample in samples for run in gate.runs(sample, say))
        stages = tuple(gate.stage(spec, runs) for spec in network.graph().stages)
        masks = tuple(mask for run in runs for mask in gate.masks(run))
    finally:
        gate.close()
    record = ParityRecord(
        tolerance=tolerance,
        mask_iou_limit=MASK_IOU_LIMIT,
        mask_band=MASK_BAND,
        tie_band=TIE_BAND,
        seeded=seeded,
        proving=sum(mask.proves for mask in masks),
        stages=stages,
        masks=masks,
    )
    _judge_masks(masks, network.graph().stages[-1].id)
    golden = tuple(
        GoldenCase(picture=run.sample.picture, tokens=run.tokens, values=run.truth)
        for run in runs
        if len(run.tokens.sentences) > 1
    )
    return record, golden


class _Gate:
    """The exported stages, open, beside the network that they come from."""

    def __init__(
        self, *, network: ReferringNetwork, graphs: Mapping[str, Path], tolerance: float
    ) -> None:
        self.network, self.graphs, self.tolerance = network, graphs, tolerance
        self.graph = network.graph()
        self.tokenizer = Tokenizer(network.tokenizer_json().encode(), network.text)
        self.runners = open_runners(
            self.graph.stages, lambda spec: _open(spec, graphs[spec.id].read_bytes())
        )
        self.session = Session(self.graph, self.runners)
        self.finders = {spec.id: self._finder(spec) for spec in self.graph.stages}
        self.excused: dict[int, npt.NDArray[np.bool_]] = {}

    def close(self) -> None:
        self.session.close()
        for finder in self.finders.values():
            finder.close()

    def runs(self, sample: GateSample, say: Callable[[str], None]) -> Iterable[_Run]:
        """All sentences of a picture at once, then the first alone."""
        prepared = prepare(sample.picture, self.network.image)
        seen: Values = {PIXELS: prepared.pixels, VALID_BOX: prepared.valid_box}
        for sentences in (sample.sentences, sample.sentences[:1]):
            say(f"{sample.name}: {len(sentences)} sentence{'s' if len(sentences) > 1 else ''}")
            tokens = self.tokenizer.encode(sentences)
            given = {**seen, TOKEN_IDS: tokens.token_ids, TOKEN_MASK: tokens.token_mask}
            truth = activations(self.network, given)
            seen = {name: truth[name] for name in truth if self._of_image(name)}
            chained = self.session.trace(prepared, tokens)
            yield _Run(
                sample=sample, prepared=prepared, tokens=tokens, truth=truth, chained=chained
            )

    def stage(self, spec: StageSpec, runs: Sequence[_Run]) -> StageParity:
        """Measure one stage on all runs and judge it."""
        measured = [self._on_run(spec, run) for run in runs]
        tied = sum(int(self._excused(run).sum()) for run in runs)
        total = sum(len(run.tokens.sentences) for run in runs)
        if tied > TIED_SHARE * total:
            raise ParityError(
                f"Stage '{spec.id}' differs from PyTorch on {tied} of {total} samples. Scores at "
                f"the threshold of a hard decision explain at most {TIED_SHARE:.0%} of them.",
                stage=spec.id,
            )
        tensors = tuple(
            TensorParity(
                name=tensor.name,
                isolated=worst(one[tensor.name][0] for one in measured),
                chained=worst(one[tensor.name][1] for one in measured),
            )
            for tensor in spec.outputs
        )
        return StageParity(id=spec.id, tensors=tensors, tied=tied)

    def masks(self, run: _Run) -> list[MaskParity]:
        """Compare the final masks of one run."""
        found, truth = (
            _masks(run, values, self.network.mask) for values in (run.chained, run.truth)
        )
        return [
            compare_masks(a, b, picture=run.sample.name, expressions=len(truth), tied=bool(tied))
            for a, b, tied in zip(found, truth, self._tied(run), strict=True)
        ]

    def _on_run(self, spec: StageSpec, run: _Run) -> dict[str, tuple[Deviation, Deviation]]:
        """Worst isolated and chained deviation of each output over the samples without ties."""
        isolated = self.runners[spec.id].run(run.truth)
        both = [(isolated, run.truth), (run.chained, run.chained)]
        result: dict[str, list[Deviation]] = {tensor.name: [] for tensor in spec.outputs}
        for values, inputs in both:
            for tensor in spec.outputs:
                per_row = self._deviations(tensor.name, values, run)
                misses = [row.relative > self.tolerance for row in per_row]
                if any(misses):
                    self._excuse(spec, run, per_row=per_row, inputs=inputs, name=tensor.name)
                result[tensor.name].append(worst(self._judged(run, per_row)))
        return {name: (pair[0], pair[1]) for name, pair in result.items()}

    def _deviations(self, name: str, values: Values, run: _Run) -> tuple[Deviation, ...]:
        """One per sentence; for a value of the image alone, one."""
        if self._of_image(name):
            return (deviation(values[name], run.truth[name]),)
        return by_sentence(values[name], run.truth[name])

    def _judged(self, run: _Run, per_row: Sequence[Deviation]) -> list[Deviation]:
        excused = self._excused(run)
        if len(per_row) != len(excused):
            return list(per_row)
        return [row for row, known in zip(per_row, excused, strict=True) if not known]

    def _excuse(
        self, spec: StageSpec, run: _Run, *, per_row: Sequence[Deviation], inputs: Values, name: str
    ) -> None:
        """Note which samples' misses a tie explains; any other miss is an error."""
        excused = self._excused(run)
        per_sentence = len(per_row) == len(excused)
        tied = self.finders[spec.id].tied(inputs) if per_sentence else excused
        for index, row in enumerate(per_row):
            if row.relative <= self.tolerance:
                continue
            if per_sentence and (tied[index] or excused[index]) and row.relative <= TIED_ERROR:
                excused[index] = True
            else:
                fed = "PyTorch's activations" if inputs is run.truth else "the exported stages"
                raise ParityError(
                    f"Stage '{spec.id}' differs from PyTorch: relative error "
                    f"{row.relative:.2e} of '{name}' (limit {self.tolerance:.0e}, largest single "
                    f"difference {row.peak:.1e} rms), {run.label}, fed by {fed}. No bundle was "
                    "written.",
                    stage=spec.id,
                    error=row.relative,
                )

    def _finder(self, spec: StageSpec) -> TieFinder:
        model = onnx_graph.parse(self.graphs[spec.id].read_bytes())
        return TieFinder(spec=spec, model=model, opened=_open)

    def _excused(self, run: _Run) -> npt.NDArray[np.bool_]:
        """The sentences of a run that a tie has excused so far."""
        fresh = np.zeros(len(run.tokens.sentences), dtype=np.bool_)
        return self.excused.setdefault(id(run), fresh)

    def _tied(self, run: _Run) -> npt.NDArray[np.bool_]:
        """The sentences of a run with a score at a decision, whether or not it mattered here."""
        tied: npt.NDArray[np.bool_] = self._excused(run).copy()
        for finder in self.finders.values():
            if finder.decides:
                tied |= finder.tied(run.chained)
        return tied

    def _of_image(self, name: str) -> bool:
        return self.graph.values[name] is Dependency.IMAGE


def _open(spec: StageSpec, model: bytes) -> Runner:
    artefact = StageArtefact(
        spec=spec, file=f"{spec.id}.onnx", target=TargetSpec(), multiply_adds=0, parameters=0
    )
    return open_backend("onnxruntime").open_stage(artefact, model, threads=None)


def _masks(run: _Run, values: Values, spec: MaskSpec) -> list[Mask]:
    existence = sigmoid(values[EXISTENCE]).tolist() if EXISTENCE in values else None
    return [
        Mask(
            sentence=sentence,
            logits=values[LOGITS][row],
            existence=None if existence is None else existence[row],
            truncated_after=run.tokens.truncated_after[row],
            placement=run.placement,
            spec=spec,
        )
        for row, sentence in enumerate(run.tokens.sentences)
    ]


def _judge_masks(masks: Sequence[MaskParity], stage: str) -> None:
    for mask in masks:
        beyond = mask.flips_outside > 0 and not mask.tied
        if beyond or (mask.proves and mask.iou < MASK_IOU_LIMIT):
            raise ParityError(
                f"The mask of '{mask.sentence}' on picture '{mask.picture}' differs from "
                f"PyTorch's: IoU {mask.iou:.4f} (limit {MASK_IOU_LIMIT}), {mask.flips_outside} "
                f"pixels beyond the tie band (limit 0). No bundle was written.",
                stage=stage,
                error=1.0 - mask.iou,
            )


def _run(context: Context) -> None:
    loaded = context.artefacts.get(NETWORK)
    record, golden = measure(
        loaded.network,
        context.artefacts.get(GRAPHS),
        samples=shipped_samples(),
        tolerance=context.recipe.tolerance,
        seeded=loaded.seeded,
        say=context.say,
    )
    context.artefacts.put(PARITY, record)
    context.artefacts.put(GOLDEN, pack_golden(golden))


PARITY_GATE = Step(name="parity", needs=(NETWORK, GRAPHS), makes=(PARITY, GOLDEN), run=_run)
