"""Engines on a GPU: one code for TensorRT 10.3 and later, TensorRT 11 and TensorRT-RTX.

Buffers are made once, for the most sentences that an engine takes: on the device, and pinned on
the host for the copies. A run copies in, picks the profile of its number of sentences, executes
and copies out, all on one stream. No TensorRT engine has been run by the authors yet; what stands
for it in the tests is made from the signatures of the real bindings (``docs/engines.md``).
"""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

import numpy as np
import numpy.typing as npt

from rt_ris.backends import cuda
from rt_ris.backends.base import Array, Runner
from rt_ris.backends.cuda import Cuda
from rt_ris.build.find import find_engines, read_engine
from rt_ris.build.gate import check_gate
from rt_ris.build.log import error_log
from rt_ris.build.record import EngineRecord, Here, default_folder
from rt_ris.build.request import MODULES, Target
from rt_ris.bundle import Bundle
from rt_ris.errors import BackendError, PluginError
from rt_ris.spec import StageSpec, TensorSpec

_TYPES: Final = {
    "float32": "FLOAT",
    "float16": "HALF",
    "uint8": "UINT8",
    "int32": "INT32",
    "int64": "INT64",
    "bool": "BOOL",
}
"""Names of TensorRT's types by NumPy's."""


def here(target: Target) -> Here:
    """What engines would run on: the installed library and the GPU.

    Raises:
        ModuleNotFoundError: the library is not installed.
        TargetMismatchError: there is no usable GPU.
        MissingExtraError: cuda-bindings is not installed.
    """
    trt = importlib.import_module(MODULES[target])
    return Here(target=target, version=str(trt.__version__), gpu=cuda.open_cuda().gpu())


def versions(target: Target) -> Mapping[str, str]:
    """Version of the library, and the GPU."""
    found = here(target)
    gpu = f"{found.gpu.name}, compute capability {cuda.dotted(found.gpu.sm)}, {found.gpu.driver}"
    return {MODULES[target]: found.version, "gpu": gpu}


def stage_opener(
    bundle: Bundle, *, target: Target, folder: Path | None, allow_unverified: bool
) -> Callable[[StageSpec], Runner]:
    """What opens the engine of a stage, after all engines were found and checked.

    Args:
        bundle: whose engines.
        target: which library runs them.
        folder: where they are; None is beside the bundle.
        allow_unverified: open engines of which no gate record says that they passed here.

    Raises:
        OutputError, IntegrityError, TargetMismatchError: see ``find_engines`` and ``check_gate``.
        PluginError: an engine asks for our plugins, and they cannot be had.
    """
    where = folder or default_folder(bundle.path)
    place = here(target)
    records = find_engines(where, bundle, place)
    if not allow_unverified:
        check_gate(where, bundle, place, records)
    trt = importlib.import_module(MODULES[target])
    if any(record.plugin for record in records.values()):
        _register_plugins(trt)

    def opened(stage: StageSpec) -> Runner:
        record = records[stage.id]
        return open_engine(trt, stage, record, read_engine(where, record), gpu=cuda.open_cuda())

    return opened


def open_engine(
    trt: Any, spec: StageSpec, record: EngineRecord, plan: bytes, *, gpu: Cuda
) -> Runner:
    """Open an engine whose bytes have been checked; our plugins must be registered if it has any.

    Raises:
        BackendError: TensorRT refuses it, its tensors are not the stage's, or memory is exhausted.
    """
    gpu.use()
    log = error_log(trt)
    runtime = trt.Runtime(log)  # as it is, it refuses plans that carry code for the host
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        _refuse(log, f"TensorRT does not open '{record.engine}'", "Build it again")
    _check_tensors(trt, spec, engine)
    profiles = _profiles(spec, engine)
    context = engine.create_execution_context()
    if context is None:
        _refuse(
            log,
            f"TensorRT cannot prepare to run '{record.engine}'",
            "The GPU's memory may be exhausted: close what else uses it, or use a smaller network",
        )
    return TensorRtRunner(
        spec, _Parts(context=context, engine=engine, runtime=runtime, log=log), profiles, gpu=gpu
    )


@dataclass(frozen=True, kw_only=True)
class _Parts:
    """TensorRT's objects, each of which needs the later ones alive."""

    context: Any
    engine: Any
    runtime: Any
    log: Any


@dataclass(frozen=True, kw_only=True)
class _Buffer:
    """One tensor's memory.

    Attributes:
        device: address on the GPU.
        host: address of pinned memory of the same size.
        view: uint8 [size], that pinned memory.
    """

    device: int
    host: int
    view: npt.NDArray[np.uint8]


class TensorRtRunner(Runner):
    """A stage in an engine; threads that call it take turns.

    Args:
        spec: the stage.
        parts: the opened engine.
        profiles: least and most sentences of each optimisation profile; empty for a stage that
            reads no sentences.
        gpu: where it runs.

    Raises:
        BackendError: the GPU's memory, or pinned memory of the host, is exhausted.
    """

    def __init__(
        self, spec: StageSpec, parts: _Parts, profiles: Sequence[tuple[int, int]], *, gpu: Cuda
    ) -> None:
        super().__init__(spec)
        self._parts: _Parts | None = parts
        self._profiles = profiles
        self._profile = 0
        self._gpu = gpu
        self._lock = threading.Lock()
        with ExitStack() as owned:
            self._stream = gpu.stream()
            owned.callback(gpu.destroy_stream, self._stream)
            most = max((high for _, high in profiles), default=1)
            self._buffers = {
                tensor.name: self._buffer(tensor.nbytes(expressions=most), owned)
                for tensor in (*spec.inputs, *spec.outputs)
            }
            self._owned = owned.pop_all()

    def _run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        count = self._count(inputs)
        with self._lock:
            if self._parts is None:
                raise BackendError(f"Stage '{self.spec.id}' was closed; load the bundle again.")
            self._gpu.use()
            self._parts.log.errors.clear()
            with self._finished():
                self._use_profile(self._parts, count)
                for tensor, array in zip(self.spec.inputs, inputs, strict=True):
                    self._upload(self._parts, tensor, array)
                for tensor in self.spec.outputs:
                    self._place(self._parts, tensor)
                if not self._parts.context.execute_async_v3(self._stream):
                    self._failed(self._parts, "did not execute")
                for tensor in self.spec.outputs:
                    self._download(tensor, count)
            return [self._copied(tensor, count) for tensor in self.spec.outputs]

    def close(self) -> None:
        """Free the engine and its memory."""
        with self._lock:
            if self._parts is not None:
                self._gpu.use()
                self._parts = None
                self._owned.close()

    def _count(self, inputs: Sequence[Array]) -> int:
        """N of a run; 1 for a stage that reads no sentences."""
        pairs = zip(self.spec.inputs, inputs, strict=True)
        return next((len(array) for tensor, array in pairs if _is_free(tensor)), 1)

    def _buffer(self, size: int, owned: ExitStack) -> _Buffer:
        device = self._gpu.allocate(size)
        owned.callback(self._gpu.free, device)
        host = self._gpu.allocate_pinned(size)
        owned.callback(self._gpu.free_pinned, host)
        memory = (ctypes.c_uint8 * size).from_address(host)
        return _Buffer(device=device, host=host, view=np.frombuffer(memoryview(memory), np.uint8))

    @contextmanager
    def _finished(self) -> Iterator[None]:
        """Leave only when the stream is done, since the next run writes into the same memory."""
        try:
            yield
        finally:
            self._gpu.wait(self._stream)

    def _use_profile(self, parts: _Parts, count: int) -> None:
        fitting = [at for at, (low, high) in enumerate(self._profiles) if low <= count <= high]
        if not self._profiles or self._profile in fitting:
            return
        if not fitting:
            most = max(high for _, high in self._profiles)
            raise BackendError(
                f"Stage '{self.spec.id}' got N = {count} sentences at once; its engine takes N of "
                f"1 to {most}. Load the bundle with max_expressions={most} or less, and more "
                "sentences are split."
            )
        self._profile = -1  # unknown until it is changed
        if not parts.context.set_optimization_profile_async(fitting[0], self._stream):
            self._failed(parts, f"refused its profile {fitting[0]} for {count} sentences")
        self._profile = fitting[0]

    def _upload(self, parts: _Parts, tensor: TensorSpec, array: Array) -> None:
        buffer = self._buffers[tensor.name]
        size = array.nbytes
        buffer.view[:size] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        self._gpu.upload(buffer.device, buffer.host, size, self._stream)
        if not parts.context.set_input_shape(tensor.name, tuple(array.shape)):
            self._failed(parts, f"refused '{tensor.name}' of shape {list(array.shape)}")
        self._place(parts, tensor)

    def _place(self, parts: _Parts, tensor: TensorSpec) -> None:
        if not parts.context.set_tensor_address(tensor.name, self._buffers[tensor.name].device):
            self._failed(parts, f"refused the memory of '{tensor.name}'")

    def _download(self, tensor: TensorSpec, count: int) -> None:
        buffer = self._buffers[tensor.name]
        size = tensor.nbytes(expressions=count)
        self._gpu.download(buffer.host, buffer.device, size, self._stream)

    def _copied(self, tensor: TensorSpec, count: int) -> Array:
        raw = self._buffers[tensor.name].view[: tensor.nbytes(expressions=count)]
        shape = [count if isinstance(axis, str) else axis for axis in tensor.shape]
        made: Array = raw.copy().view(tensor.dtype).reshape(shape)
        return made

    def _failed(self, parts: _Parts, what: str) -> NoReturn:
        said = "; ".join(parts.log.errors[-3:]) or "it gave no reason"
        raise BackendError(
            f"The engine of stage '{self.spec.id}' {what}: {said}. Load the bundle again with a "
            "smaller max_expressions; if that fails too, build its engines again."
        )


def _register_plugins(trt: Any) -> None:
    try:
        kernels = importlib.import_module("rt_ris_kernels.plugin")
    except ModuleNotFoundError as error:
        raise PluginError(
            "The engines ask for our plugins, and rt_ris_kernels is not installed; reinstall "
            "rt-ris, or build the engines without them: rt-ris build --no-plugin."
        ) from error
    kernels.register(trt)


def _check_tensors(trt: Any, spec: StageSpec, engine: Any) -> None:
    """Compare the engine's names, types and fixed axes with the manifest."""
    names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
    declared = {tensor.name: True for tensor in spec.inputs}
    declared |= {tensor.name: False for tensor in spec.outputs}
    found = {name: engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT for name in names}
    if declared != found:
        raise BackendError(
            f"Stage '{spec.id}': the manifest declares {_sides(declared)}; the engine has "
            f"{_sides(found)}. Build the engines again."
        )
    for tensor in (*spec.inputs, *spec.outputs):
        kind, shape = (
            engine.get_tensor_dtype(tensor.name),
            tuple(engine.get_tensor_shape(tensor.name)),
        )
        wanted = tuple(-1 if isinstance(axis, str) else axis for axis in tensor.shape)
        fits = kind == getattr(trt.DataType, _TYPES[tensor.dtype]) and shape == wanted
        if not fits or engine.get_tensor_location(tensor.name) != trt.TensorLocation.DEVICE:
            raise BackendError(
                f"Stage '{spec.id}': the manifest declares {tensor}; the engine has {kind} "
                f"{list(shape)} at {engine.get_tensor_location(tensor.name)}. Build the engines "
                "again."
            )


def _sides(names: Mapping[str, bool]) -> str:
    return ", ".join(f"{'input' if into else 'output'} '{name}'" for name, into in names.items())


def _profiles(spec: StageSpec, engine: Any) -> list[tuple[int, int]]:
    """Least and most sentences of each profile, as the engine itself says."""
    free = [tensor.name for tensor in spec.inputs if _is_free(tensor)]
    found = []
    for index in range(engine.num_optimization_profiles) if free else ():
        least, _, most = engine.get_tensor_profile_shape(free[0], index)
        found.append((int(least[0]), int(most[0])))
    return found


def _refuse(log: Any, what: str, way_out: str) -> NoReturn:
    said = "; ".join(log.errors[-3:]) or "it gave no reason"
    raise BackendError(f"{what}: {said}. {way_out}.")


def _is_free(tensor: TensorSpec) -> bool:
    return isinstance(tensor.shape[0], str)
