"""The shipped binary is what the source compiles to, and holds what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rt_ris.errors import BuildError
from rt_ris_kernels import build
from rt_ris_kernels.binary import BINARIES, NAME, load_binary

LIMIT_BYTES = 1_000_000


def test_the_source_compiles_to_the_shipped_binary(capsys: pytest.CaptureFixture[str]) -> None:
    assert build.main(["--check"]) == 0, capsys.readouterr()


def test_every_gpu_has_its_code_and_no_register_spills() -> None:
    facts = json.loads((BINARIES / f"{NAME}.json").read_text())
    assert facts["source_sha256"] == build.source_sha256()
    assert load_binary().architectures == (80, 86, 87, 89, 90, 100, 110, 120)
    assert sum(path.stat().st_size for path in BINARIES.iterdir()) < LIMIT_BYTES
    resources = facts["resources"]
    assert list(resources) == [str(sm) for sm in build.ARCHITECTURES]
    kernels = set(resources["80"])
    assert len(kernels) == 12
    older = {f"{sm}, CUDA 12": made["resources"] for sm, made in facts["cuda_12"].items()}
    assert list(older) == ["87, CUDA 12"]
    for sm, used in {**resources, **older}.items():
        assert set(used) == kernels
        for kernel, figures in used.items():
            assert figures["spilled_bytes"] == figures["stack_bytes"] == 0, (sm, kernel)
            threads = 512 if kernel.startswith("reduce") else 256
            assert figures["registers"] * threads <= 65536, (sm, kernel)
            if "f16_c256_w32" in kernel:
                assert figures["registers"] <= 128, "two blocks share a multiprocessor"


def test_the_report_of_ptxas_is_read() -> None:
    report = """ptxas info    : Compiling entry function 'forward' for 'sm_90'
ptxas info    : Function properties for forward
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 128 registers, used 1 barriers, 16 bytes cumulative stack size, 32 bytes smem
"""
    assert build.resources(report) == {
        "90": {
            "forward": {
                "registers": 128,
                "stack_bytes": 16,
                "spilled_bytes": 12,
                "static_shared_bytes": 32,
            }
        }
    }


def test_without_a_compiler_the_way_out_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("NVCC", raising=False)
    monkeypatch.setattr(build.sysconfig, "get_path", lambda _: str(tmp_path))
    with pytest.raises(BuildError, match=r"nvcc was not found.*NVCC="):
        build.find_nvcc()


def test_another_compiler_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "nvcc"
    other.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.4, V12.4.99'\n")
    other.chmod(0o755)
    with pytest.raises(BuildError, match=r"release 12\.4.*13\.0 is needed"):
        build.compile_fatbin(str(other))


def test_a_library_that_is_no_nvrtc_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="cannot be loaded as NVRTC"):
        build.compile_cubin(tmp_path / "libnvrtc.so.12", 87)


def test_another_nvrtc_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("NVRTC", str(tmp_path / "none"))
    with pytest.raises(BuildError, match=r"NVRTC was not found at .*none"):
        build.find_nvrtc()
    nvrtc = pytest.importorskip("nvidia")
    (newer,) = Path(nvrtc.__path__[0]).glob("cu13/lib/libnvrtc.so.13")
    with pytest.raises(BuildError, match=r"is NVRTC 13\.\d+; 12\.6 is needed"):
        build.compile_cubin(newer, 87)
