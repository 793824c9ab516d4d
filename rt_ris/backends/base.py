"""What every backend offers: a runner, that is one stage opened on one engine.

The base class owns the checks; a backend implements ``_run`` and ``close``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from rt_ris.bundle import Bundle
from rt_ris.errors import BackendError, ShapeError
from rt_ris.manifest import StageArtefact
from rt_ris.spec import TOKEN_IDS, TOKEN_MASK, StageSpec, TensorSpec

Array: TypeAlias = npt.NDArray[Any]


class Backend(Protocol):
    """A module of this package that opens the graphs of a bundle."""

    def versions(self) -> Mapping[str, str]:
        """Names and versions of what the backend runs on, and its devices."""

    def open_stage(
        self, artefact: StageArtefact, model: bytes, *, data: bytes = b"", threads: int | None
    ) -> Runner:
        """Open a stage from the bytes of its file.

        Args:
            artefact: what the manifest says of it.
            model: the file's bytes, already checked.
            data: those of ``<file>.data``, which holds the weights of a graph beyond 2 GiB.
            threads: processor threads; None leaves the choice to the engine.

        Raises:
            BackendError: the engine refuses the file.
            TargetMismatchError: the file was made for something else.
        """


class EngineBackend(Protocol):
    """A module of this package that opens engines which were built from a bundle."""

    def versions(self, target: str) -> Mapping[str, str]:
        """Names and versions of what the engines of a target run on, and its devices."""

    def stage_opener(
        self, bundle: Bundle, *, target: str, folder: Path | None, allow_unverified: bool
    ) -> Callable[[StageSpec], Runner]:
        """What opens the engine of each stage; see ``rt_ris.backends.stage_opener``."""


class Runner(ABC):
    """One stage, ready to run.

    Attributes:
        spec: the stage's tensors; what goes in and comes out is checked against them.
    """

    def __init__(self, spec: StageSpec) -> None:
        self.spec = spec

    def run(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Compute the outputs of the stage.

        Args:
            inputs: arrays by name; what the stage does not read is ignored.

        Returns:
            New arrays by name, owned by the caller.

        Raises:
            ShapeError: an input is missing, or differs from its declaration.
            BackendError: the engine failed, or gave something else than was declared.
        """
        given = [self._input(spec, inputs) for spec in self.spec.inputs]
        expressions = self._expressions(given)
        made = self._run(given)
        if len(made) != len(self.spec.outputs):
            raise BackendError(
                f"Stage '{self.spec.id}' gave {len(made)} outputs; the bundle declares "
                f"{len(self.spec.outputs)}."
            )
        for spec, array in zip(self.spec.outputs, made, strict=True):
            if not _fits(spec, array, expressions):
                raise BackendError(
                    f"Stage '{self.spec.id}' gave '{spec.name}' as {_kind(array)}; the bundle "
                    f"declares {_declared(spec)}. The file is not the one the manifest describes; "
                    "export the bundle again."
                )
        return {spec.name: array for spec, array in zip(self.spec.outputs, made, strict=True)}

    @abstractmethod
    def _run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        """Compute the outputs, in declared order, from checked inputs in declared order.

        Inputs may be read-only and may be shared with caches: never write into them, nor return
        memory that they own.
        """

    @abstractmethod
    def close(self) -> None:
        """Give memory and device back; the runner is not used again."""

    def _input(self, spec: TensorSpec, inputs: Mapping[str, Array]) -> Array:
        if spec.name not in inputs:
            raise ShapeError(
                f"Stage '{self.spec.id}' needs '{spec.name}' {_declared(spec)}; given were "
                f"{', '.join(sorted(inputs)) or 'none'}."
            )
        array = inputs[spec.name]
        if not _fits(spec, array, None):
            raise ShapeError(
                f"Stage '{self.spec.id}' got '{spec.name}' as {_kind(array)}; the bundle declares "
                f"{_declared(spec)}.{_hint(spec)}"
            )
        return array

    def _expressions(self, given: Sequence[Array]) -> int | None:
        """N of this run; None for a stage that reads no sentences."""
        pairs = zip(self.spec.inputs, given, strict=True)
        counts = {spec.name: len(array) for spec, array in pairs if isinstance(spec.shape[0], str)}
        if len(set(counts.values())) > 1:
            raise ShapeError(
                f"Stage '{self.spec.id}' got different numbers of sentences: {counts}; give the "
                "same number everywhere."
            )
        return next(iter(counts.values()), None)


def _fits(spec: TensorSpec, array: Array, expressions: int | None) -> bool:
    if array.dtype != np.dtype(spec.dtype) or array.ndim != len(spec.shape):
        return False
    for axis, size in zip(spec.shape, array.shape, strict=True):
        if isinstance(axis, int):
            if axis != size:
                return False
        elif size < 1 or expressions not in (None, size):
            return False
    return True


def _kind(array: Array) -> str:
    return f"{array.dtype} {list(array.shape)}"


def _declared(spec: TensorSpec) -> str:
    return f"{spec.dtype} [{', '.join(str(axis) for axis in spec.shape)}]"


def _hint(spec: TensorSpec) -> str:
    if spec.name in (TOKEN_IDS, TOKEN_MASK):
        return (
            f" Sentences are cut and padded to {spec.shape[1]} tokens by the tokenizer; did you "
            "pass your own tensor?"
        )
    return " Did you pass your own tensor, or one of another bundle?"
