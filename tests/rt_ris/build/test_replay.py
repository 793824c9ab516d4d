from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rt_ris.backends.base import Array
from rt_ris.build.limits import relative_error
from rt_ris.build.replay import Replay, replay
from rt_ris.bundle import Bundle, write_bundle
from rt_ris.errors import BundleError
from rt_ris.image import Prepared
from rt_ris.predictor import Predictor
from rt_ris.session import Session
from rt_ris.text import Tokens

TINY = Path(__file__).parents[2] / "fixtures" / "tiny"
Change = Callable[[dict[str, Array]], None]


@pytest.fixture(autouse=True)
def _needs_engine() -> None:
    pytest.importorskip("onnxruntime")


def rewritten(tmp_path: Path, change: Change, *, parity: bytes = b'{"masks": []}') -> Bundle:
    """The tiny bundle with other golden values, properly sealed."""
    bundle = Bundle.open(TINY)
    with np.load(io.BytesIO(bundle.read("golden.npz"))) as stored:
        arrays = dict(stored)
    change(arrays)
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    members: dict[str, bytes | Path] = {name: bundle.read(name) for name in bundle.manifest.members}
    members |= {"golden.npz": stream.getvalue(), "parity.json": parity}
    draft = replace(bundle.manifest, members={})
    tmp_path.mkdir(exist_ok=True)
    return write_bundle(tmp_path / "changed", manifest=draft, members=members)


def replayed(bundle: Bundle) -> Replay:
    with Predictor.load(bundle.path, threads=1) as predictor:
        return replay(bundle, predictor)


def test_golden_vectors_are_reproduced() -> None:
    found = replayed(Bundle.open(TINY))
    assert found.first_miss is None
    assert found.worst(masks=False) < 1e-6
    assert found.worst(masks=True) == 0
    assert (found.flips, found.tied) == (0, 0)
    assert [check.step for check in found.checks] == [
        *["prepare"] * 2,
        *["tokenizer"] * 2,
        "image",
        "text",
        *["fusion"] * 2,
        "verdict",
        *["mask"] * 2,
        *["pixels"] * 6,
    ]


def a_thing(arrays: dict[str, Array]) -> None:
    """Truths with a thing of less than 5 % of the picture, of which the backend knows nothing."""
    logits = arrays["0/logits"]
    logits[:] = -1.0
    logits[:, :2, :2] = 1.0


def test_a_small_thing_that_is_gone_is_a_miss_although_its_mask_proves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = rewritten(tmp_path, a_thing)
    trace = Session.trace

    def blind(self: Session, picture: Prepared, tokens: Tokens) -> Mapping[str, Array]:
        values = dict(trace(self, picture, tokens))
        values["logits"] = np.full_like(values["logits"], -1.0)
        return values

    monkeypatch.setattr(Session, "trace", blind)
    checks = replayed(bundle).checks
    assert "mask" not in {check.step for check in checks}
    missed = {(check.step, check.name.split(":")[0]) for check in checks if not check.passed}
    assert ("pixels", "beyond the band") in missed


def scaled(name: str, factor: float) -> Change:
    def change(arrays: dict[str, Array]) -> None:
        arrays[name] = (arrays[name] * factor).astype(arrays[name].dtype)

    return change


def twice(arrays: dict[str, Array]) -> None:
    """A second picture, so that one sentence is less than a quarter of all."""
    arrays |= {f"1{name[1:]}": array.copy() for name, array in arrays.items()}


def pixel_off(arrays: dict[str, Array]) -> None:
    arrays["0/pixels"][0, 16, 16, 0] ^= 1


def token_off(arrays: dict[str, Array]) -> None:
    arrays["0/token_ids"][0, 1] = 5


@pytest.mark.parametrize(
    ("change", "step"),
    [
        (pixel_off, "prepare"),
        (token_off, "tokenizer"),
        (scaled("0/grid", 1.001), "image"),
        (scaled("0/weights", 1.001), "text"),
        (scaled("0/logits", 1.001), "fusion"),
        (scaled("0/existence", 1.001), "fusion"),
        (scaled("0/logits", float("nan")), "fusion"),
    ],
)
def test_the_first_step_that_differs_is_named(tmp_path: Path, change: Change, step: str) -> None:
    found = replayed(rewritten(tmp_path, change))
    assert found.first_miss is not None
    assert found.first_miss.step == step
    assert found.first_miss.error > found.first_miss.limit or step == "fusion"


def record(*tied: str, **more: object) -> bytes:
    """A ``parity.json`` in which the fusion decides and some sentences are tied."""
    document = {
        "masks": [{"sentence": "the red thing"}, *({"sentence": it, "tied": True} for it in tied)],
        "stages": [{"id": "text", "decides": False}, {"id": "fusion", "decides": True}],
    }
    return json.dumps(document | more).encode()


def test_a_tied_sentence_has_a_looser_limit_where_the_decision_is(tmp_path: Path) -> None:
    def change(arrays: dict[str, Array]) -> None:
        twice(arrays)
        arrays["0/logits"][1] *= 1.001

    assert replayed(rewritten(tmp_path / "a", change)).first_miss is not None
    found = replayed(rewritten(tmp_path / "b", change, parity=record("blue")))
    assert found.first_miss is None
    assert found.tied == 1
    loose = [check for check in found.checks if check.name == "logits (tied)"]
    assert [(check.case, check.limit) for check in loose] == [(0, 0.25)]


def test_masks_have_their_own_gate(tmp_path: Path) -> None:
    def change(arrays: dict[str, Array]) -> None:
        twice(arrays)
        arrays["0/logits"][1] += 0.4

    found = replayed(rewritten(tmp_path, change, parity=record("blue")))
    assert found.first_miss is not None
    assert (found.first_miss.step, found.first_miss.name) == ("mask", "blue")
    assert found.tied == 1
    assert found.flips > 0
    (tied,) = (check for check in found.checks if check.step == "tied mask" and check.case == 0)
    assert (tied.name, tied.limit, tied.passed) == ("blue", 0.01, False)


EVERY = ("the red thing", "blue", "the green one")


def tripled(arrays: dict[str, Array]) -> None:
    arrays["0/weights"] *= 3
    arrays["0/existence"] *= -1


def negated(arrays: dict[str, Array]) -> None:
    arrays["0/existence"] *= -1


def slightly(arrays: dict[str, Array]) -> None:
    arrays["0/logits"] *= 1.001


@pytest.mark.parametrize(
    ("change", "parity", "step", "name"),
    [
        (tripled, record(*EVERY), "text", "weights"),
        (tripled, record(*EVERY, stages=[{"id": "text", "decides": True}]), "text", "weights"),
        (negated, record(*EVERY), "fusion", "existence (tied)"),
        (slightly, record(*EVERY, stages=[]), "fusion", "logits"),
        (slightly, record(*EVERY, tied_error=0.0), "fusion", "logits (tied)"),
        (slightly, record(*EVERY), "fusion", "share of sentences excused by ties"),
    ],
)
def test_a_resealed_bundle_whose_sentences_are_all_tied_fails(
    tmp_path: Path, change: Change, parity: bytes, step: str, name: str
) -> None:
    """Whoever marks everything as tied gets a bounded excuse, and only after the decision."""
    found = replayed(rewritten(tmp_path, change, parity=parity))
    assert found.first_miss is not None
    assert (found.first_miss.step, found.first_miss.name) == (step, name)


def test_a_verdict_may_turn_only_at_its_threshold(tmp_path: Path) -> None:
    """Whatever a tie excuses, what is on the picture stays on it."""

    def turned(arrays: dict[str, Array]) -> None:
        twice(arrays)
        arrays["0/existence"][1] = -arrays["0/existence"][1]

    found = replayed(rewritten(tmp_path, turned, parity=record("blue")))
    assert [check.error for check in found.checks if check.step == "verdict"] == [1 / 3, 0]


@pytest.mark.parametrize(
    ("parity", "said"),
    [
        (record(tied_error=0.3), "'tied_error' is 0.3; accepted is 0 to 0.25"),
        (record(tied_share=1), "'tied_share' is 1; accepted is 0 to 0.25"),
        (record(tied_flips=True), "'tied_flips' is True"),
        (record(masks=3), "'masks' is no list"),
        (record(masks=[3]), "stands where an object is expected"),
        (record(stages=[{"decides": True}]), "has no text 'id'"),
        (b"[]", "stands where an object is expected"),
    ],
)
def test_a_record_that_asks_for_too_much_is_refused(
    tmp_path: Path, parity: bytes, said: str
) -> None:
    with pytest.raises(BundleError, match=said):
        replayed(rewritten(tmp_path, lambda _: None, parity=parity))


def lacking(name: str) -> Change:
    def change(arrays: dict[str, Array]) -> None:
        del arrays[name]

    return change


def pickled(arrays: dict[str, Array]) -> None:
    arrays["0/more"] = np.array([{}], dtype=object)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lacking("0/logits"), "lacks '0/logits'"),
        (dict.clear, "empty"),
        (pickled, "breaks its format"),
    ],
)
def test_a_golden_file_that_breaks_the_format_is_refused(
    tmp_path: Path, change: Change, said: str
) -> None:
    with pytest.raises(BundleError, match=said):
        replayed(rewritten(tmp_path, change))


def test_relative_error_is_the_norm_of_the_difference() -> None:
    truth = np.array([3.0, 4.0], dtype=np.float32)
    assert relative_error(truth, truth) == 0
    assert relative_error(truth + np.float32(0.5), truth) == pytest.approx(np.sqrt(0.5) / 5)
    assert relative_error(truth * np.nan, truth) == np.inf
    assert relative_error(truth, truth * 0) == np.inf
    assert relative_error(truth * 0, truth * 0) == 0
    assert relative_error(np.float32([1.1]), np.float32([0.0])) == pytest.approx(1.1)
