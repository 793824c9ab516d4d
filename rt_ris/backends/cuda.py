"""The few CUDA calls that running engines needs, over the runtime API of cuda-bindings."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from rt_ris.errors import BackendError, MissingExtraError, TargetMismatchError

DRIVER_FILE: Final = Path("/sys/module/nvidia/version")
"""Where Linux tells the version of NVIDIA's kernel module; absent on some Jetsons."""


def cuda_version(number: int) -> str:
    """A version of CUDA as NVIDIA writes it: 12060 is 12.6."""
    return f"CUDA {number // 1000}.{number % 1000 // 10}"


def dotted(sm: int) -> str:
    """A compute capability as NVIDIA writes it: 89 is 8.9."""
    return f"{sm // 10}.{sm % 10}"


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU as far as engines care; two GPUs that are equal here run the same engines.

    Attributes:
        name: NVIDIA's name of it.
        sm: compute capability times ten: 89 for 8.9.
        multiprocessors: their number.
        memory_mib: all of its memory.
        driver: the CUDA version of its driver and, where Linux tells it, the driver's own.
    """

    name: str
    sm: int
    multiprocessors: int
    memory_mib: int
    driver: str

    @property
    def slug(self) -> str:
        """The name as a part of file names, such as ``nvidia-h200``."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-") or "gpu"


class Cuda(Protocol):
    """One GPU; addresses and streams are plain integers. Tests put host memory in its place.

    Every method raises ``BackendError`` where CUDA refuses.
    """

    def gpu(self) -> Gpu:
        """What it is."""

    def use(self) -> None:
        """Make it the calling thread's; every thread must, before anything else."""

    def allocate(self, size: int) -> int:
        """Device memory of so many bytes."""

    def free(self, pointer: int) -> None:
        """Give device memory back."""

    def allocate_pinned(self, size: int) -> int:
        """Host memory that the GPU can copy from and to by itself."""

    def free_pinned(self, pointer: int) -> None:
        """Give it back."""

    def stream(self) -> int:
        """A new stream that does not wait for the default one."""

    def destroy_stream(self, stream: int) -> None:
        """Give it back."""

    def upload(self, device: int, host: int, size: int, stream: int) -> None:
        """Put a copy from pinned host memory to the device on a stream."""

    def download(self, host: int, device: int, size: int, stream: int) -> None:
        """Put a copy from the device to pinned host memory on a stream."""

    def wait(self, stream: int) -> None:
        """Until everything on a stream is done."""


class CudaRuntime:
    """The first GPU that CUDA shows; ``CUDA_VISIBLE_DEVICES`` chooses another.

    Raises:
        MissingExtraError: cuda-bindings is not installed.
        TargetMismatchError: there is no usable GPU or driver.
    """

    def __init__(self) -> None:
        try:
            self._cuda: Any = importlib.import_module("cuda.bindings.runtime")
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "cuda":
                raise
            raise MissingExtraError(
                "Running engines needs cuda-bindings, which is not installed; run: "
                "pip install cuda-bindings",
                extra="tensorrt",
                module="cuda.bindings",
            ) from error
        (status,) = self._cuda.cudaSetDevice(0)
        if status != self._cuda.cudaError_t.cudaSuccess:
            raise TargetMismatchError(
                f"There is no usable GPU here: CUDA says {status.name}. Engines run on an NVIDIA "
                "GPU with its driver; --backend onnxruntime runs on the processor.",
                expected="an NVIDIA GPU",
                found=str(status.name),
            )

    def gpu(self) -> Gpu:
        """See ``Cuda``."""
        facts = self._call("cudaGetDeviceProperties", 0)
        driver = cuda_version(int(self._call("cudaDriverGetVersion")))
        if DRIVER_FILE.is_file():
            driver += f", {DRIVER_FILE.read_text().strip()}"
        return Gpu(
            name=bytes(facts.name).split(b"\0")[0].decode("utf-8", "replace"),
            sm=10 * int(facts.major) + int(facts.minor),
            multiprocessors=int(facts.multiProcessorCount),
            memory_mib=int(facts.totalGlobalMem) >> 20,
            driver=driver,
        )

    def use(self) -> None:
        """See ``Cuda``."""
        self._call("cudaSetDevice", 0)

    def allocate(self, size: int) -> int:
        """See ``Cuda``."""
        return int(self._call("cudaMalloc", size))

    def free(self, pointer: int) -> None:
        """See ``Cuda``."""
        self._call("cudaFree", pointer)

    def allocate_pinned(self, size: int) -> int:
        """See ``Cuda``."""
        return int(self._call("cudaHostAlloc", size, self._cuda.cudaHostAllocDefault))

    def free_pinned(self, pointer: int) -> None:
        """See ``Cuda``."""
        self._call("cudaFreeHost", pointer)

    def stream(self) -> int:
        """See ``Cuda``."""
        return int(self._call("cudaStreamCreateWithFlags", self._cuda.cudaStreamNonBlocking))

    def destroy_stream(self, stream: int) -> None:
        """See ``Cuda``."""
        self._call("cudaStreamDestroy", stream)

    def upload(self, device: int, host: int, size: int, stream: int) -> None:
        """See ``Cuda``."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyHostToDevice
        self._call("cudaMemcpyAsync", device, host, size, kind, stream)

    def download(self, host: int, device: int, size: int, stream: int) -> None:
        """See ``Cuda``."""
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self._call("cudaMemcpyAsync", host, device, size, kind, stream)

    def wait(self, stream: int) -> None:
        """See ``Cuda``."""
        self._call("cudaStreamSynchronize", stream)

    def _call(self, name: str, *arguments: object) -> Any:
        status, *values = getattr(self._cuda, name)(*arguments)
        if status == self._cuda.cudaError_t.cudaErrorMemoryAllocation:
            raise BackendError(
                f"The GPU's memory is exhausted: {name} of {arguments[0]} bytes failed. Close what "
                "else uses the GPU, or use a smaller network."
            )
        if status != self._cuda.cudaError_t.cudaSuccess:
            raise BackendError(
                f"CUDA refused {name}: {status.name}. After such an error the process's GPU state "
                "may be lost; start it again, and look at `dmesg` for NVRM lines if it comes back."
            )
        return values[0] if values else None


open_cuda: Callable[[], Cuda] = CudaRuntime
"""How this process reaches its GPU; what tests replace."""
