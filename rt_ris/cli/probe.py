"""What a machine has, as plain data: whoever judges it can be given a machine that is not there.

Everything that may crash is looked at in a process of its own (``probe_child``). The driver is
asked through its own library, the one that cuda-bindings open, too: so a machine without them is
seen as well.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

ENGINES: Final = ("onnxruntime", "tensorrt", "tensorrt_rtx", "cuda.bindings")
"""Modules that are imported to see whether they work, not only whether they are there."""

ONNX_RUNTIMES: Final = ("onnxruntime", "onnxruntime-gpu")
"""Wheels that own one and the same module."""

PATIENCE_S: Final = 60.0


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One GPU.

    Attributes:
        sm: compute capability times ten, such as 89.
        free_mib: None where the driver did not say.
        integrated: shares the processor's memory.
    """

    name: str
    sm: int
    total_mib: int
    free_mib: int | None
    integrated: bool = False


@dataclass(frozen=True, kw_only=True)
class Engine:
    """A Python module.

    Attributes:
        version: None where it is not installed or cannot be imported.
        fault: why it cannot be imported; empty where it is not installed.
        providers: of ONNX Runtime, in its order.
    """

    version: str | None = None
    fault: str = ""
    providers: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """What our kernels take.

    Attributes:
        channels: numbers of them.
        least_sm: compute capability times ten.
        for_cuda_12: capabilities for which a driver of CUDA 12.6 will do; others need CUDA 13.
    """

    channels: tuple[int, ...]
    least_sm: int
    for_cuda_12: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What was found; what could not be looked at is None.

    Attributes:
        python: version.
        bits: of an address.
        architecture: of the processor, such as ``aarch64``.
        l4t: release of Jetson Linux, such as 36 on JetPack 6; None elsewhere.
        cuda: version of CUDA that the driver speaks, such as 12060.
        no_cuda: why there is no driver, or why it cannot be used.
        gpus: as the driver numbers them.
        engines: by module, one for each of ``ENGINES``.
        wheels: of ``ONNX_RUNTIMES``, those installed.
        kernels: None where our kernels cannot be imported or are damaged.
        memory_mib: of the processor, available.
        disk_mib: free beside the bundle.
    """

    python: str
    bits: int
    architecture: str
    l4t: int | None = None
    cuda: int | None = None
    no_cuda: str = ""
    gpus: tuple[Gpu, ...] = ()
    engines: Mapping[str, Engine] = field(default_factory=dict)
    wheels: tuple[str, ...] = ()
    kernels: Kernels | None = None
    memory_mib: int | None = None
    disk_mib: int | None = None


def probe(beside: Path) -> Machine:
    """Look at this machine; takes seconds where engines are installed, and never raises.

    Args:
        beside: a path on the disk that would hold engines.
    """
    driver = _child("gpus")
    return Machine(
        python=platform.python_version(),
        bits=64 if sys.maxsize > 2**32 else 32,
        architecture=platform.machine(),
        l4t=_l4t(Path("/etc/nv_tegra_release")),
        cuda=driver.get("cuda"),
        no_cuda=driver.get("fault", ""),
        gpus=tuple(Gpu(**gpu) for gpu in driver.get("gpus", ())),
        engines={name: engine(name) for name in ENGINES},
        wheels=tuple(name for name in ONNX_RUNTIMES if version(name) is not None),
        kernels=_kernels(),
        memory_mib=_memory_mib(),
        disk_mib=_disk_mib(beside),
    )


def version(distribution: str) -> str | None:
    """Of an installed distribution; None where it is not there."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def engine(name: str) -> Engine:
    """Whether a module can be imported, tried in a process of its own."""
    try:
        if importlib.util.find_spec(name) is None:
            return Engine()
    except (ImportError, ValueError):  # its parent package is absent, or is none
        return Engine()
    found = _child(name)
    if "fault" in found:
        return Engine(fault=found["fault"])
    return Engine(version=found["version"], providers=tuple(found.get("providers", ())))


def _child(what: str) -> Mapping[str, Any]:
    """What the process that looks found, or ``fault``."""
    command = [sys.executable, "-m", "rt_ris.cli.probe_child", what]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=PATIENCE_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return {"fault": f"looking took over {PATIENCE_S:.0f} s or failed ({type(error).__name__})"}
    told = [line for line in done.stdout.splitlines() if line.startswith("{")]
    if not told:
        return {"fault": f"the process that looked ended with code {done.returncode}"}
    found: Mapping[str, Any] = json.loads(told[-1])
    return found


def _l4t(release: Path) -> int | None:
    """The release in a line such as ``# R36 (release), REVISION: 4.3, ...``."""
    try:
        word = release.read_text("utf-8").split()[1]
    except (OSError, ValueError, IndexError):
        return None
    return int(word[1:]) if word[1:].isdigit() else None


def _kernels() -> Kernels | None:
    try:
        geometry = importlib.import_module("rt_ris_kernels.geometry")
        launch = importlib.import_module("rt_ris_kernels.launch")
        binary = importlib.import_module("rt_ris_kernels.binary").load_binary()
    except Exception:  # absent, or its binary is damaged: either way there are none to launch
        return None
    return Kernels(
        channels=tuple(geometry.CHANNELS),
        least_sm=int(launch.LEAST_CAPABILITY),
        for_cuda_12=tuple(binary.for_cuda_12),
    )


def _memory_mib(
    meminfo: Path = Path("/proc/meminfo"), limit: Path = Path("/sys/fs/cgroup/memory.max")
) -> int | None:
    """Available memory, or a container's limit where that is less; None where Linux is not."""
    try:
        lines = dict(line.split(":", 1) for line in meminfo.read_text("ascii").splitlines())
        available = int(lines["MemAvailable"].split()[0]) >> 10
    except (OSError, ValueError, KeyError):
        return None
    try:
        return min(available, int(limit.read_text("ascii")) >> 20)
    except (OSError, ValueError):  # no control group, or the word "max"
        return available


def _disk_mib(beside: Path) -> int | None:
    try:
        return shutil.disk_usage(beside).free >> 20
    except OSError:
        return None
