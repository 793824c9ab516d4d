"""Looking at this machine, and at drivers that are not here."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rt_ris.cli import probe as probing
from rt_ris.cli import probe_child
from rt_ris.cli.probe import Gpu, probe

DRIVER = """
#include <stddef.h>
#include <string.h>
int cuDriverGetVersion(int *v) { *v = 12060; return 0; }
int cuInit(unsigned f) { return INIT; }
int cuDeviceGetCount(int *n) { *n = 2; return 0; }
int cuDeviceGet(int *d, int i) { *d = i; return 0; }
int cuDeviceGetName(char *s, int n, int d) { strncpy(s, d ? "Other" : "Orin", n); return 0; }
int cuDeviceTotalMem_v2(size_t *b, int d) { *b = (size_t)30 << 30; return 0; }
int cuDeviceGetAttribute(int *v, int which, int d) {
    *v = which == 75 ? 8 : which == 76 ? 7 + d : which == 18 ? !d : -1;
    return 0;
}
int cuDevicePrimaryCtxRetain(void **c, int d) { return d ? 2 : 0; }
int cuCtxSetCurrent(void *c) { return 0; }
int cuMemGetInfo_v2(size_t *f, size_t *t) { *f = (size_t)5 << 30; *t = (size_t)30 << 30; return 0; }
"""
COMPILER = shutil.which("cc") or shutil.which("gcc")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler for a made-up driver")


def driver(folder: Path, source: str) -> Path:
    """A library in the place of NVIDIA's."""
    assert COMPILER is not None
    (folder / "driver.c").write_text(source)
    library = folder / "libcuda.so.1"
    command = [COMPILER, "-shared", "-fPIC", "-o", str(library), str(folder / "driver.c")]
    subprocess.run(command, check=True)
    return library


def asked(library: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    monkeypatch.setattr(probe_child, "LIBRARY", str(library))
    return probe_child.gpus()


@needs_compiler
def test_gpus_are_read_from_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = driver(tmp_path, DRIVER.replace("INIT", "0"))
    found = asked(library, monkeypatch)
    assert found["cuda"] == 12060
    gpus = found["gpus"]
    assert isinstance(gpus, list)
    orin, other = (Gpu(**gpu) for gpu in gpus)
    assert orin == Gpu(name="Orin", sm=87, total_mib=30720, free_mib=5120, integrated=True)
    assert other == Gpu(name="Other", sm=88, total_mib=30720, free_mib=None, integrated=False)
    # the whole way, through the process that looks
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    machine = probe(tmp_path)
    assert (machine.cuda, machine.gpus, machine.no_cuda) == (12060, (orin, other), "")


@needs_compiler
@pytest.mark.parametrize(
    ("status", "fault"), [("100", None), ("999", "cuInit failed with CUDA error 999")]
)
def test_a_driver_without_gpus_and_one_that_is_broken(
    status: str, fault: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = asked(driver(tmp_path, DRIVER.replace("INIT", status)), monkeypatch)
    assert (found["cuda"], found["gpus"], found.get("fault")) == (12060, [], fault)


@needs_compiler
def test_a_driver_that_crashes_takes_nothing_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver(tmp_path, DRIVER.replace("INIT", "*(volatile int *)0"))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    machine = probe(tmp_path)
    assert machine.cuda is None
    assert "ended with code -11" in machine.no_cuda


@needs_compiler
def test_a_driver_of_other_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probe_child, "LIBRARY", str(driver(tmp_path, "int nothing;")))
        assert probe_child.main(["gpus"]) == 0
    assert "cuDriverGetVersion" in json.loads(capsys.readouterr().out)["fault"]


def test_no_driver(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_child, "LIBRARY", "libcuda-that-is-nowhere.so.1")
    assert probe_child.main(["gpus"]) == 0
    assert "libcuda-that-is-nowhere" in json.loads(capsys.readouterr().out)["fault"]


def test_modules_are_imported_not_only_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tensorrt.py").write_text("import libnvinfer_that_is_nowhere")
    (tmp_path / "tensorrt_rtx.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{':'.join(sys.path)}")
    monkeypatch.syspath_prepend(str(tmp_path))
    engines = probe(tmp_path).engines
    assert "libnvinfer_that_is_nowhere" in engines["tensorrt"].fault
    assert "ended with code -6" in engines["tensorrt_rtx"].fault


def test_a_machine_with_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probing.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(probing.sys, "executable", str(tmp_path / "no-python"))
    monkeypatch.setitem(sys.modules, "rt_ris_kernels.launch", None)
    machine = probe(tmp_path / "nowhere")
    assert {engine.version for engine in machine.engines.values()} == {None}
    assert machine.kernels is None
    assert machine.disk_mib is None
    assert "FileNotFoundError" in machine.no_cuda


def test_a_look_that_never_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\nexec sleep 30\n")
    script.chmod(0o755)
    monkeypatch.setattr(probing.sys, "executable", str(script))
    monkeypatch.setattr(probing, "PATIENCE_S", 0.1)
    monkeypatch.setattr(probing.importlib.util, "find_spec", lambda name: None)
    assert "TimeoutExpired" in probe(tmp_path).no_cuda


@pytest.mark.parametrize(
    ("line", "release"),
    [("# R36 (release), REVISION: 4.3, GCID: 1", 36), ("", None), ("# unknown", None)],
)
def test_the_release_of_a_jetson(line: str, release: int | None, tmp_path: Path) -> None:
    (tmp_path / "nv_tegra_release").write_text(line)
    assert probing._l4t(tmp_path / "nv_tegra_release") == release
    assert probing._l4t(tmp_path / "absent") is None


def test_memory_is_that_of_the_container(tmp_path: Path) -> None:
    meminfo, limit = tmp_path / "meminfo", tmp_path / "memory.max"
    meminfo.write_text("MemTotal: 9000000 kB\nMemAvailable:    4194304 kB\n")
    assert probing._memory_mib(meminfo, limit) == 4096
    limit.write_text("max\n")
    assert probing._memory_mib(meminfo, limit) == 4096
    limit.write_text(f"{1 << 30}\n")
    assert probing._memory_mib(meminfo, limit) == 1024
    assert probing._memory_mib(tmp_path / "absent", limit) is None
