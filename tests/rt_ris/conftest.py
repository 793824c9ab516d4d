"""The tiny bundle, and a network of fakes whose runs can be counted."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from rt_ris.backends.fake import FakeRunner
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
def picture() -> npt.NDArray[np.uint8]:
    """A red thing on the left, a blue one on the right, uint8 [24, 40, 3]."""
    pixels = np.full((24, 40, 3), 30, dtype=np.uint8)
    pixels[4:20, 4:16] = (220, 40, 30)
    pixels[8:22, 24:36] = (30, 60, 230)
    return pixels
