"""ONNX Runtime on the processor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import onnxruntime

from rt_ris.backends import LEAST_FOR_OWN_OPERATORS
from rt_ris.backends.base import Array, Runner
from rt_ris.errors import BackendError, TargetMismatchError
from rt_ris.manifest import StageArtefact
from rt_ris.spec import StageSpec, TensorSpec

PROVIDERS = ("CPUExecutionProvider",)
FORMATS = ("onnx", "onnxruntime")
UNSAFE_IN_HALF = ("NchwcTransformer",)
"""Optimisers of ONNX Runtime (1.31) that crash the process on some half-precision graphs."""

_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(uint8)": "uint8",
    "tensor(int32)": "int32",
    "tensor(int64)": "int64",
    "tensor(bool)": "bool",
}


class _Argument(Protocol):
    """An input or output of a graph, as the engine describes it."""

    name: str
    type: str
    shape: Sequence[int | str | None]


class _Engine(Protocol):
    """The part of ``onnxruntime.InferenceSession`` that is used here; it ships no types."""

    def get_inputs(self) -> Sequence[_Argument]: ...
    def get_outputs(self) -> Sequence[_Argument]: ...
    def get_providers(self) -> Sequence[str]: ...
    def run(self, names: Sequence[str], feeds: Mapping[str, Array]) -> Sequence[Array]: ...


class OnnxRuntimeRunner(Runner):
    """A stage in an ONNX Runtime session; may be run by several threads at once."""

    def __init__(self, spec: StageSpec, engine: _Engine) -> None:
        super().__init__(spec)
        self._engine: _Engine | None = engine
        self._names = [output.name for output in spec.outputs]

    def _run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        if self._engine is None:
            raise BackendError(f"Stage '{self.spec.id}' was closed; load the bundle again.")
        names = (spec.name for spec in self.spec.inputs)
        try:
            return self._engine.run(self._names, dict(zip(names, inputs, strict=True)))
        except Exception as error:  # the engine's own classes are not public
            raise BackendError(
                f"ONNX Runtime failed in stage '{self.spec.id}': {error}. Fewer sentences at once "
                "need less memory."
            ) from error

    def close(self) -> None:
        """Free the session."""
        self._engine = None


def versions() -> Mapping[str, str]:
    """Version and providers of the engine."""
    return {
        "onnxruntime": str(onnxruntime.__version__),
        "providers": ", ".join(onnxruntime.get_available_providers()),
    }


def open_stage(
    artefact: StageArtefact, model: bytes, *, data: bytes = b"", threads: int | None
) -> Runner:
    """Open a stage; see ``rt_ris.backends.base.Backend``."""
    spec, target = artefact.spec, artefact.target
    if target.format not in FORMATS or target.device != "any":
        raise TargetMismatchError(
            f"Stage '{spec.id}' is a {target.format} for device '{target.device}'; ONNX Runtime "
            f"opens {' and '.join(FORMATS)} for any device. Choose another backend.",
            expected="onnx any",
            found=f"{target.format} {target.device}",
        )
    if target.format == "onnxruntime":
        _check_version(spec)
    try:
        engine = cast(
            _Engine,
            onnxruntime.InferenceSession(
                model,
                sess_options=_options(threads, f"{artefact.file}.data", data),
                providers=list(PROVIDERS),
                disabled_optimizers=[] if target.precision == "fp32" else list(UNSAFE_IN_HALF),
            ),
        )
    except Exception as error:  # the engine's own classes are not public
        raise BackendError(f"ONNX Runtime refused stage '{spec.id}': {error}") from error
    _check_providers(spec, engine)
    _check_arguments(spec, spec.inputs, engine.get_inputs())
    _check_arguments(spec, spec.outputs, engine.get_outputs())
    return OnnxRuntimeRunner(spec, engine)


def _check_version(spec: StageSpec) -> None:
    found = str(onnxruntime.__version__)
    if tuple(map(int, found.split(".")[:2])) < LEAST_FOR_OWN_OPERATORS:
        least = ".".join(map(str, LEAST_FOR_OWN_OPERATORS))
        raise TargetMismatchError(
            f"ONNX Runtime {found} computes the attention of stage '{spec.id}' wrongly for several "
            f"sentences at once. Use {least} or later: pip install --upgrade onnxruntime. Or "
            "export with --target onnx.",
            expected=f"{least} or later",
            found=found,
        )


def _options(threads: int | None, name: str, data: bytes) -> object:
    options = onnxruntime.SessionOptions()
    if data:
        options.add_external_initializers_from_files_in_memory([name], [data], [len(data)])
    options.intra_op_num_threads = threads or 0
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # a pattern is learnt in the first run, whose memory is kept beside it: twice the peak (1.31)
    options.enable_mem_pattern = False
    # waiting threads would burn the processor time that other stages and processes need
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


def _check_providers(spec: StageSpec, engine: _Engine) -> None:
    found = list(engine.get_providers())
    if found != list(PROVIDERS):
        raise BackendError(
            f"ONNX Runtime opened stage '{spec.id}' on {found} instead of {list(PROVIDERS)}."
        )


def _check_arguments(
    spec: StageSpec, declared: Sequence[TensorSpec], found: Sequence[_Argument]
) -> None:
    """Compare the graph's names, types and fixed axes with the manifest."""
    by_name = {argument.name: argument for argument in found}
    for tensor in declared:
        argument = by_name.pop(tensor.name, None)
        if argument is None or not _agrees(tensor, argument):
            shown = f"{argument.type} {list(argument.shape)}" if argument else "nothing"
            raise BackendError(
                f"Stage '{spec.id}': the manifest declares {tensor}, the graph has {shown}. Export "
                "the bundle again."
            )
    if by_name:
        raise BackendError(
            f"Stage '{spec.id}': the graph has '{next(iter(by_name))}', which the manifest does "
            "not declare. Export the bundle again."
        )


def _agrees(tensor: TensorSpec, argument: _Argument) -> bool:
    if _TYPES.get(argument.type) != tensor.dtype or len(argument.shape) != len(tensor.shape):
        return False
    pairs = zip(tensor.shape, argument.shape, strict=True)
    return all(size == axis or not isinstance(size, int) for axis, size in pairs)
