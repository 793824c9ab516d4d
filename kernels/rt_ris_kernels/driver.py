"""The few CUDA driver calls that launching needs, over cuda-bindings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np

from rt_ris.errors import BackendError, MissingExtraError, ShapeError
from rt_ris_kernels.geometry import Launch


class Driver(Protocol):
    """What a launcher asks of CUDA; tests put a recorder in its place."""

    def cuda_version(self) -> int:
        """Of the driver: 12060 for CUDA 12.6."""

    def compute_capability(self, device: int) -> int:
        """Of a device, times ten: 90 for 9.0."""

    def multiprocessors(self, device: int) -> int:
        """Of a device."""

    def current_device(self) -> int:
        """The device of the calling thread's context; 0 where it has none."""

    def device_of_pointer(self, pointer: int, *, name: str) -> int:
        """The device whose memory a pointer is in; ``name`` is for messages."""

    def device_of_stream(self, stream: int) -> int:
        """The device of a stream; 0 is the default stream of the current context."""

    def load(self, code: bytes, *, device: int) -> object:
        """A library of kernels."""

    def kernel(self, library: object, name: str, *, device: int, shared_bytes: int) -> object:
        """A kernel that may use so much dynamic shared memory."""

    def launch(
        self, kernel: object, launch: Launch, *, arguments: int, stream: int, dependent: bool
    ) -> None:
        """Puts a launch on a stream.

        ``arguments`` is the address of the parameter structure. ``dependent`` lets the kernel
        start while the one before it on the stream ends (compute capability 9.0).
        """


class CudaDriver:
    """The real one.

    Raises:
        MissingExtraError: cuda-bindings is not installed.
        BackendError: there is no usable driver.
    """

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] != "cuda":
                raise
            raise MissingExtraError(
                "Launching CUDA kernels needs cuda-bindings: pip install 'rt-ris[cuda]'.",
                extra="cuda",
                module="cuda.bindings",
            ) from error
        self._cuda: Any = driver
        self._check(driver.cuInit(0), "cuInit")
        self._contexts: dict[int, object] = {}
        self._configs: dict[tuple[Launch, int, bool], object] = {}

    def cuda_version(self) -> int:
        """See ``Driver``."""
        return int(self._check(self._cuda.cuDriverGetVersion(), "cuDriverGetVersion"))

    def compute_capability(self, device: int) -> int:
        """See ``Driver``."""
        names = self._cuda.CUdevice_attribute
        major = self._attribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
        minor = self._attribute(names.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device)
        return 10 * major + minor

    def multiprocessors(self, device: int) -> int:
        """See ``Driver``."""
        name = self._cuda.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
        return self._attribute(name, device)

    def device_of_pointer(self, pointer: int, *, name: str) -> int:
        """See ``Driver``.

        Raises:
            ShapeError: the address is not in memory that CUDA knows.
        """
        attribute = self._cuda.CUpointer_attribute.CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL
        status, ordinal = self._cuda.cuPointerGetAttribute(attribute, pointer)
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            raise ShapeError(f"'{name}' at {pointer:#x} is not GPU memory ({status.name}).")
        return int(ordinal)

    def device_of_stream(self, stream: int) -> int:
        """See ``Driver``."""
        context = self._check(self._cuda.cuStreamGetCtx(stream), "cuStreamGetCtx")
        self._check(self._cuda.cuCtxPushCurrent(context), "cuCtxPushCurrent")
        try:
            return int(self._check(self._cuda.cuCtxGetDevice(), "cuCtxGetDevice"))
        finally:
            self._check(self._cuda.cuCtxPopCurrent(), "cuCtxPopCurrent")

    def current_device(self) -> int:
        """See ``Driver``."""
        status, device = self._cuda.cuCtxGetDevice()
        return int(device) if status == self._cuda.CUresult.CUDA_SUCCESS else 0

    def load(self, code: bytes, *, device: int) -> object:
        """See ``Driver``."""
        with self._on(device):
            loaded = self._cuda.cuLibraryLoadData(code, [], [], 0, [], [], 0)
        return self._check(loaded, "cuLibraryLoadData")

    def kernel(self, library: object, name: str, *, device: int, shared_bytes: int) -> object:
        """See ``Driver``."""
        found = self._check(self._cuda.cuLibraryGetKernel(library, name.encode()), name)
        attribute = self._cuda.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        with self._on(device):
            done = self._cuda.cuKernelSetAttribute(attribute, shared_bytes, found, device)
        self._check(done, name)
        return found

    def launch(
        self, kernel: object, launch: Launch, *, arguments: int, stream: int, dependent: bool
    ) -> None:
        """See ``Driver``."""
        key = (launch, stream, dependent)
        if key not in self._configs:
            self._configs[key] = self._configure(*key)
        function = self._cuda.CUfunction(int(kernel))  # type: ignore[call-overload]
        parameters = np.array([arguments], np.uint64)  # pointers to the kernel's one parameter
        self._check(
            self._cuda.cuLaunchKernelEx(self._configs[key], function, parameters.ctypes.data, 0),
            launch.kernel,
        )

    def _configure(self, launch: Launch, stream: int, dependent: bool) -> object:
        config = self._cuda.CUlaunchConfig()
        config.gridDimX, config.gridDimY = launch.grid
        config.gridDimZ = 1
        config.blockDimX, config.blockDimY, config.blockDimZ = launch.threads, 1, 1
        config.sharedMemBytes = launch.shared_bytes
        config.hStream = stream
        if dependent:
            attribute = self._cuda.CUlaunchAttribute()
            attribute.id = (
                self._cuda.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
            )
            attribute.value.programmaticStreamSerializationAllowed = 1
            config.attrs = [attribute]
            config.numAttrs = 1
        return config

    @contextmanager
    def _on(self, device: int) -> Iterator[None]:
        """With a device's context current; the caller's is current again afterwards."""
        if device not in self._contexts:
            retained = self._cuda.cuDevicePrimaryCtxRetain(device)
            self._contexts[device] = self._check(retained, "cuDevicePrimaryCtxRetain")
        self._check(self._cuda.cuCtxPushCurrent(self._contexts[device]), "cuCtxPushCurrent")
        try:
            yield
        finally:
            self._check(self._cuda.cuCtxPopCurrent(), "cuCtxPopCurrent")

    def _attribute(self, name: object, device: int) -> int:
        return int(self._check(self._cuda.cuDeviceGetAttribute(name, device), "device attribute"))

    def _check(self, result: tuple[Any, ...], what: str) -> Any:
        status, *values = result
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            raise BackendError(f"CUDA refused {what}: {status.name}.")
        return values[0] if values else None
