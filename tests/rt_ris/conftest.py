"""The tiny bundle, a network of fakes whose runs can be counted, and TensorRTs without a GPU."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from rt_ris.backends.fake import FakeRunner
from rt_ris.build.request import MODULES, Target
from rt_ris.predictor import Predictor
from rt_ris.session import Session
from rt_ris.spec import (
    EXISTENCE,
    EXPRESSIONS,
    LOGITS,
    PIXELS,
    TOKEN_IDS,
    TOKEN_MASK,
    VALID_BOX,
    ImageSpec,
    MaskSpec,
    StageGraph,
    StageSpec,
    TensorSpec,
    TextSpec,
    external_inputs,
)
from rt_ris.text import Tokenizer

FIXTURES = Path(__file__).parents[1] / "fixtures"
FAKES = Path(__file__).parents[1] / "fakes"
TENSORRTS = sorted(path.name.removesuffix(".json.gz") for path in (FAKES / "api").iterdir())
IMAGE = ImageSpec(size=32, mean=(0, 0, 0), std=(1, 1, 1))
TEXT = TextSpec(max_tokens=8)
MASK = MaskSpec(size=8, existence_threshold=0.01)


@dataclass
class Faked:
    """A predictor over fake runners."""

    predictor: Predictor
    runners: dict[str, FakeRunner]

    def runs(self) -> dict[str, int]:
        return {name: runner.runs for name, runner in self.runners.items()}


def cached_stages() -> tuple[StageSpec, ...]:
    """One stage of each class; the last reads external inputs as well."""
    given = {spec.name: spec for spec in external_inputs(IMAGE, TEXT)}
    grid = TensorSpec(name="grid", dtype="float32", shape=(1, 4, 8, 8))
    words = TensorSpec(name="words", dtype="float32", shape=(EXPRESSIONS, 8, 4))
    return (
        StageSpec(
            id="image",
            role="image_encoder",
            inputs=(given[PIXELS], given[VALID_BOX]),
            outputs=(grid,),
        ),
        StageSpec(
            id="text",
            role="text_encoder",
            inputs=(given[TOKEN_IDS], given[TOKEN_MASK]),
            outputs=(words,),
        ),
        StageSpec(
            id="fusion",
            role="fusion",
            inputs=(grid, words, given[TOKEN_MASK], given[VALID_BOX]),
            outputs=outputs(),
        ),
    )


def joint_stages() -> tuple[StageSpec, ...]:
    """One stage that reads everything, so that nothing can be cached."""
    given = external_inputs(IMAGE, TEXT)
    return (StageSpec(id="all", role="fusion", inputs=given, outputs=outputs()),)


def outputs() -> tuple[TensorSpec, ...]:
    return (
        TensorSpec(name=LOGITS, dtype="float32", shape=(EXPRESSIONS, 8, 8)),
        TensorSpec(name=EXISTENCE, dtype="float32", shape=(EXPRESSIONS,)),
    )


def faked(stages: tuple[StageSpec, ...], **options: int) -> Faked:
    runners = {stage.id: FakeRunner(stage) for stage in stages}
    session = Session(StageGraph(stages=stages), runners, **options)
    document = (FIXTURES / "tiny" / "tokenizer.json").read_bytes()
    predictor = Predictor(
        session=session, tokenizer=Tokenizer(document, TEXT), image=IMAGE, mask=MASK
    )
    return Faked(predictor, runners)


@pytest.fixture
def make_faked() -> object:
    """``make_faked(kind, **session options)`` with kind ``cached`` or ``joint``."""

    def make(kind: str = "cached", **options: int) -> Faked:
        return faked(cached_stages() if kind == "cached" else joint_stages(), **options)

    return make


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A copy of the tiny bundle that may be spoilt."""
    return Path(shutil.copytree(FIXTURES / "tiny", tmp_path / "tiny"))


@pytest.fixture
def for_onnx_runtime(tiny: Path) -> Path:
    """The tiny bundle, whose text stage is said to hold operators of ONNX Runtime's own."""
    manifest = json.loads((tiny / "manifest.json").read_text())
    (stage,) = (stage for stage in manifest["stages"] if stage["spec"]["id"] == "text")
    stage["target"]["format"] = "onnxruntime"
    raw = json.dumps(manifest).encode()
    (tiny / "manifest.json").write_bytes(raw)
    (tiny / "manifest.sha256").write_text(f"{hashlib.sha256(raw).hexdigest()}\n")
    return tiny


@pytest.fixture
def picture() -> npt.NDArray[np.uint8]:
    """A red thing on the left, a blue one on the right, uint8 [24, 40, 3]."""
    pixels = np.full((24, 40, 3), 30, dtype=np.uint8)
    pixels[4:20, 4:16] = (220, 40, 30)
    pixels[8:22, 24:36] = (30, 60, 230)
    return pixels


@dataclass
class World:
    """A TensorRT and a GPU that are not there; also in the processes that a test starts.

    Attributes:
        target: which of the two engines.
        trt: its module, see ``fake_trt.Fake``.
        cudart: the GPU, see ``fake_cudart.Cudart``.
        monkeypatch: undoes what a test changes about them.
    """

    target: Target
    trt: Any
    cudart: Any
    monkeypatch: pytest.MonkeyPatch

    def words(self, verb: str, bundle: Path, *more: str) -> list[str]:
        option = "--target" if verb == "build" else "--backend"
        return [verb, str(bundle), option, self.target, *more]


@pytest.fixture(params=TENSORRTS)
def world(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> Iterator[World]:
    """Each version whose bindings were dumped, over one GPU of compute capability 8.9."""
    pytest.importorskip("onnxruntime")  # computes what engines compute
    target: Target = "tensorrt-rtx" if request.param.startswith("rtx") else "tensorrt"
    monkeypatch.setenv("RT_RIS_FAKE_TENSORRT", request.param)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = [os.environ["PYTHONPATH"]] if os.environ.get("PYTHONPATH") else []
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKES / "modules"), *before]))
    monkeypatch.syspath_prepend(str(FAKES))
    fake_trt = __import__("fake_trt")
    cudart = __import__("fake_cudart").Cudart()
    trt = fake_trt.Fake(request.param)
    trt._cudart = cudart
    monkeypatch.setitem(sys.modules, MODULES[target], trt)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cudart.module())
    monkeypatch.setattr("rt_ris.backends.cuda.DRIVER_FILE", tmp_path / "no driver")
    yield World(target, trt, cudart, monkeypatch)
    assert not cudart.live, "memory of the GPU was not given back"
    assert not cudart.streams


@pytest.fixture
def engines(world: World, tiny: Path, built: dict[str, Path], tmp_path: Path) -> Path:
    """The tiny bundle's engines for the GPU of ``world``, that passed the gate there."""
    from rt_ris.cli import main

    key = world.trt.__version__
    out = tiny.with_name("tiny.engines")
    if key not in built:
        assert main(world.words("build", tiny)) == 0
        built[key] = Path(shutil.copytree(out, built["folder"] / key))
    elif not out.exists():
        shutil.copytree(built[key], out)
    return out


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of engines that were built already, by version; they take a process each."""
    return {"folder": tmp_path_factory.mktemp("engines")}
