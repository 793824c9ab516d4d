"""Finding engines: what is refused before any parser sees it, and with which way out."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rt_ris.bundle import Bundle
from rt_ris.errors import IntegrityError, OutputError, RecipeError, TargetMismatchError
from rt_ris.predictor import Predictor

Spoil = Callable[[Path], object]
pytestmark = pytest.mark.parametrize("world", ["10.3.0", "rtx-1.7.1.116"], indirect=True)


@pytest.fixture(autouse=True)
def _no_parser(world: Any, engines: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever is refused here must not have reached a parser."""

    def parsed(*given: object, **named: object) -> None:
        raise AssertionError("a parser has seen it")

    monkeypatch.setattr("rt_ris.backends.tensorrt.open_engine", parsed)


def load(world: Any, tiny: Path, **options: Any) -> None:
    Predictor.load(tiny, backend=world.target, **options).close()


def one(engines: Path, ending: str = ".engine") -> Path:
    (path,) = engines.glob(f"image.*{ending}")
    return path


def edit(engines: Path, **changes: object) -> None:
    """Change the record of the image stage's engine."""
    path = one(engines, ".json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def flip(engines: Path) -> None:
    content = bytearray(one(engines).read_bytes())
    content[len(content) // 2] ^= 1
    one(engines).write_bytes(content)


def link(engines: Path) -> None:
    moved = engines.with_name("elsewhere")
    one(engines).rename(moved)
    one_path = engines / json.loads(one(engines, ".json").read_text())["engine"]
    one_path.symlink_to(moved)


def pipe(engines: Path) -> None:
    path = one(engines)
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, tuple[Spoil, str]] = {
    "truncated": (lambda at: os.truncate(one(at), 200), r"has bytes 200; its record says \d+"),
    "longer": (lambda at: one(at).write_bytes(one(at).read_bytes() + b"!"), "has more than"),
    "flipped": (flip, r"has SHA-256 [0-9a-f]{64}; its record says"),
    "missing": (lambda at: one(at).unlink(), r"cannot be read as a plain file \(No such file"),
    "link": (link, "cannot be read as a plain file"),
    "pipe": (pipe, "is not a plain file"),
    "open folder": (lambda at: at.chmod(0o777), "may be written by everybody .*chmod o-w"),
    "open engine": (lambda at: one(at).chmod(0o666), "may be written by everybody"),
    "open record": (lambda at: one(at, ".json").chmod(0o666), "may be written by everybody"),
    "no json": (lambda at: one(at, ".json").write_text("{"), "breaks its format.*not valid JSON"),
    "field": (lambda at: edit(at, colour=1), "breaks its format: Unknown field 'colour'"),
    "type": (lambda at: edit(at, sm="89"), "Field 'sm' is '89'; accepted is an integer"),
    "name": (lambda at: edit(at, engine="../../evil"), "is of '../../evil'; a record stands"),
    "long record": (lambda at: edit(at, version="1" * 70000), "has more than 65536 bytes"),
}


def test_graphs_that_no_builder_reads_have_no_engines(
    world: Any, engines: Path, for_onnx_runtime: Path
) -> None:
    with pytest.raises(TargetMismatchError, match=r"'text' was exported .* --target onnx"):
        load(world, for_onnx_runtime)


@pytest.mark.parametrize("what", DAMAGE)
def test_damage_and_strangers_are_refused(world: Any, engines: Path, tiny: Path, what: str) -> None:
    spoil, said = DAMAGE[what]
    spoil(engines)
    with pytest.raises(IntegrityError, match=said) as caught:
        load(world, tiny, allow_unverified=True)
    assert caught.value.exit_code == 5


def test_a_folder_of_another_user_is_refused_and_the_administrators_is_not(
    world: Any, engines: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = engines.stat().st_uid
    monkeypatch.setattr("rt_ris.build.trust.ROOT", owner)
    monkeypatch.setattr(os, "geteuid", lambda: owner + 1)
    with pytest.raises(AssertionError, match="a parser has seen it"):
        load(world, tiny)
    monkeypatch.setattr("rt_ris.build.trust.ROOT", owner + 2)
    with pytest.raises(IntegrityError, match=f"belongs to user {owner}, not to you"):
        load(world, tiny)


def test_a_program_inside_a_plan(world: Any, engines: Path, tiny: Path) -> None:
    content = one(engines).read_bytes() + b"\x7fELF\x02\x01"
    one(engines).write_bytes(content)
    edit(engines, bytes=len(content), sha256=hashlib.sha256(content).hexdigest())
    if world.target == "tensorrt":  # its plans may hold GPU programs, which are ELF as well
        with pytest.raises(AssertionError, match="a parser has seen it"):
            load(world, tiny, allow_unverified=True)
    else:
        with pytest.raises(IntegrityError, match="holds a program for the processor"):
            load(world, tiny, allow_unverified=True)


OTHERS: dict[str, tuple[dict[str, object], str]] = {
    "stage": ({"stage": "text"}, "stage text; here it must be image"),
    "precision": ({"precision": "fp16"}, "precision fp16; here it must be fp32"),
    "bundle": ({"bundle_sha256": "0" * 64}, "bundle 0{64}; here it must be [0-9a-f]{64}"),
    "graph": ({"graph_sha256": "0" * 64}, "graph 0{64}; here it must be [0-9a-f]{64}"),
    "version": ({"version": "10.3.0.1"}, r"version 10\.3\.0\.1; here it must be"),
    "capability": ({"sm": 86}, "compute capability 86; here it must be 89"),
}


@pytest.mark.parametrize("what", OTHERS)
def test_what_was_built_for_something_else_is_refused_with_the_command(
    world: Any, engines: Path, tiny: Path, what: str
) -> None:
    changes, said = OTHERS[what]
    edit(engines, **changes)
    with pytest.raises(TargetMismatchError, match=said) as caught:
        load(world, tiny, allow_unverified=True)
    assert caught.value.exit_code == 3
    command = f"rt-ris build {tiny} --target {world.target} --overwrite"
    assert str(caught.value).endswith(f"Rebuild with: {command}")


def test_an_engine_of_the_other_target_under_this_name(
    world: Any, engines: Path, tiny: Path
) -> None:
    other = {"tensorrt": "tensorrt-rtx", "tensorrt-rtx": "tensorrt"}[world.target]
    edit(engines, target=other)
    with pytest.raises(TargetMismatchError, match=f"has target {other}"):
        load(world, tiny, allow_unverified=True)


@pytest.mark.parametrize("changes", [{"platform": "linux-riscv64"}, {"gpu": None}])
def test_plans_of_tensorrt_are_bound_to_the_gpu_and_the_platform(
    world: Any, engines: Path, tiny: Path, changes: dict[str, object]
) -> None:
    edit(engines, **changes)
    error = TargetMismatchError if world.target == "tensorrt" else AssertionError
    with pytest.raises(error):
        load(world, tiny, allow_unverified=True)


def test_another_gpu_of_the_same_capability(world: Any, engines: Path, tiny: Path) -> None:
    world.cudart.name = b"NVIDIA Test 4000 Ti\0"
    if world.target == "tensorrt":
        with pytest.raises(TargetMismatchError, match=r"GPU NVIDIA Test 4000; .* be .*4000 Ti"):
            load(world, tiny, allow_unverified=True)
    with pytest.raises((TargetMismatchError, AssertionError)):
        load(world, tiny)


def test_the_same_bytes_under_another_bundle(world: Any, engines: Path, tiny: Path) -> None:
    """A bundle that was exported again has its own engines to build."""
    manifest = json.loads((tiny / "manifest.json").read_text())
    manifest["variant"] = "other"
    (tiny / "manifest.json").write_text(json.dumps(manifest))
    digest = hashlib.sha256((tiny / "manifest.json").read_bytes()).hexdigest()
    (tiny / "manifest.sha256").write_text(f"{digest}\n")
    assert Bundle.open(tiny).sha256 == digest
    with pytest.raises(TargetMismatchError, match=f"here it must be {digest}"):
        load(world, tiny)


def test_no_engine_for_this_gpu_says_which_there_are(world: Any, engines: Path, tiny: Path) -> None:
    for path in engines.glob("image.*"):
        path.rename(path.with_name(path.name.replace("local", "sm75")))
    with pytest.raises(
        TargetMismatchError,
        match=rf"no engine of stage 'image' for {world.target} on NVIDIA Test 4000 \(compute "
        rf"capability 8\.9\); it has image\.fp32\.{world.target}-sm75\.engine\. Build it with: ",
    ):
        load(world, tiny)


def test_engines_for_the_capability_are_found(world: Any, engines: Path, tiny: Path) -> None:
    for path in engines.glob("*.engine"):
        path.rename(path.with_name(path.name.replace("local", "sm89")))
    for path in engines.glob("*.engine.json"):
        text = path.read_text().replace("local", "sm89")
        path.with_name(path.name.replace("local", "sm89")).write_text(text)
        path.unlink()
    with pytest.raises(AssertionError, match="a parser has seen it"):
        load(world, tiny, allow_unverified=True)


def test_a_folder_elsewhere_and_none_at_all(
    world: Any, engines: Path, tiny: Path, tmp_path: Path
) -> None:
    elsewhere = Path(shutil.move(engines, tmp_path / "else where"))
    with pytest.raises(OutputError, match=r"no folder of engines at '.*tiny\.engines'"):
        load(world, tiny)
    edit(elsewhere, sm=75)
    with pytest.raises(TargetMismatchError, match=r"--out '.*/else where' --overwrite$"):
        load(world, tiny, engines=elsewhere)


def test_graphs_and_engines_are_not_mixed_up(world: Any, engines: Path, tiny: Path) -> None:
    with pytest.raises(RecipeError, match="runs the bundle's graphs and no engines"):
        Predictor.load(tiny, backend="onnxruntime", engines=engines)
