"""CUDA's runtime API over host memory, with the names of ``cuda.bindings.runtime``.

What is put on a stream happens when somebody waits for it, so that nobody sees a result too early.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any


class cudaError_t(enum.Enum):  # CUDA's own name
    cudaSuccess = 0
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorIllegalAddress = 700


class cudaMemcpyKind(enum.Enum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


OK = cudaError_t.cudaSuccess


@dataclass
class Cudart:
    """One GPU; ``memory_mib`` and what else is public may be changed by a test."""

    name: bytes = b"NVIDIA Test 4000\0\0\0"
    major: int = 8
    minor: int = 9
    multiprocessors: int = 24
    memory_mib: int = 8192
    cuda: int = 12060
    present: bool = True
    capacity: int = 1 << 30
    faults: set[str] = field(default_factory=set)
    live: dict[int, Any] = field(default_factory=dict)
    streams: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    current: int | None = None

    def module(self) -> ModuleType:
        made = ModuleType("cuda.bindings.runtime")
        made.__dict__.update(
            cudaError_t=cudaError_t,
            cudaMemcpyKind=cudaMemcpyKind,
            cudaHostAllocDefault=0,
            cudaStreamNonBlocking=1,
            **{
                name: self._guarded(name)
                for name in dir(self)
                if name.startswith("cuda") and name != "cuda"
            },
        )
        return made

    def _guarded(self, name: str) -> Callable[..., tuple[Any, ...]]:
        def call(*given: Any) -> tuple[Any, ...]:
            if not self.present:
                return (cudaError_t.cudaErrorInsufficientDriver, None)[: 1 + (name != SET)]
            if name in self.faults:
                return (cudaError_t.cudaErrorIllegalAddress, None)
            found: tuple[Any, ...] = getattr(self, name)(*given)
            return found

        return call

    def cudaSetDevice(self, device: int) -> tuple[Any, ...]:
        self.current = device
        return (OK,)

    def cudaGetDeviceProperties(self, device: int) -> tuple[Any, ...]:
        facts = SimpleNamespace(
            name=self.name,
            major=self.major,
            minor=self.minor,
            multiProcessorCount=self.multiprocessors,
            totalGlobalMem=self.memory_mib << 20,
        )
        return OK, facts

    def cudaDriverGetVersion(self) -> tuple[Any, ...]:
        return OK, self.cuda

    def cudaMalloc(self, size: int) -> tuple[Any, ...]:
        return self._allocate(size)

    def cudaHostAlloc(self, size: int, flags: int) -> tuple[Any, ...]:
        return self._allocate(size)

    def cudaFree(self, pointer: int) -> tuple[Any, ...]:
        del self.live[pointer]
        return (OK,)

    def cudaFreeHost(self, pointer: int) -> tuple[Any, ...]:
        del self.live[pointer]
        return (OK,)

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[Any, ...]:
        stream = 0x5000 + len(self.streams)
        self.streams[stream] = []
        return OK, stream

    def cudaStreamDestroy(self, stream: int) -> tuple[Any, ...]:
        del self.streams[stream]
        return (OK,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[Any, ...]:
        todo, self.streams[stream][:] = list(self.streams[stream]), []
        for each in todo:
            each()
        return (OK,)

    def cudaMemcpyAsync(
        self, to: int, source: int, size: int, kind: cudaMemcpyKind, stream: int
    ) -> tuple[Any, ...]:
        for pointer in (to, source):
            assert size <= len(self.live[pointer]), "a copy beyond its buffer"
        self.streams[stream].append(lambda: ctypes.memmove(to, source, size) and None)
        return (OK,)

    def _allocate(self, size: int) -> tuple[Any, ...]:
        if sum(len(memory) for memory in self.live.values()) + size > self.capacity:
            return cudaError_t.cudaErrorMemoryAllocation, None
        memory = (ctypes.c_uint8 * size)(*b"\xaa" * min(size, 64))
        self.live[ctypes.addressof(memory)] = memory
        return OK, ctypes.addressof(memory)


SET = "cudaSetDevice"
