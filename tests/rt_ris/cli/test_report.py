"""The report of verify: complete, whole, and about nobody."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from rt_ris.bundle import Bundle
from rt_ris.cli import main, report
from rt_ris.cli.report import REPORT_VERSION, Anonymous

DOC = Path(__file__).parents[3] / "docs" / "verify_report.md"
FIELDS = {
    *("report_version", "made", "rt_ris", "python", "platform", "packages", "bundle"),
    *("backend", "doctor", "replay", "timings", "error"),
}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "report.json"


def written(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_bytes())
    assert set(found) == FIELDS
    assert not list(path.parent.glob(".*.partial"))
    return found


def test_a_report_of_a_gate_that_passes(
    tiny: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    assert main(["verify", str(tiny), "--json", "--report", str(out)]) == 0
    found = written(out)
    assert found["report_version"] == REPORT_VERSION
    assert found["replay"] == json.loads(capsys.readouterr().out)
    assert len(found["replay"]["checks"]) > 5
    assert found["error"] is None
    assert found["backend"] == "onnxruntime"
    assert found["bundle"]["sha256"] == Bundle.open(tiny).sha256
    assert found["bundle"]["precision"] == dict.fromkeys(("image", "text", "fusion"), "fp32")
    assert set(found["timings"]) == {"image", "text", "fusion"}
    assert all(
        timing["runs"] == 1 and timing["total_ms"] > 0 for timing in found["timings"].values()
    )
    assert {"need", "expected", "found", "consequence", "verdict"} == set(found["doctor"][0])
    assert found["packages"]["numpy"]


def test_a_gate_that_misses_gives_code_1_and_the_report(
    tiny: Path, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(tiny), "--backend", "fake", "--report", str(out)]) == 1
    said = capsys.readouterr()
    assert "image" in said.out
    found = written(out)
    assert found["replay"]["passed"] is False
    assert found["error"]["type"] == "ParityError"
    assert found["error"]["exit_code"] == 1
    assert found["error"]["message"] in said.err


@pytest.mark.parametrize("name", ["image.onnx", "manifest.json"])
def test_a_damaged_bundle_is_reported(name: str, tiny: Path, out: Path) -> None:
    raw = bytearray((tiny / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (tiny / name).write_bytes(raw)
    assert main(["verify", str(tiny), "--backend", "fake", "--report", str(out)]) == 5
    found = written(out)
    assert (found["error"]["type"], found["replay"]) == ("IntegrityError", None)
    assert (found["bundle"] is None) is (name == "manifest.json")


def test_what_nobody_foresaw_is_reported_without_a_traceback(
    tiny: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> None:
        raise ZeroDivisionError(f"in {tiny}/image.onnx")

    monkeypatch.setattr("rt_ris.cli.verify.replay", fails)
    assert main(["verify", str(tiny), "--backend", "fake", "--report", str(out)]) == 70
    error = written(out)["error"]
    assert error == {
        "type": "ZeroDivisionError",
        "message": "in BUNDLE/image.onnx",
        "exit_code": None,
    }


def test_an_interruption_leaves_no_report(
    tiny: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rt_ris.cli.verify.replay", stop)
    assert main(["verify", str(tiny), "--backend", "fake", "--report", str(out)]) == 130
    assert not out.exists()


def test_a_file_that_is_there_is_left_alone(
    tiny: Path, out: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out.write_text("mine")
    words = ["verify", str(tiny), "--backend", "fake", "--report", str(out)]
    with monkeypatch.context() as patch:
        patch.setattr("rt_ris.cli.verify.load", lambda args: pytest.fail("it ran"))
        assert main(words) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_text() == "mine"
    assert main([*words, "--overwrite"]) == 1
    written(out)
    assert main([*words[:-1], str(tiny.parent), "--overwrite"]) == 2
    assert main([*words[:-1], str(tiny.parent / "no" / "report.json")]) == 2
    assert main(["verify", str(tiny), "--backend", "fake", "--overwrite"]) == 2


def test_a_report_appears_whole_or_not_at_all(
    tiny: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    out.write_text("old")
    monkeypatch.setattr("rt_ris.bundle.os.replace", full)
    words = ["verify", str(tiny), "--backend", "fake", "--report", str(out), "--overwrite"]
    assert main(words) == 6
    assert [path.name for path in out.parent.iterdir() if path.is_file()] == ["report.json"]
    assert out.read_text() == "old"


@pytest.fixture
def alice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Alice Smith's home on her machine."""
    home = tmp_path / "homes" / "alice smith"
    home.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.setenv(name, "asmith")
    monkeypatch.setattr(report.platform, "node", lambda: "wonderland.example.org")
    real = report.platform.platform()
    monkeypatch.setattr(report.platform, "platform", lambda: f"{real}-asmith")
    return home


@pytest.mark.parametrize("spoilt", [None, "text.onnx", "manifest.json"])
def test_a_report_names_nobody(spoilt: str | None, tiny: Path, alice: Path) -> None:
    bundle = Path(shutil.copytree(tiny, alice / "asmith.bundle"))
    if spoilt:
        (bundle / spoilt).unlink()
    out = alice / "report.json"
    assert main(["verify", str(bundle), "--backend", "fake", "--report", str(out)]) == (
        5 if spoilt else 1
    )
    raw = out.read_text("utf-8")
    for personal in ("asmith", "alice", "smith", "wonderland", "homes", str(alice.parents[1])):
        assert personal not in raw
    assert ("BUNDLE" in raw) is (spoilt is not None)


def test_what_is_taken_out_of_a_text(alice: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(alice)
    clean = Anonymous(Path("b")).text
    assert clean("a bundle of b is big") == "a bundle of b is big"
    assert clean(f"{alice}/b lacks a member") == "BUNDLE lacks a member"
    assert clean(f"{alice}/.venv/lib/x.so: cannot open") == "x.so: cannot open"
    assert clean("'/opt/of/others/libcuda.so.1' is missing") == "'libcuda.so.1' is missing"
    assert clean("asmith_1 at wonderland, not asmithy") == "NAME_1 at NAME, not asmithy"
    assert clean("uint8 [1, 8], N/A, 1/2, fp16/fp32") == "uint8 [1, 8], N/A, 1/2, fp16/fp32"
    assert (
        Anonymous(Path("x/b")).text("There is no bundle at x/b;") == "There is no bundle at BUNDLE;"
    )


def test_users_without_an_entry(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unknown(*_: object) -> None:
        raise KeyError("uid not found")

    def homeless(*_: object) -> None:
        raise RuntimeError("no home")

    monkeypatch.setattr(report.getpass, "getuser", unknown)
    monkeypatch.setattr(report.Path, "home", homeless)
    assert Anonymous(tmp_path).text(f"at {tmp_path}") == "at BUNDLE"


def test_every_field_is_documented() -> None:
    page = DOC.read_text("utf-8")
    assert {field for field in FIELDS if f"| `{field}` |" not in page} == set()
