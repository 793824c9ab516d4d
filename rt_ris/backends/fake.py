"""A backend without an engine: right shapes and repeatable numbers, for tests and dry runs.

Every output is computed from the values of the inputs and from the stage's name, each sentence by
itself, so that it does not matter in which company a sentence is sent.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np

from rt_ris.backends.base import Array, Runner
from rt_ris.manifest import StageArtefact
from rt_ris.spec import StageSpec, TensorSpec


class FakeRunner(Runner):
    """Gives pseudo-random numbers that depend on the inputs only.

    Attributes:
        runs: how often it ran.
        rows: N of each run, 1 for a stage that reads no sentences.
    """

    def __init__(self, spec: StageSpec) -> None:
        super().__init__(spec)
        self.rows: list[int] = []

    @property
    def runs(self) -> int:
        """How often the stage ran."""
        return len(self.rows)

    def _run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        count = max(len(array) for array in inputs)
        self.rows.append(count)
        seeds = [_seed(self.spec.id, inputs, row) for row in range(count)]
        return [_output(spec, seeds, number) for number, spec in enumerate(self.spec.outputs)]

    def close(self) -> None:
        """Nothing to give back."""


def versions() -> Mapping[str, str]:
    """There is no engine."""
    return {"fake": "1"}


def open_stage(
    artefact: StageArtefact, model: bytes, *, data: bytes = b"", threads: int | None
) -> Runner:
    """Open a stage; the file's bytes are not looked at."""
    return FakeRunner(artefact.spec)


def _seed(stage_id: str, inputs: Sequence[Array], row: int) -> int:
    digest = hashlib.sha256(stage_id.encode())
    for array in inputs:
        digest.update(np.ascontiguousarray(array[row if len(array) > 1 else 0]).tobytes())
    return int.from_bytes(digest.digest()[:8], "little")


def _output(spec: TensorSpec, seeds: Sequence[int], number: int) -> Array:
    shape = [axis for axis in spec.shape[1:] if isinstance(axis, int)]
    rows = [np.random.default_rng([seed, number]).normal(0, 3, shape) for seed in seeds]
    return np.stack(rows).astype(spec.dtype)
