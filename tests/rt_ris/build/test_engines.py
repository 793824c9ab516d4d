"""Building engines: what is written, what is refused, and that nothing is left of a failure."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rt_ris.build import engines
from rt_ris.build.engines import build_engines
from rt_ris.build.process import built
from rt_ris.build.request import Job, Request
from rt_ris.bundle import Bundle
from rt_ris.cli import main
from rt_ris.errors import (
    BuildError,
    IntegrityError,
    MissingExtraError,
    OutputError,
    PluginError,
    StorageError,
)

PYTHON = sys.executable
Child = Callable[[str], None]
TINY = Path(__file__).parents[2] / "fixtures" / "tiny"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    shutil.copytree(TINY, tmp_path / "tiny.bundle")
    return Bundle.open(tmp_path / "tiny.bundle")


@pytest.fixture
def child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Child:
    """A Python program in the place of the process that builds."""

    def use(program: str) -> None:
        script = tmp_path / "python"
        script.write_text(f"#!{PYTHON}\nimport sys, os, json, signal\n{program}\n")
        script.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(script))
        monkeypatch.setattr(engines, "check_installed", lambda target: None)

    return use


OURS = "rt_ris::MaskedMutualAttention"
BUILDS = """
if sys.argv[3] == "version":
    print('{"version": "1.2.3.4"}')
    sys.exit()
print("a line of the builder's own", flush=True)
request = json.load(open(sys.argv[3]))
for job in request["jobs"]:
    open(job["engine"], "wb").write(job["graph"].encode())
    facts = {"engine": job["engine"], "seconds": 1.0, "version": "1.2.3.4"}
    facts |= {"layers": 3, "plugins": 0, "fused_attentions": 0, "peak_mib": 70}
    print(json.dumps({"built": facts}), flush=True)
"""


def test_every_stage_is_built_for_every_gpu_and_recorded(
    bundle: Bundle, child: Child, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    child(BUILDS)
    words = ["build", str(bundle.path), "--target", "tensorrt-rtx", "--sm", "75,86"]
    assert main(words) == 0
    said = capsys.readouterr()
    assert "6 engines, UNVERIFIED: `rt-ris verify --engines`" in said.out.splitlines()[-1]
    second = r"\[2/6\] building image\.fp32\S+-sm86\.engine, \d+ s so far, about \d+ s left\n"
    assert re.search(second, said.err)
    folder = tmp_path / "tiny.bundle.engines"
    assert sorted(path.name for path in folder.glob("*.engine")) == [
        f"{stage}.fp32.tensorrt-rtx-sm{sm}.engine"
        for stage in ("fusion", "image", "text")
        for sm in (75, 86)
    ]
    for path in folder.glob("*.engine"):
        record = json.loads(path.with_name(f"{path.name}.json").read_text())
        assert record["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
        assert record["bytes"] == path.stat().st_size
        assert record["bundle_sha256"] == bundle.sha256
        assert record["graph_sha256"] == bundle.manifest.members[f"{record['stage']}.onnx"].sha256
        assert (record["version"], record["peak_mib"]) == ("1.2.3.4", 70)
        assert (record["sm"], record["gpu"]) in ((75, None), (86, None))
    assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*words, "--overwrite", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["built"]) == 6


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGABRT)", "built stage 'image' .* died of SIGABRT"),
        (
            "os.kill(os.getpid(), signal.SIGKILL)",
            "memory was exhausted.* Close what else uses memory, then try again",
        ),
        ("sys.exit('no libcuda')", "ended with code 1.*no libcuda"),
        (
            "print(json.dumps({'failed': {'errors': ['Resize: why']}}))",
            r"refused stage 'image' \(image.fp32.tensorrt-rtx-sm86.engine\): Resize: why",
        ),
        (BUILDS.replace("for job in", "for job in [] and"), "ended with code 0"),
    ],
    ids=["abort", "killed", "exit", "refused", "silence"],
)
def test_a_failure_is_named_and_leaves_nothing(
    bundle: Bundle, child: Child, tmp_path: Path, program: str, said: str
) -> None:
    child(program)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(BuildError, match=said) as caught:
        build_engines(bundle, tmp_path / "out", target="tensorrt-rtx", sms=(86,))
    assert caught.value.exit_code == 6
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_left_is_told_by_the_number_of_nodes(
    bundle: Bundle, child: Child, tmp_path: Path
) -> None:
    """The second graph has five times the nodes of the first."""
    child(BUILDS.replace('write(job["graph"].encode())', 'write(b"plan")').replace("1.0", "60.0"))
    graph, large = tmp_path / "graph.onnx", tmp_path / "large.onnx"
    for path, nodes in ((graph, 10), (large, 50)):
        path.write_bytes(bytes([7 << 3 | 2, 2 * nodes]) + bytes([1 << 3 | 2, 0]) * nodes)
    jobs = tuple(
        Job(stage=path.stem, graph=str(path), engine=str(tmp_path / path.stem), sm=86, plugin=False)
        for path in (graph, large, graph)
    )
    said: list[str] = []
    request = Request(target="tensorrt-rtx", workspace_mib=None, timings=None, jobs=jobs)
    assert len(list(built(request, said.append))) == 3
    assert said[0] == "[1/3] building graph"
    assert re.fullmatch(r"\[2/3\] building large, \d+ s so far, about 6 min left", said[1])
    assert re.fullmatch(r"\[3/3\] building graph, \d+ s so far, about 20 s left", said[2])


def test_a_full_disk_for_copies_of_the_graphs_is_named(
    bundle: Bundle, child: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(BUILDS)
    write = Path.write_bytes

    def full(self: Path, raw: bytes) -> int:
        if self.suffix == ".onnx":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, raw)

    monkeypatch.setattr(Path, "write_bytes", full)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StorageError, match=rf"graphs {tmp_path}/\w+ .* is full.*TMPDIR") as told:
        build_engines(bundle, tmp_path / "out", target="tensorrt-rtx", sms=(86,))
    assert told.value.exit_code == 6
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("where", [".", "engines", "a/b"])
def test_no_engine_is_put_into_a_bundle(
    bundle: Bundle, child: Child, where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    child(BUILDS)
    before = sorted(bundle.path.rglob("*"))
    out = str(bundle.path / where)
    words = ["build", str(bundle.path), "--target", "tensorrt-rtx", "--sm", "86", "--out", out]
    assert main([*words, "--overwrite"]) == 2
    assert "is inside the bundle" in capsys.readouterr().err
    assert sorted(bundle.path.rglob("*")) == before


@pytest.mark.parametrize("name", [".", "../tiny.bundle", "../tiny.bundle/../tiny.bundle/."])
def test_who_stands_in_a_bundle_gets_its_engines_beside_it(
    bundle: Bundle, child: Child, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(BUILDS)
    monkeypatch.chdir(bundle.path)
    assert main(["build", name, "--target", "tensorrt-rtx", "--sm", "86"]) == 0
    assert len(list((tmp_path / "tiny.bundle.engines").glob("*.engine"))) == 3
    bundle.verify()


def test_stopping_leaves_nothing_and_ends_the_child(
    bundle: Bundle, child: Child, tmp_path: Path
) -> None:
    child("open(sys.argv[3] + '.pid', 'w').write(str(os.getpid()))\nimport time\ntime.sleep(60)")
    before = sorted(tmp_path.iterdir())

    def stop(message: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engines(bundle, tmp_path / "out", target="tensorrt-rtx", sms=(86,), say=stop)
    assert sorted(tmp_path.iterdir()) == before


def test_an_older_folder_stays_where_a_build_fails(
    bundle: Bundle, child: Child, tmp_path: Path
) -> None:
    child(BUILDS)
    out = tmp_path / "out"
    build_engines(bundle, out, target="tensorrt-rtx", sms=(86,))
    kept = {path.name: path.read_bytes() for path in out.iterdir()}
    child("os.kill(os.getpid(), signal.SIGABRT)")
    with pytest.raises(BuildError):
        build_engines(bundle, out, target="tensorrt-rtx", sms=(86,), overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == kept


def test_overwriting_spares_what_is_no_engine(bundle: Bundle, child: Child, tmp_path: Path) -> None:
    child(BUILDS)
    out = tmp_path / "out"
    build_engines(bundle, out, target="tensorrt-rtx", sms=(86,))
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(OutputError, match=r"thesis\.txt.*left alone"):
        build_engines(bundle, out, target="tensorrt-rtx", sms=(86,), overwrite=True)
    assert (out / "thesis.txt").read_text() == "mine"


def test_a_graph_is_checked_before_the_builder_sees_it(
    bundle: Bundle, child: Child, tmp_path: Path
) -> None:
    child(BUILDS)
    graph = bundle.path / "text.onnx"
    content = bytearray(graph.read_bytes())
    content[len(content) // 2] ^= 1
    graph.write_bytes(content)
    with pytest.raises(IntegrityError):
        build_engines(bundle, tmp_path / "out", target="tensorrt-rtx", sms=(86,))
    assert not (tmp_path / "out").exists()


def test_what_no_builder_takes_is_said_before_anything_runs(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(BuildError, match=r"capability 87.*75, 80.*--target tensorrt"):
        build_engines(bundle, tmp_path / "out", target="tensorrt-rtx", sms=(87,))
    with pytest.raises(BuildError, match="leave --sm out"):
        build_engines(bundle, tmp_path / "out", target="tensorrt", sms=(86,))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match="pip install tensorrt-rtx-cu13"):
        build_engines(bundle, tmp_path / "out", target="tensorrt-rtx", sms=(86,))


def test_graphs_for_onnx_runtime_are_refused_before_anything_runs(
    for_onnx_runtime: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["build", str(for_onnx_runtime), "--target", "tensorrt-rtx", "--sm", "86"]
    assert main([*words, "--out", str(tmp_path / "out")]) == 3
    said = capsys.readouterr().err
    assert "Stage 'text' was exported for onnxruntime" in said
    assert "rt-ris export --arch colours --variant tiny --target onnx" in said
    assert not (tmp_path / "out").exists()


def test_channels_without_a_kernel_are_refused_before_anything_runs(
    bundle: Bundle, child: Child, tmp_path: Path
) -> None:
    child(BUILDS)
    manifest = bundle.manifest
    stages = [
        replace(stage, operators={OURS: (64, 256)}) if stage.spec.id == "fusion" else stage
        for stage in manifest.stages
    ]
    asked = replace(bundle, manifest=replace(manifest, stages=tuple(stages)))
    out, news = tmp_path / "out", list[str]()
    with pytest.raises(PluginError, match=r"'fusion' uses .* with 64 channels; our kernels take"):
        build_engines(asked, out, target="tensorrt-rtx", sms=(86,), say=news.append)
    assert news == []
    assert not out.exists()
    build_engines(asked, out, target="tensorrt-rtx", sms=(86,), plugin=False)


def test_the_operator_is_built_from_its_function_where_there_is_no_kernel(
    bundle: Bundle, child: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child(BUILDS + "json.dump(request, open(os.environ['REQUEST'], 'w'))")
    monkeypatch.setenv("REQUEST", str(tmp_path / "request.json"))
    manifest = bundle.manifest
    stages = [
        replace(stage, operators={OURS: (256,)} if stage.spec.id == "fusion" else {})
        for stage in manifest.stages
    ]
    asked = replace(bundle, manifest=replace(manifest, stages=tuple(stages)))
    news: list[str] = []
    build_engines(asked, tmp_path / "out", target="tensorrt-rtx", sms=(75, 86), say=news.append)
    jobs = json.loads((tmp_path / "request.json").read_text())["jobs"]
    assert [job["plugin"] for job in jobs] == [False] * 5 + [True]
    assert (jobs[-1]["stage"], jobs[-1]["sm"]) == ("fusion", 86)
    assert news[0] == "no kernel of ours for 7.5: our operator is built from its function there"


def test_words_that_are_no_capabilities(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["build", "x", "--target", "tensorrt-rtx", "--sm", "new"]) == 2
    assert "no list such as 75,86,120" in capsys.readouterr().err


def test_tensorrt_rtx_builds_the_tiny_bundle(bundle: Bundle, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_libs")
    records = build_engines(bundle, tmp_path / "out", target="tensorrt-rtx", sms=(80, 120))
    assert [(record.stage, record.sm) for record in records] == [
        (stage, sm) for stage in ("image", "text", "fusion") for sm in (80, 120)
    ]
    for record in records:
        content = (tmp_path / "out" / record.engine).read_bytes()
        assert len(content) == record.bytes > 1000
        assert b"\x7fELF" not in content
        assert record.layers > 0


@pytest.mark.skipif(sys.platform != "linux", reason="where Linux counts the starter's memory")
def test_a_builders_memory_is_not_its_starters() -> None:
    held = b"x" * (400 << 20)
    command = [sys.executable, "-c", "from rt_ris.build import child; print(child.peak_mib())"]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert 5 < int(said) < len(held) >> 20
