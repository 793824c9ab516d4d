"""The gate itself: its truth, its numbers, and what a tie may excuse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from rt_ris.errors import ParityError
from rt_ris.image import Box, prepare
from rt_ris.mask import Mask, Placement
from rt_ris.spec import LOGITS, PIXELS, TOKEN_IDS, TOKEN_MASK, VALID_BOX, MaskSpec
from rt_ris.text import Tokenizer
from rt_ris_export import judge, measure, onnx_graph
from rt_ris_export.compare import by_sentence, compare_masks, deviation
from rt_ris_export.gate_data import GateSample, shipped_samples
from rt_ris_export.judge import MaskJudge
from rt_ris_export.limits import LIMITS, Limits
from rt_ris_export.parity_record import Deviation, MaskParity, ParityRecord, worst
from rt_ris_export.ties import TieFinder
from rt_ris_export.truth import Observation, activations, observe
from rt_ris_train.architecture import Batch

from .conftest import Traced

FULL = LIMITS["fp32"]


def _given(traced: Traced, sample: GateSample) -> dict[str, np.ndarray]:
    network = traced.network
    prepared = prepare(sample.picture, network.image)
    tokens = Tokenizer(network.tokenizer_json().encode(), network.text).encode(sample.sentences)
    return {
        PIXELS: prepared.pixels,
        VALID_BOX: prepared.valid_box,
        TOKEN_IDS: tokens.token_ids,
        TOKEN_MASK: tokens.token_mask,
    }


def _files(traced: Traced, folder: Path, **changed: bytes) -> dict[str, Path]:
    paths = {}
    for name, raw in {**traced.graphs, **changed}.items():
        paths[name] = folder / f"{name}.onnx"
        paths[name].write_bytes(raw)
    return paths


def _measured(traced: Traced, graphs: Mapping[str, Path], *, limits: Limits = FULL) -> ParityRecord:
    """The gate on one picture."""
    observed = observe(traced.network, shipped_samples()[:1])
    return measure.measure(traced.network, graphs, observed=observed, limits=limits).record


def test_the_truth_is_the_forward_pass_of_training(traced: Traced) -> None:
    given = _given(traced, shipped_samples()[1])
    batch = Batch(
        pixels=torch.from_numpy(given[PIXELS]),
        valid_box=torch.from_numpy(given[VALID_BOX]),
        token_ids=torch.from_numpy(given[TOKEN_IDS]),
        token_mask=torch.from_numpy(given[TOKEN_MASK]),
        image_index=torch.zeros(len(given[TOKEN_IDS]), dtype=torch.int64),
    )
    with torch.inference_mode():
        wanted = traced.network(batch).logits.numpy()
    found = activations(traced.network, given)
    np.testing.assert_array_equal(found[LOGITS], wanted)
    kept = {name: value for name, value in found.items() if name != LOGITS}
    np.testing.assert_array_equal(activations(traced.network, kept)[LOGITS], wanted)


def test_deviation_is_the_house_definition() -> None:
    truth = np.array([3.0, 4.0], dtype=np.float32)
    found = truth + np.array([0.0, 0.1], dtype=np.float32)
    measured = deviation(found, truth)
    assert measured.relative == pytest.approx(0.1 / 5.0, rel=1e-5)
    assert measured.peak == pytest.approx(0.1 / np.sqrt(12.5), rel=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_infinitely_wrong(bad: float) -> None:
    truth = np.ones(3, dtype=np.float32)
    assert deviation(np.array([1.0, bad, 1.0], dtype=np.float32), truth).relative == np.inf
    assert deviation(truth, np.array([1.0, bad, 1.0], dtype=np.float32)).relative == np.inf
    assert deviation(truth, np.zeros(3, dtype=np.float32)).relative == np.inf


def test_a_single_logit_is_measured_against_the_scale_of_logits() -> None:
    found, truth = np.array([1e-6, 20.0]), np.array([0.0, 10.0])
    assert [entry.relative for entry in by_sentence(found, truth)] == pytest.approx([1e-6, 1.0])


def test_worst_takes_each_number_by_itself() -> None:
    one, two = Deviation(relative=1.0, peak=4.0), Deviation(relative=2.0, peak=3.0)
    assert worst([one, two]) == Deviation(relative=2.0, peak=4.0)
    assert worst([]) == Deviation(relative=0.0, peak=0.0)


def _mask(logits: np.ndarray, *, existence: float = 0.9, interpolate: str = "logits") -> Mask:
    size = logits.shape[0]
    return Mask(
        sentence="it",
        logits=logits.astype(np.float32),
        existence=existence,
        truncated_after=None,
        placement=Placement(side=size, box=Box(0, 0, size, size), size=(size, size)),
        spec=MaskSpec(size=size, interpolate=interpolate, existence_threshold=0.5),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("interpolate", ["logits", "probabilities"])
def test_masks_are_compared_inside_and_outside_the_tie_band(interpolate: str) -> None:
    logits = np.ones((10, 10))
    logits[:5] = -1.0
    truth = logits.copy()
    truth[0, 0], truth[0, 1] = 1e-5, -0.5
    found = truth.copy()
    found[0, 0], found[0, 1] = -1e-5, 0.5
    measured = compare_masks(
        _mask(found, interpolate=interpolate),
        _mask(truth, interpolate=interpolate),
        picture="p",
        expressions=1,
        tied=False,
        band=FULL.mask_band,
    )
    assert (measured.flips, measured.flips_outside) == (1, 1)
    assert measured.iou == pytest.approx(50 / 52)
    assert measured.coverage == pytest.approx(0.51)
    assert measured.proves


def test_existence_empties_no_comparison() -> None:
    logits = np.ones((10, 10))
    logits[:5] = -1.0
    measured = compare_masks(
        _mask(logits, existence=0.1),
        _mask(logits),
        picture="p",
        expressions=1,
        tied=False,
        band=FULL.mask_band,
    )
    assert measured.existence_differs
    assert measured.existence_turned
    assert (measured.iou, measured.coverage) == (1.0, 0.5)


@pytest.mark.parametrize("value", [-1.0, 1.0])
def test_empty_and_full_masks_prove_nothing(value: float) -> None:
    mask = _mask(np.full((10, 10), value))
    measured = compare_masks(
        mask, mask, picture="p", expressions=1, tied=False, band=FULL.mask_band
    )
    assert (measured.iou, measured.proves) == (1.0, False)


def test_ties_are_found_inside_a_stage(traced: Traced) -> None:
    spec = traced.network.graph().stage("fusion")
    model = onnx_graph.parse(traced.graphs["fusion"])
    finder = TieFinder(spec=spec, model=model, opened=measure._open, band=FULL.tie_band)
    values = activations(traced.network, _given(traced, shipped_samples()[0]))
    values = {tensor.name: values[tensor.name].copy() for tensor in spec.inputs}
    untied = finder.tied(values)
    values["z_l"][1, 0] = 0.0  # its scores are exactly at the threshold
    assert finder.tied(values).tolist() == [untied[0], True, untied[2]]


def test_a_tie_is_recorded_even_where_it_did_not_matter(
    traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def second(self: TieFinder, values: dict[str, np.ndarray]) -> np.ndarray:
        return np.arange(len(values[TOKEN_MASK])) == 1

    monkeypatch.setattr(TieFinder, "tied", second)
    record = _measured(traced, _files(traced, tmp_path))
    assert [mask.tied for mask in record.masks] == [False, True, False, False]
    assert [stage.tied for stage in record.stages] == [0, 0, 0, 0]
    assert [stage.decides for stage in record.stages] == [False, False, True, False]


def test_a_stage_without_decisions_has_no_ties(traced: Traced) -> None:
    spec = traced.network.graph().stage("decoder")
    model = onnx_graph.parse(traced.graphs["decoder"])
    values = activations(traced.network, _given(traced, shipped_samples()[0]))
    finder = TieFinder(spec=spec, model=model, opened=measure._open, band=FULL.tie_band)
    assert not finder.tied(values).any()


def test_a_tie_excuses_a_few_samples_and_no_more(
    traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tie explains a miss, but not misses on every sample."""
    graphs = _files(traced, tmp_path, fusion=traced.perturbed("fusion", factor=1.001))

    def always(self: TieFinder, values: dict[str, np.ndarray]) -> np.ndarray:
        return np.ones(len(values[TOKEN_MASK]), dtype=np.bool_)

    monkeypatch.setattr(TieFinder, "tied", always)
    with pytest.raises(ParityError, match="differs from PyTorch on 4 of 4 samples") as caught:
        _measured(traced, graphs)
    assert caught.value.stage == "fusion"
    record = _measured(traced, graphs, limits=replace(FULL, tied_share=1.0))
    assert [stage.tied for stage in record.stages] == [0, 0, 4, 4]
    assert all(mask.tied for mask in record.masks)


def test_a_verdict_near_its_threshold_may_turn() -> None:
    logits = np.ones((10, 10))
    above, below = _mask(logits, existence=0.50002), _mask(logits, existence=0.49998)
    measured = compare_masks(
        below, above, picture="p", expressions=1, tied=False, band=FULL.mask_band
    )
    assert measured.existence_differs
    assert not measured.existence_turned


GOOD = MaskParity(
    picture="chelsea",
    sentence="the cat",
    expressions=1,
    pixels=10_000,
    coverage=0.5,
    proves=True,
    iou=1.0,
    flips=0,
    flips_outside=0,
    existence_differs=False,
    existence_turned=False,
    tied=False,
)


def _judge(mask: MaskParity) -> None:
    spec = MaskSpec(size=8, interpolate="logits")
    MaskJudge(spec=spec, limits=FULL, masks=[GOOD, mask]).judge("decoder")


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"iou": 0.5}, r"IoU 0.5000 \(limit 0.99\)"),
        ({"iou": 0.5, "tied": True}, r"IoU 0.5000 \(limit 0.99\)"),
        ({"flips": 11}, r"11 pixels within the tie band \(limit 10\)"),
        ({"flips_outside": 1}, r"1 beyond it \(limit 0\)"),
        ({"flips_outside": 101, "tied": True}, r"101 beyond it \(limit 100\)"),
        ({"existence_differs": True, "existence_turned": True}, "disagree on whether 'the cat'"),
    ],
)
def test_a_wrong_mask_is_a_miss(changed: dict[str, float], said: str) -> None:
    with pytest.raises(ParityError, match=said) as caught:
        _judge(replace(GOOD, **changed))  # type: ignore[arg-type]
    assert caught.value.stage == "decoder"


@pytest.mark.parametrize(
    "changed",
    [
        {"flips": 10},
        {"flips_outside": 100, "tied": True},
        {"iou": 0.5, "proves": False},
        {"existence_differs": True},
    ],
)
def test_what_rounding_may_do_to_a_mask_passes(changed: dict[str, float]) -> None:
    _judge(replace(GOOD, **changed))  # type: ignore[arg-type]


def test_a_gate_without_a_proving_mask_proves_nothing(traced: Traced) -> None:
    observed = observe(traced.network, shipped_samples()[:1])
    judge.judge_proof(observed, traced.network.mask)
    empty = [
        replace(seen, truth={**seen.truth, LOGITS: np.full_like(seen.truth[LOGITS], -1.0)})
        for seen in observed
    ]
    with pytest.raises(ParityError, match="Nothing was proven: none of PyTorch's 4 masks") as e:
        judge.judge_proof(empty, traced.network.mask)
    assert e.value.stage == ""


@pytest.mark.parametrize(("moved", "passes"), [(1, True), (2, False)])
def test_labels_bound_the_change_of_oiou(traced: Traced, moved: int, passes: bool) -> None:
    """The upper half of a picture is what is meant; rows of its mask are lost in export."""
    target = np.zeros((1000, 100), dtype=np.bool_)
    target[:500] = True
    sample = GateSample(
        name="p", picture=np.zeros((1000, 100, 3), np.uint8), sentences=("it",), targets=(target,)
    )
    judged = MaskJudge(spec=replace(traced.network.mask, size=1000), limits=replace(FULL, oiou=0.3))
    logits = np.where(np.arange(1000) < 500, 1.0, -1.0).astype(np.float32)
    seen = _seen(sample, traced, logits)
    logits = np.where(
        np.arange(1000) < 500 - moved, 1.0, np.where(np.arange(1000) < 500, -1e-9, -1)
    )
    judged.add(seen, {LOGITS: _grid(logits)}, tied=(True,))
    labels = judged.labels()
    assert labels is not None
    assert (labels.sentences, labels.trained) == (1, 100.0)
    assert labels.exported == pytest.approx(100 - moved / 5)
    if passes:
        judged.judge("decoder")
    else:
        with pytest.raises(ParityError, match=r"changes from 100.00 to 99.60 \(limit 0.3 points\)"):
            judged.judge("decoder")


def _grid(rows: np.ndarray) -> np.ndarray:
    return np.repeat(rows[None, :, None], len(rows), axis=2).astype(np.float32)


def _seen(sample: GateSample, traced: Traced, rows: np.ndarray) -> Observation:
    network = traced.network
    prepared = prepare(sample.picture, replace(network.image, size=len(rows)))
    tokens = Tokenizer(network.tokenizer_json().encode(), network.text).encode(sample.sentences)
    return Observation(sample=sample, prepared=prepared, tokens=tokens, truth={LOGITS: _grid(rows)})


def test_what_shows_along_the_chain_alone_is_put_down_to_an_earlier_stage(
    traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The decoder is right by itself; what the fusion is off by, within its limit, shows there."""

    def limit(gate: measure._StageGate, alone: bool) -> float:
        return 1e-2 if alone or gate.spec.id != "decoder" else 1e-4

    monkeypatch.setattr(measure._StageGate, "_limit", limit)
    graphs = _files(traced, tmp_path, fusion=traced.perturbed("fusion", factor=1.005))
    observed = observe(traced.network, shipped_samples()[:1])
    before = ("fusion", "image_encoder", "text_encoder")
    for settled, causes in ((0, before[:1]), (1, before[1:]), (3, ("decoder",))):
        with pytest.raises(ParityError, match="fed by the exported stages") as caught:
            measure.measure(
                traced.network, graphs, observed=observed, limits=FULL, settled=before[:settled]
            )
        assert caught.value.stage == "decoder"
        assert caught.value.cause in causes
