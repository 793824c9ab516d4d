"""The process that looks: what it loads may crash or leave memory behind, and takes only it along.

``python -m rt_ris.cli.probe_child gpus`` asks the CUDA driver, ``... MODULE`` imports an engine.
Each prints one JSON object; a failure prints ``{"fault": ...}``.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import sys
from collections.abc import Sequence
from typing import Final

LIBRARY: Final = "nvcuda.dll" if os.name == "nt" else "libcuda.so.1"

# cuda.h, CUdevice_attribute
_INTEGRATED: Final = 18
_MAJOR: Final = 75
_MINOR: Final = 76

_NO_DEVICE: Final = 100


class Refused(Exception):
    """The driver answered a call with an error."""


def main(words: Sequence[str]) -> int:
    """Look at one thing and print what is there."""
    try:
        found = gpus() if words[0] == "gpus" else module(words[0])
    except (Refused, ImportError, OSError, AttributeError) as error:
        found = {"fault": str(error).splitlines()[0] if str(error) else type(error).__name__}
    print("\n" + json.dumps(found), flush=True)
    return 0


def module(name: str) -> dict[str, object]:
    """Import an engine: its version, and the providers of ONNX Runtime."""
    importlib.import_module("rt_ris.backends")  # switches ONNX Runtime's telemetry off
    engine = importlib.import_module(name)
    found: dict[str, object] = {"version": str(engine.__version__)}
    if hasattr(engine, "get_available_providers"):
        found["providers"] = list(engine.get_available_providers())
    return found


def gpus() -> dict[str, object]:
    """The driver's version of CUDA and its GPUs.

    Raises:
        Refused: the driver is there and cannot be used.
        OSError: there is no driver.
    """
    cuda = ctypes.CDLL(LIBRARY)
    version, count = ctypes.c_int(), ctypes.c_int()
    _ask(cuda, "cuDriverGetVersion", ctypes.byref(version))
    found: dict[str, object] = {"cuda": version.value, "gpus": []}
    status = int(cuda.cuInit(0))
    if status == _NO_DEVICE:
        return found
    if status:
        return {**found, "fault": f"cuInit failed with CUDA error {status}"}
    _ask(cuda, "cuDeviceGetCount", ctypes.byref(count))
    return {**found, "gpus": [_gpu(cuda, ordinal) for ordinal in range(count.value)]}


def _gpu(cuda: ctypes.CDLL, ordinal: int) -> dict[str, object]:
    device, name, total = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    _ask(cuda, "cuDeviceGet", ctypes.byref(device), ordinal)
    _ask(cuda, "cuDeviceGetName", name, len(name), device)
    _ask(cuda, "cuDeviceTotalMem_v2", ctypes.byref(total), device)
    major, minor = (_attribute(cuda, which, device) for which in (_MAJOR, _MINOR))
    return {
        "name": name.value.decode("utf-8", "replace"),
        "sm": 10 * major + minor,
        "total_mib": total.value >> 20,
        "free_mib": _free_mib(cuda, device),
        "integrated": bool(_attribute(cuda, _INTEGRATED, device)),
    }


def _attribute(cuda: ctypes.CDLL, which: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _ask(cuda, "cuDeviceGetAttribute", ctypes.byref(value), which, device)
    return value.value


def _free_mib(cuda: ctypes.CDLL, device: ctypes.c_int) -> int | None:
    """Free device memory; asking takes a context, which itself may find no room."""
    context, free, total = ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    try:
        _ask(cuda, "cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        _ask(cuda, "cuCtxSetCurrent", context)
        _ask(cuda, "cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
    except Refused:
        return None
    return free.value >> 20


def _ask(cuda: ctypes.CDLL, call: str, *arguments: object) -> None:
    status = int(getattr(cuda, call)(*arguments))
    if status:
        raise Refused(f"{call} failed with CUDA error {status}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
