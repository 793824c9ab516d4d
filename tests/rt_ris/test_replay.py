from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from rt_ris.backends.base import Array
from rt_ris.bundle import Bundle, write_bundle
from rt_ris.errors import BundleError
from rt_ris.predictor import Predictor
from rt_ris.replay import Replay, relative_error, replay

TINY = Path(__file__).parents[1] / "fixtures" / "tiny"
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
        *["mask"] * 2,
    ]


def scaled(name: str, factor: float) -> Change:
    def change(arrays: dict[str, Array]) -> None:
        arrays[name] = (arrays[name] * factor).astype(arrays[name].dtype)

    return change


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


def test_a_tied_sentence_is_judged_by_its_mask(tmp_path: Path) -> None:
    def change(arrays: dict[str, Array]) -> None:
        arrays["0/logits"][1] *= 1.001

    assert replayed(rewritten(tmp_path / "a", change)).first_miss is not None
    tied = b'{"masks": [{"sentence": "blue", "tied": true}, {"sentence": "the red thing"}]}'
    found = replayed(rewritten(tmp_path / "b", change, parity=tied))
    assert found.first_miss is None
    assert found.tied == 1


def test_masks_have_their_own_gate(tmp_path: Path) -> None:
    def change(arrays: dict[str, Array]) -> None:
        arrays["0/logits"][1] += 2

    tied = b'{"masks": [{"sentence": "blue", "tied": true}]}'
    found = replayed(rewritten(tmp_path, change, parity=tied))
    assert found.first_miss is not None
    assert (found.first_miss.step, found.first_miss.name) == ("mask", "blue")
    assert found.tied == 1
    assert found.flips > 0


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
