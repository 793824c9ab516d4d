"""Building engines: what is written, what is refused, and that nothing is left of a failure."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rt_ris.build import engines
from rt_ris.build.engines import build_engines
from rt_ris.bundle import Bundle
from rt_ris.cli import main
from rt_ris.errors import BuildError, IntegrityError, MissingExtraError, OutputError

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
    assert "[2/6] building image.fp32.tensorrt-rtx-sm86.engine, about 5 s left" in said.err
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
        ("os.kill(os.getpid(), signal.SIGABRT)", "died of SIGABRT"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "memory was exhausted"),
        ("sys.exit('no libcuda')", "ended with code 1.*no libcuda"),
        ("print(json.dumps({'failed': {'errors': ['Resize: why']}}))", "refused .*: Resize: why"),
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
