"""The process that builds, called here and started for real, over TensorRTs that are not there."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from rt_ris.build import child
from rt_ris.build.engines import build_engines
from rt_ris.build.process import installed_version
from rt_ris.build.record import EngineRecord
from rt_ris.build.request import Job, Request
from rt_ris.bundle import Bundle
from rt_ris.cli import main
from rt_ris.errors import BuildError, StorageError, TargetMismatchError
from rt_ris.records import to_json

Capture = pytest.CaptureFixture[str]
RTX = "rtx-1.7.1.116"


def requested(
    tiny: Path,
    target: Any,
    *,
    sm: int | None = None,
    plugin: bool = False,
    timings: Path | None = None,
    **options: Any,
) -> Path:
    """A request for the text stage's engine."""
    job = Job(
        stage="text",
        graph=str(tiny / "text.onnx"),
        engine=str(tiny.with_name("made")),
        sm=sm,
        plugin=plugin,
    )
    given = {"workspace_mib": None, **options}
    request = Request(
        target=target, timings=None if timings is None else str(timings), jobs=(job,), **given
    )
    path = tiny.with_name("request.json")
    path.write_bytes(to_json(request))
    return path


def run(path: Path, capsys: Capture, code: int = 0) -> list[dict[str, Any]]:
    """What the child says of a request."""
    assert child.main([str(path)]) == code
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def plan(tiny: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(tiny.with_name("made").read_bytes()[len(b"FAKEPLAN") :])
    return found


def test_an_engine_is_built_and_described(world: Any, tiny: Path, capsys: Capture) -> None:
    (news,) = run(requested(tiny, world.target, workspace_mib=64), capsys)
    built = news["built"]
    assert built["version"] == world.trt.__version__
    assert (built["layers"], built["plugins"], built["fused_attentions"]) == (2, 0, 0)
    assert built["bytes"] == tiny.with_name("made").stat().st_size
    facts = plan(tiny)
    assert facts["workspace"] == {"MemoryPoolType.WORKSPACE": 64 << 20}
    shapes = [[profile["token_ids"][at][0] for at in range(3)] for profile in facts["profiles"]]
    assert shapes == [[1, 1, 1], [2, 4, 4], [5, 16, 16]]


def test_a_stage_without_sentences_has_no_profile(world: Any, tiny: Path, capsys: Capture) -> None:
    (tiny / "text.onnx").write_bytes((tiny / "image.onnx").read_bytes())
    run(requested(tiny, world.target), capsys)
    assert plan(tiny)["profiles"] == []


@pytest.mark.parametrize("world", [RTX], indirect=True)
def test_capabilities(world: Any, tiny: Path, capsys: Capture) -> None:
    run(requested(tiny, world.target, sm=86), capsys)
    assert plan(tiny)["sm"] == 86
    for sm in (87, 90):  # known to no version; and one that has no name in any
        (news,) = run(requested(tiny, world.target, sm=sm), capsys, code=1)
        assert f"does not know compute capability {sm}" in news["failed"]["errors"][0]


@pytest.mark.parametrize(
    ("fault", "said"), [("parse", "Resize 'node_7': no importer"), ("build", "no implementation")]
)
def test_refusals_are_the_builders_own_words(
    world: Any, tiny: Path, capsys: Capture, fault: str, said: str
) -> None:
    world.trt._faults.add(fault)
    (news,) = run(requested(tiny, world.target), capsys, code=1)
    assert news == {"failed": {"errors": [said]}}
    assert not tiny.with_name("made").exists()


def test_plugins_are_registered_and_counted(world: Any, tiny: Path, capsys: Capture) -> None:
    world.trt._plugins = True
    (news,) = run(requested(tiny, world.target, plugin=True), capsys)
    assert news["built"]["plugins"] == 1
    assert list(world.trt._registry) == [("MaskedMutualAttention", "1", "rt_ris")]
    world.trt._channels = 64
    (news,) = run(requested(tiny, world.target, plugin=True), capsys, code=1)
    assert "'attention' has 64 channels" in news["failed"]["errors"][0]


def test_a_full_disk_is_told(world: Any, tiny: Path, capsys: Capture) -> None:
    path = requested(tiny, world.target)
    tiny.with_name("made").mkdir()
    (news,) = run(path, capsys, code=1)
    assert news["storage"]["reason"] == "Is a directory"


def test_the_version_is_asked_of_a_process(world: Any, tiny: Path) -> None:
    assert installed_version(world.target) == world.trt.__version__


def test_a_builder_that_does_not_start(world: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RT_RIS_FAKE_TENSORRT", "0.0")
    with pytest.raises(BuildError, match=r"does not start; it said: .*0\.0\.json"):
        installed_version(world.target)


class TestTimings:
    def file(self, world: Any, begins: Path) -> Path:
        return begins.with_name(f"{begins.name}-{world.trt.__version__}.timing")

    def test_they_are_written_and_read_again(
        self, world: Any, tiny: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        path = requested(tiny, world.target, timings=tmp_path / "gpu")
        run(path, capsys)
        assert self.file(world, tmp_path / "gpu").read_bytes() == b"timed;"
        run(path, capsys)
        assert self.file(world, tmp_path / "gpu").read_bytes() == b"timed;timed;"
        assert world.trt._known == [b"", b"timed;"]

    @pytest.mark.parametrize("fault", ["mismatch", ""])
    def test_those_of_another_gpu_and_damaged_ones_are_replaced(
        self, world: Any, tiny: Path, tmp_path: Path, capsys: Capture, fault: str
    ) -> None:
        world.trt._faults.add(fault)
        self.file(world, tmp_path / "gpu").write_bytes(b"old" if fault else b"damaged")
        run(requested(tiny, world.target, timings=tmp_path / "gpu"), capsys)
        assert self.file(world, tmp_path / "gpu").read_bytes() == b"timed;"

    def test_those_that_anybody_may_have_written_are_told_and_left_out(
        self, world: Any, tiny: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        file = self.file(world, tmp_path / "gpu")
        file.write_bytes(b"timed;")
        file.chmod(0o666)
        note, news = run(requested(tiny, world.target, timings=tmp_path / "gpu"), capsys)
        assert "taken anew" in note["note"]
        assert str(file) in note["note"]
        assert "built" in news
        assert world.trt._known == [b""]
        assert not file.stat().st_mode & 0o002

    def test_a_failed_build_keeps_them_and_so_does_an_interrupt(
        self, world: Any, tiny: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        path = requested(tiny, world.target, timings=tmp_path / "gpu")
        world.trt._faults.add("build")
        run(path, capsys, code=1)
        assert self.file(world, tmp_path / "gpu").read_bytes() == b"timed;"
        world.trt._faults.clear()
        world.trt._during = lambda: signal.raise_signal(signal.SIGINT)
        (news,) = run(path, capsys, code=1)
        assert news == {"failed": {"errors": ["The builder gave no reason."]}}
        assert self.file(world, tmp_path / "gpu").read_bytes() == b"timed;timed;"
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert not tiny.with_name("made").exists()

    def test_a_place_that_takes_none_is_told_and_stops_nothing(
        self, world: Any, tiny: Path, tmp_path: Path, capsys: Capture
    ) -> None:
        note, news = run(requested(tiny, world.target, timings=tmp_path / "no" / "gpu"), capsys)
        assert "could not be kept" in note["note"]
        assert "built" in news
        assert not list(tmp_path.glob("no*"))


def build(world: Any, tiny: Path, **options: Any) -> tuple[list[str], tuple[EngineRecord, ...]]:
    said: list[str] = []
    out = tiny.with_name("tiny.engines")
    records = build_engines(
        Bundle.open(tiny), out, target=world.target, overwrite=True, say=said.append, **options
    )
    return said, records


def test_what_would_come_out_the_same_is_kept(world: Any, engines: Path, tiny: Path) -> None:
    said, records = build(world, tiny)
    assert [line.split(":")[0] for line in said] == [f"kept {one.engine}" for one in records]
    assert (engines / "verified.nvidia-test-4000.json").exists()
    said, _ = build(world, tiny, workspace_mib=77)
    assert len(said) == 3
    assert all("building" in line for line in said)


def test_only_what_was_damaged_or_deleted_is_built_again(
    world: Any, engines: Path, tiny: Path
) -> None:
    (damaged,) = engines.glob("text.*.engine")
    damaged.write_bytes(b"junk")
    said, _ = build(world, tiny)
    assert [line.partition(".")[0] for line in said] == [
        "kept image",
        "kept fusion",
        "[1/1] building text",
    ]
    assert damaged.stat().st_size > 100


def test_kept_engines_belong_to_the_new_bundle(world: Any, engines: Path, tiny: Path) -> None:
    import hashlib

    raw = (tiny / "manifest.json").read_text().replace('"variant": "tiny"', '"variant": "other"')
    (tiny / "manifest.json").write_text(raw)
    (tiny / "manifest.sha256").write_text(hashlib.sha256(raw.encode()).hexdigest() + "\n")
    said, records = build(world, tiny)
    assert all(line.startswith("kept") for line in said)
    assert {record.bundle_sha256 for record in records} == {Bundle.open(tiny).sha256}


def test_another_driver_is_another_key_for_tensorrt_alone(
    world: Any, engines: Path, tiny: Path
) -> None:
    world.cudart.cuda = 13010
    said, _ = build(world, tiny)
    kept = [line.startswith("kept") for line in said]
    assert kept == [world.target == "tensorrt-rtx"] * 3


def test_records_of_a_local_build(world: Any, engines: Path, tiny: Path) -> None:
    _, records = build(world, tiny)
    for record in records:
        assert record.gpu is not None
        assert (record.gpu.name, record.sm) == ("NVIDIA Test 4000", 89)
        assert record.platform.startswith(sys.platform)
        assert record.engine.endswith(f".{world.target}-local.engine")
    cache = tiny.parent / "cache" / "rt-ris" / "timings"
    if world.target == "tensorrt-rtx":  # it has no timings
        assert not cache.exists()


@pytest.mark.parametrize("world", [RTX], indirect=True)
def test_hopper_is_named_before_tensorrt_rtx_builds_for_it(world: Any, tiny: Path) -> None:
    world.cudart.major, world.cudart.minor = 9, 0
    with pytest.raises(BuildError, match="does not build for compute capability 90"):
        build(world, tiny)


def test_without_a_gpu_a_capability_must_be_named(world: Any, tiny: Path) -> None:
    world.cudart.present = False
    with pytest.raises(TargetMismatchError, match="no usable GPU here") as caught:
        build(world, tiny)
    assert ("--sm 89" in str(caught.value)) is (world.target == "tensorrt-rtx")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_the_timings_and_nothing_else(
    world: Any,
    tiny: Path,
    tmp_path: Path,
    how: signal.Signals,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
) -> None:
    begun = tmp_path / "begun"
    monkeypatch.setenv("RT_RIS_FAKE_SLOW", str(begun))

    def interrupt() -> None:
        while not begun.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), how)

    thread = threading.Thread(target=interrupt)
    thread.start()
    started = time.monotonic()
    assert main(world.words("build", tiny)) == 130
    assert time.monotonic() - started < 15
    thread.join()
    said = capsys.readouterr().err
    assert said.endswith("rt-ris: interrupted\n")
    assert ("what the builder has timed is kept" in said) is (world.target == "tensorrt")
    assert not list(tmp_path.glob(".*partial"))
    assert not tiny.with_name("tiny.engines").exists()
    kept = [path.read_bytes() for path in tmp_path.rglob("*.timing")]
    assert kept == ([b"timed;"] if world.target == "tensorrt" else [])


@pytest.mark.parametrize("fault", ["parse", "build"])
def test_a_stage_that_is_refused_is_named_with_the_builders_words(
    world: Any, tiny: Path, fault: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setenv("RT_RIS_FAKE_FAULT", fault)
    before = sorted(tiny.parent.iterdir())
    assert main(world.words("build", tiny)) == 6
    words = {"parse": "Resize 'node_7': no importer", "build": "no implementation"}[fault]
    name = f"image.fp32.{world.target}-local.engine"
    said = f"rt-ris: error: The builder refused stage 'image' ({name}): {words}. No engine was"
    assert said in capsys.readouterr().err
    after = [path for path in tiny.parent.iterdir() if path.name != "cache"]
    assert sorted(after) == before


def test_an_interrupted_gate_leaves_nothing(
    world: Any, engines: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rt_ris.cli.gate.replay", interrupt)
    before = {path: path.read_bytes() for path in engines.iterdir()}
    assert main(world.words("build", tiny, "--overwrite")) == 130
    assert {path: path.read_bytes() for path in engines.iterdir()} == before
    assert not [path for path in tiny.parent.iterdir() if path.name.startswith(".")]


def test_no_place_for_timings_is_no_reason_to_stop(
    world: Any, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    said, records = build(world, tiny)
    assert len(records) == 3
    assert any("no timings are kept" in line for line in said) is (world.target == "tensorrt")


@pytest.mark.parametrize("where", ["child", "record"])
def test_a_full_disk_leaves_nothing(
    world: Any, tiny: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*given: object) -> None:
        raise OSError(28, "No space left on device")

    if where == "child":
        news = {"storage": {"errno": 28, "reason": "No space left on device"}}
        monkeypatch.setattr("rt_ris.build.process._next", lambda *given: news)
    else:
        monkeypatch.setattr("rt_ris.build.engines.to_json", full)
    with pytest.raises(StorageError, match=r"folder of engines .*the disk is full. Nothing was"):
        build(world, tiny)
    assert not tiny.with_name("tiny.engines").exists()
    assert not list(tiny.parent.glob(".*partial"))
