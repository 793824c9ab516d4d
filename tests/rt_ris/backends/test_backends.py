from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import rt_ris.backends
from rt_ris.backends import BACKENDS, choose, open_backend
from rt_ris.backends.base import Array, Runner
from rt_ris.backends.fake import FakeRunner
from rt_ris.bundle import Bundle
from rt_ris.errors import BackendError, MissingExtraError, ShapeError, TargetMismatchError
from rt_ris.spec import StageSpec, TargetSpec, TensorSpec

TINY = Bundle.open(Path(__file__).parents[2] / "fixtures" / "tiny")
STAGE = StageSpec(
    id="fusion",
    role="fusion",
    inputs=(
        TensorSpec(name="words", dtype="float32", shape=("N", 17, 4)),
        TensorSpec(name="token_mask", dtype="bool", shape=("N", 17)),
        TensorSpec(name="grid", dtype="float32", shape=(1, 4)),
    ),
    outputs=(TensorSpec(name="logits", dtype="float32", shape=("N", 8)),),
)


def inputs(count: int = 2) -> dict[str, Array]:
    return {
        "words": np.zeros((count, 17, 4), dtype=np.float32),
        "token_mask": np.ones((count, 17), dtype=np.bool_),
        "grid": np.zeros((1, 4), dtype=np.float32),
    }


class Given(Runner):
    """Gives what it was told to give."""

    def __init__(self, made: Sequence[Array]) -> None:
        super().__init__(STAGE)
        self.made = made

    def _run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        return self.made

    def close(self) -> None:
        pass


def test_what_fits_is_run_and_more_is_ignored() -> None:
    found = FakeRunner(STAGE).run({**inputs(3), "more": np.zeros(1)})
    assert {name: array.shape for name, array in found.items()} == {"logits": (3, 8)}


@pytest.mark.parametrize(
    ("name", "array", "said"),
    [
        ("words", np.zeros((2, 22, 4), np.float32), r"float32 \[2, 22, 4\]; .* \[N, 17, 4\]"),
        ("words", np.zeros((2, 17, 4), np.float64), "float64"),
        ("words", np.zeros((17, 4), np.float32), "Did you pass your own tensor"),
        ("words", np.zeros((0, 17, 4), np.float32), r"\[0, 17, 4\]"),
        ("token_mask", np.ones((2, 22), np.bool_), "cut and padded to 17 tokens"),
        ("token_mask", np.ones((3, 17), np.bool_), "different numbers of sentences"),
        ("grid", np.zeros((2, 4), np.float32), r"\[1, 4\]"),
    ],
)
def test_inputs_are_checked(name: str, array: Array, said: str) -> None:
    with pytest.raises(ShapeError, match=said):
        FakeRunner(STAGE).run({**inputs(), name: array})


def test_a_missing_input_is_named() -> None:
    with pytest.raises(ShapeError, match=r"needs 'grid' float32 \[1, 4\]"):
        FakeRunner(STAGE).run({key: value for key, value in inputs().items() if key != "grid"})


@pytest.mark.parametrize(
    "made",
    [
        [],
        [np.zeros((3, 8), np.float32)],
        [np.zeros((2, 9), np.float32)],
        [np.zeros((2, 8), np.float64)],
    ],
)
def test_outputs_are_checked(made: list[Array]) -> None:
    with pytest.raises(BackendError, match="fusion"):
        Given(made).run(inputs(2))


@pytest.mark.parametrize("name", BACKENDS)
def test_the_table_leads_to_backends(name: str) -> None:
    entry = BACKENDS[name]
    if not entry.installed():
        pytest.skip(f"{entry.engine} is not installed")
    module = importlib.import_module(entry.module)
    if entry.runs_engines:
        assert callable(module.stage_opener)
        return  # its versions are those of a GPU, see test_tensorrt.py
    assert callable(module.open_stage)
    assert all(isinstance(text, str) for text in module.versions().values())


def test_an_unknown_backend_is_refused_with_the_known_ones() -> None:
    with pytest.raises(BackendError, match="auto, onnxruntime, tensorrt, tensorrt-rtx, fake"):
        open_backend("tpu")


def missing(name: str) -> Callable[[str], object]:
    def import_module(_: str) -> object:
        raise ModuleNotFoundError(f"No module named '{name}'", name=name)

    return import_module


def test_a_missing_engine_gives_the_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rt_ris.backends.importlib, "import_module", missing("onnxruntime"))
    with pytest.raises(MissingExtraError) as caught:
        open_backend("onnxruntime")
    assert 'pip install "rt-ris[cpu]"' in str(caught.value)
    assert caught.value.exit_code == 4


def test_a_missing_module_of_ours_is_not_taken_for_the_engine(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rt_ris.backends.importlib, "import_module", missing("rt_ris.spec"))
    with pytest.raises(ModuleNotFoundError):
        open_backend("onnxruntime")


def test_auto_never_takes_the_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rt_ris.backends.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"rt-ris\[cpu\]"):
        choose(TINY.manifest)


def test_auto_says_what_it_chose_and_why(caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("onnxruntime")
    with caplog.at_level("INFO", logger="rt_ris"):
        assert choose(TINY.manifest) == "onnxruntime"
    assert "onnxruntime is installed" in caplog.text


def test_auto_takes_onnx_runtime_for_its_own_operators() -> None:
    pytest.importorskip("onnxruntime")
    own = replace(TINY.manifest.stages[0], target=TargetSpec(format="onnxruntime"))
    stages = (own, *TINY.manifest.stages[1:])
    assert choose(replace(TINY.manifest, stages=stages)) == "onnxruntime"


def test_auto_refuses_formats_that_nothing_opens() -> None:
    stages = tuple(
        replace(stage, target=TargetSpec(format="engine")) for stage in TINY.manifest.stages
    )
    with pytest.raises(BackendError, match="engine"):
        choose(replace(TINY.manifest, stages=stages))


class TestOnnxRuntime:
    @pytest.fixture(autouse=True)
    def _needs_engine(self) -> None:
        pytest.importorskip("onnxruntime")

    def test_it_refuses_other_artefacts(self) -> None:
        artefact = replace(TINY.manifest.stages[0], target=TargetSpec(format="engine", device="x"))
        with pytest.raises(TargetMismatchError, match="engine"):
            open_backend("onnxruntime").open_stage(artefact, b"", threads=1)

    def test_it_refuses_its_own_operators_where_it_computes_them_wrongly(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        text = TINY.manifest.stage("text")
        own = replace(text, target=TargetSpec(format="onnxruntime"))
        open_backend("onnxruntime").open_stage(own, TINY.read("text.onnx"), threads=1).close()
        monkeypatch.setattr("onnxruntime.__version__", "1.20.1")
        open_backend("onnxruntime").open_stage(text, TINY.read("text.onnx"), threads=1).close()
        with pytest.raises(TargetMismatchError, match=r"1\.20\.1 .* 'text' wrongly .* 1\.21 or"):
            open_backend("onnxruntime").open_stage(own, TINY.read("text.onnx"), threads=1)

    def test_it_names_the_stage_it_cannot_open(self) -> None:
        with pytest.raises(BackendError, match="'image'"):
            open_backend("onnxruntime").open_stage(TINY.manifest.stages[0], b"junk", threads=1)

    def test_it_compares_the_graph_with_the_manifest(self) -> None:
        artefact = TINY.manifest.stages[0]
        with pytest.raises(BackendError, match="declares"):
            open_backend("onnxruntime").open_stage(artefact, TINY.read("text.onnx"), threads=1)

    def test_sentences_do_not_touch_each_other(self) -> None:
        text = TINY.manifest.stage("text")
        runner = open_backend("onnxruntime").open_stage(text, TINY.read("text.onnx"), threads=1)
        ids = np.random.default_rng(0).integers(0, 8, (5, 8)).astype(np.int32)
        mask = np.ones((5, 8), dtype=np.bool_)
        together = runner.run({"token_ids": ids, "token_mask": mask})["weights"]
        for row in range(5):
            one = runner.run({"token_ids": ids[row : row + 1], "token_mask": mask[:1]})["weights"]
            assert np.allclose(one, together[row : row + 1], rtol=1e-6)
