"""The gate on a GPU: engines run only where it passed, and only while nothing has changed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rt_ris.build.find import read_record
from rt_ris.build.gate import read_gate
from rt_ris.bundle import Bundle
from rt_ris.cli import main
from rt_ris.errors import IntegrityError, TargetMismatchError
from rt_ris.predictor import Predictor

Capture = pytest.CaptureFixture[str]
pytestmark = pytest.mark.parametrize("world", ["10.3.0", "rtx-1.7.1.116"], indirect=True)
GATE = "verified.nvidia-test-4000.json"


def load(world: Any, tiny: Path, **options: Any) -> None:
    Predictor.load(tiny, backend=world.target, **options).close()


def test_a_build_for_the_gpu_that_is_here_ends_with_its_gate(
    world: Any, engines: Path, tiny: Path
) -> None:
    gate = read_gate(engines / GATE)
    assert gate.engines == {
        path.name: read_record(path.with_name(f"{path.name}.json")).sha256
        for path in engines.glob("*.engine")
    }
    assert (gate.target, gate.version) == (world.target, world.trt.__version__)
    assert gate.bundle_sha256 == Bundle.open(tiny).sha256
    assert (gate.gpu.name, gate.gpu.driver) == ("NVIDIA Test 4000", "CUDA 12.6")
    assert 0 <= gate.relative_error <= gate.relative_error_limit
    assert gate.mask_iou_limit <= gate.mask_iou <= 1
    assert gate.kernels is None
    load(world, tiny)


def test_unverified_engines_are_refused_until_verify_has_passed(
    world: Any, engines: Path, tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    (engines / GATE).unlink()
    words = ["--describe", "red cup", "--out", str(tmp_path / "masks")]
    picture = tmp_path / "picture.png"
    __import__("PIL.Image").Image.new("RGB", (40, 24), (220, 40, 30)).save(picture)
    segment = world.words("segment", tiny, str(picture), *words)
    assert main(segment) == 3
    said = capsys.readouterr().err
    verify = f"rt-ris verify {tiny} --backend {world.target} --engines {engines}"
    assert (
        f"unverified on NVIDIA Test 4000: no gate has passed on it. Run it with: {verify}" in said
    )
    assert main(verify.split()[1:]) == 0
    assert f"verified on this GPU: {engines / GATE}" in capsys.readouterr().out
    assert main(segment) == 0
    assert main([*verify.split()[1:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n{")[2].join(["{", ""]))["passed"]


STALE: dict[str, tuple[Callable[[Any, Path], object], str]] = {
    "driver": (
        lambda world, at: setattr(world.cudart, "cuda", 13000),
        "driver CUDA 12.6; here it is CUDA 13.0",
    ),
    "memory": (
        lambda world, at: setattr(world.cudart, "memory_mib", 16384),
        "GPU memory_mib 8192; here it is 16384",
    ),
    "multiprocessors": (
        lambda world, at: setattr(world.cudart, "multiprocessors", 30),
        "GPU multiprocessors 24; here it is 30",
    ),
    "version": (lambda world, at: edit(at, version="9"), "version 9; here it is"),
    "target": (lambda world, at: edit(at, target=other(world)), "passed with target"),
    "bundle": (lambda world, at: edit(at, bundle_sha256="0" * 64), "bundle 0{64}; here"),
    "engine": (
        lambda world, at: edit(at, engines=dict.fromkeys(read(at)["engines"], "0" * 64)),
        r"engine 'image\..*' 0{64}; here it is [0-9a-f]{64}",
    ),
    "no engine": (lambda world, at: edit(at, engines={}), r"engine 'image\..*' nothing; here"),
    "gpu": (
        lambda world, at: edit(at, gpu={**read(at)["gpu"], "name": "NVIDIA Other"}),
        "GPU NVIDIA Other; here it is NVIDIA Test 4000",
    ),
    "capability": (
        lambda world, at: edit(at, gpu={**read(at)["gpu"], "sm": 86}),
        "GPU sm 86; here it is 89",
    ),
}


def other(world: Any) -> str:
    return {"tensorrt": "tensorrt-rtx", "tensorrt-rtx": "tensorrt"}[world.target]


def read(engines: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((engines / GATE).read_text())
    return found


def edit(folder: Path, **changes: object) -> None:
    (folder / GATE).write_text(json.dumps({**read(folder), **changes}))


@pytest.mark.parametrize("what", STALE)
def test_a_gate_of_something_else_does_not_count(
    world: Any, engines: Path, tiny: Path, what: str
) -> None:
    load(world, tiny)
    change, said = STALE[what]
    change(world, engines)
    with pytest.raises(TargetMismatchError, match=said) as caught:
        load(world, tiny)
    assert "Run it again with: rt-ris verify" in str(caught.value)
    assert main(world.words("verify", tiny)) == 0
    load(world, tiny)


def test_a_broken_or_open_gate_record_is_refused(world: Any, engines: Path, tiny: Path) -> None:
    (engines / GATE).chmod(0o666)
    with pytest.raises(IntegrityError, match="may be written by everybody"):
        load(world, tiny)
    (engines / GATE).chmod(0o644)
    edit(engines, mood="fine")
    with pytest.raises(IntegrityError, match=r"gate record .* Unknown field 'mood'"):
        load(world, tiny)


def test_a_verification_that_misses_leaves_no_record(
    world: Any, engines: Path, tiny: Path, capsys: Capture
) -> None:
    (engines / GATE).unlink()
    world.trt._bias = 1
    assert main(world.words("verify", tiny)) == 1
    assert "'image' is the first step that differs" in capsys.readouterr().err
    assert not (engines / GATE).exists()


def test_a_build_that_misses_its_gate_leaves_nothing(
    world: Any, tiny: Path, capsys: Capture
) -> None:
    before = sorted(tiny.parent.rglob("*"))
    world.trt._bias = 1
    assert main(world.words("build", tiny)) == 1
    said = capsys.readouterr().err
    assert "'image' is the first step that differs" in said
    assert "The engines are not kept. A build with --no-plugin" in said
    after = [path for path in tiny.parent.rglob("*") if "cache" not in path.parts]
    assert sorted(after) == before


def test_a_build_that_misses_its_gate_keeps_the_older_engines(
    world: Any, engines: Path, tiny: Path, capsys: Capture
) -> None:
    before = {path.name: path.read_bytes() for path in engines.iterdir()}
    world.trt._bias = 1
    assert main(world.words("build", tiny, "--overwrite")) == 1
    assert {path.name: path.read_bytes() for path in engines.iterdir()} == before


def test_every_profile_is_replayed(
    world: Any, engines: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Golden pictures have few sentences; the profiles for one and for many must not go unseen."""
    runs: list[int] = []
    from rt_ris.backends.tensorrt import TensorRtRunner

    count = TensorRtRunner._count
    monkeypatch.setattr(
        TensorRtRunner, "_count", lambda self, inputs: runs.append(count(self, inputs)) or runs[-1]
    )
    for words in (world.words("verify", tiny), world.words("build", tiny, "--overwrite")):
        runs.clear()
        assert main(words) == 0
        assert {1, 4, 16} <= set(runs)


def test_a_record_that_cannot_be_written_is_a_storage_error(
    world: Any, engines: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("rt_ris.bundle.os.replace", full)
    assert main(world.words("verify", tiny)) == 6
    assert f"gate record {engines / GATE} could not be written: the disk is full" in (
        capsys.readouterr().err
    )
    assert not list(engines.glob(".*"))
