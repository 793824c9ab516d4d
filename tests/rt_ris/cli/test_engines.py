"""Every verb that runs a bundle, on engines; and what doctor says of them."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rt_ris.bundle import Bundle
from rt_ris.cli import main
from rt_ris.cli.doctor import _try_engines

Capture = pytest.CaptureFixture[str]
GATE = "verified.nvidia-test-4000.json"
BOTH = pytest.mark.parametrize("world", ["10.3.0", "rtx-1.7.1.116"], indirect=True)


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.new("RGB", (40, 24), (220, 40, 30)).save(path)
    return path


def dataset(root: Path) -> Path:
    """One picture and two sentences about it in RefCOCO's format."""
    pytest.importorskip("pycocotools")
    (root / "images").mkdir(parents=True)
    Image.new("RGB", (40, 24), (220, 40, 30)).save(root / "images" / "0.png")
    polygon = [4, 4, 30, 4, 30, 20, 4, 20]
    box = {"id": 7, "image_id": 1, "category_id": 1, "segmentation": [polygon], "iscrowd": 0}
    document = {
        "images": [{"id": 1, "file_name": "0.png", "height": 24, "width": 40}],
        "annotations": [box],
        "categories": [],
    }
    (root / "instances.json").write_text(json.dumps(document))
    said = [
        {"sent_id": number, "sent": text, "raw": text}
        for number, text in enumerate(("red", "green"))
    ]
    ref = {"ref_id": 1, "image_id": 1, "split": "test", "ann_id": 7, "sentences": said}
    (root / "refs(made).json").write_text(json.dumps([ref]))
    return root


def said(words: list[str], capsys: Capture, code: int = 0) -> dict[str, Any]:
    """The document that a command prints."""
    capsys.readouterr()
    assert main([*words, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def looked(tiny: Path, engines: Path | None, code: int) -> dict[str, Any]:
    """What doctor finds of engines, with its rows by what they are about, and its exit code."""
    found, found_code = _try_engines(Bundle.open(tiny), engines)
    assert found_code == code
    return {**found, "rows": {row["need"]: row for row in found["requirements"]}}


def verdicts(found: dict[str, Any]) -> list[str]:
    return [row["verdict"] for row in found["requirements"]]


@BOTH
@pytest.mark.parametrize("verb", ["verify", "segment", "evaluate"])
def test_every_verb_that_runs_a_bundle_takes_engines(
    world: Any, engines: Path, tiny: Path, photo: Path, verb: str, capsys: Capture
) -> None:
    more = []
    if verb == "segment":
        more = [str(photo), "--describe", "red", "--out", str(photo.with_name("masks"))]
    if verb == "evaluate":
        more = ["--data", str(dataset(photo.with_name("data")))]
    beside = said(world.words(verb, tiny, *more), capsys)
    elsewhere = shutil.move(str(engines), str(photo.with_name("else where")))
    named = said(world.words(verb, tiny, *more, "--engines", elsewhere), capsys)
    on_processor = said([verb, str(tiny), *more], capsys)
    for found in (beside, named):
        if verb == "verify":
            assert found["passed"]
            assert len(found["checks"]) > len(on_processor["checks"])  # every profile
        elif verb == "segment":
            ours, theirs = (one["images"][0]["results"][0] for one in (found, on_processor))
            assert ours["score"] == pytest.approx(theirs["score"])
        else:
            assert (found["sentences"], found["oIoU"] > 0) == (2, True)
            assert found["oIoU"] == pytest.approx(on_processor["oIoU"])


@BOTH
def test_evaluate_refuses_what_is_unverified(
    world: Any, engines: Path, tiny: Path, tmp_path: Path, capsys: Capture
) -> None:
    (engines / GATE).unlink()
    data = dataset(tmp_path / "data")
    assert main(world.words("evaluate", tiny, "--data", str(data))) == 3
    assert "are unverified on NVIDIA Test 4000" in capsys.readouterr().err


@BOTH
def test_engines_and_a_backend_that_runs_none(
    world: Any, engines: Path, tiny: Path, photo: Path, capsys: Capture
) -> None:
    out = photo.with_name("masks")
    for words in (
        ["verify", str(tiny)],
        ["segment", str(tiny), str(photo), "--describe", "red", "--out", str(out)],
    ):
        assert main([*words, "--engines", str(engines)]) == 2
        assert "choose backend tensorrt or tensorrt-rtx" in capsys.readouterr().err
    assert not out.exists()


@BOTH
def test_a_report_on_engines_judges_each_and_names_nobody(
    world: Any, engines: Path, tiny: Path, tmp_path: Path
) -> None:
    (engines / GATE).unlink()
    report = tmp_path / "report.json"
    assert main(world.words("verify", tiny, "--report", str(report))) == 0
    rows = {row["need"]: row for row in json.loads(report.read_text())["doctor"]}
    for stage in ("image", "text", "fusion"):
        assert rows[f"{world.target} {stage}"]["verdict"] == "ok"
    assert rows[f"{world.target} gate"]["verdict"] == "fails"  # it was not written yet
    assert "verify BUNDLE --backend" in rows[f"{world.target} gate"]["consequence"]
    assert str(tmp_path) not in report.read_text()
    assert main(["verify", str(tiny), "--report", str(report), "--overwrite"]) == 0
    needs = [row["need"] for row in json.loads(report.read_text())["doctor"]]
    assert not [need for need in needs if need.endswith("gate")]


class TestDoctor:
    pytestmark = BOTH

    def test_engines_that_run(self, world: Any, engines: Path, tiny: Path, capsys: Capture) -> None:
        found = looked(tiny, None, 0)
        assert found["path"] == str(engines)
        assert found["backends"] == {world.target: {"runs": True}}
        assert verdicts(found) == ["ok"] * 4
        row = found["rows"][f"{world.target} text"]
        assert row["expected"].endswith("on NVIDIA Test 4000, compute capability 8.9")
        assert f"text.fp32.{world.target}-local.engine, 0.0 MiB, built by" in row["found"]
        gate = found["rows"][f"{world.target} gate"]
        assert (gate["expected"], gate["found"][:9]) == (GATE, "passed on")
        assert main(["doctor", str(tiny)]) == 0
        shown = capsys.readouterr().out
        assert f"\nengines {engines}\n  {world.target:<17} runs\n" in shown
        assert f"\n  {f'{world.target} text':<21} ok: of this bundle" in shown

    def test_unverified_ones_get_the_command(
        self, world: Any, engines: Path, tiny: Path, capsys: Capture
    ) -> None:
        (engines / GATE).unlink()
        found = looked(tiny, engines, 3)
        assert verdicts(found) == ["ok", "ok", "ok", "fails"]
        command = f"rt-ris verify {tiny} --backend {world.target} --engines {engines}"
        assert found["rows"][f"{world.target} gate"]["consequence"].endswith(command)
        assert "unverified" in found["backends"][world.target]["why_not"]
        # the bundle itself runs on the processor; its engines count where they are asked for
        assert said(["doctor", str(tiny)], capsys, 0)["engines"]["backends"] == found["backends"]
        assert main(["doctor", str(tiny), "--engines", str(engines)]) == 3

    def test_each_engine_is_judged(self, world: Any, engines: Path, tiny: Path) -> None:
        """One is cut short, one is of another version, one is not there."""
        (cut,) = engines.glob("image.*.engine")
        os.truncate(cut, 100)
        (record,) = engines.glob("text.*.engine.json")
        record.write_text(json.dumps({**json.loads(record.read_text()), "version": "9.9"}))
        for path in engines.glob("fusion.*"):
            path.unlink()
        found = looked(tiny, engines, 3)
        assert verdicts(found) == ["fails", "fails", "absent", "unknown"]
        image, text, fusion, gate = (row["consequence"] for row in found["requirements"])
        build = f"rt-ris build {tiny} --target {world.target} --overwrite"
        assert "has bytes 100; its record says" in image
        assert f"version 9.9; here it must be {world.trt.__version__}. Rebuild" in text
        assert text.endswith(build)
        assert fusion.endswith(build)
        assert "no gate counts before every engine above is ok" in gate

    def test_one_for_another_capability_is_not_for_here(
        self, world: Any, engines: Path, tiny: Path
    ) -> None:
        for path in engines.glob("text.*"):
            path.rename(path.with_name(path.name.replace("-local", "-sm75")))
        row = looked(tiny, None, 3)["rows"][f"{world.target} text"]
        assert (row["verdict"], row["found"]) == ("fails", f"text.fp32.{world.target}-sm75.engine")
        assert "no engine of stage 'text'" in row["consequence"]

    def test_without_a_gpu_nothing_is_ok(self, world: Any, engines: Path, tiny: Path) -> None:
        world.cudart.present = False
        (cut,) = engines.glob("image.*.engine")
        os.truncate(cut, 100)
        found = looked(tiny, engines, 3)
        assert verdicts(found) == ["fails", "unknown", "unknown", "unknown"]
        text = found["rows"][f"{world.target} text"]
        assert text["consequence"].startswith("as they were built")
        assert "no usable GPU here" in text["consequence"]
        assert "for compute capability 8.9" in text["found"]
        assert found["rows"][f"{world.target} gate"]["found"] == GATE

    def test_without_the_library_nothing_is_ok(self, world: Any, engines: Path, tiny: Path) -> None:
        module = world.target.replace("-", "_")
        world.monkeypatch.setitem(sys.modules, module, None)
        found = looked(tiny, None, 4)
        assert verdicts(found) == ["unknown"] * 4
        row = found["rows"][f"{world.target} text"]
        assert (
            f'{module} is not installed; run: pip install "rt-ris[{world.target}]"'
            in (row["consequence"])
        )

    def test_a_folder_that_others_may_fill(self, world: Any, engines: Path, tiny: Path) -> None:
        engines.chmod(0o777)
        found = looked(tiny, engines, 5)
        assert list(found["rows"]) == [f"{world.target} folder"]
        assert "may be written by everybody" in found["requirements"][0]["consequence"]

    @pytest.mark.parametrize("there", [False, True])
    def test_no_engines(self, world: Any, tiny: Path, there: bool) -> None:
        folder = tiny.with_name("tiny.engines")
        if there:
            folder.mkdir()
        for named in (None, folder):
            found = looked(tiny, named, 2)
            assert (verdicts(found), found["backends"]) == (["absent"], {})
            command = f"rt-ris build {tiny} --target tensorrt"
            assert command in found["requirements"][0]["consequence"]

    def test_a_library_that_crashes(
        self, world: Any, engines: Path, tiny: Path, tmp_path: Path
    ) -> None:
        module = world.target.replace("-", "_")
        (tmp_path / "broken").mkdir()
        (tmp_path / "broken" / f"{module}.py").write_text("import os; os.abort()")
        before = os.environ["PYTHONPATH"]
        world.monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'broken'}{os.pathsep}{before}")
        found = looked(tiny, engines, 6)
        assert verdicts(found) == ["unknown"] * 4
        assert "ended with code -6" in found["requirements"][0]["consequence"]
        assert "installed but broken" in found["backends"][world.target]["why_not"]

    def test_without_onnx_runtime_engines_still_run(
        self, world: Any, engines: Path, tiny: Path, capsys: Capture
    ) -> None:
        real = importlib.util.find_spec
        world.monkeypatch.setattr(
            "importlib.util.find_spec",
            lambda name, *a: None if name == "onnxruntime" else real(name, *a),
        )
        capsys.readouterr()
        assert main(["doctor", str(tiny), "--engines", str(engines), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["bundle"]["runs"] is False
        assert found["engines"]["backends"] == {world.target: {"runs": True}}
        assert found["verbs"]["segment"]["runs"] is True
        assert world.target in found["verbs"]["segment"]["backends"].split()
        assert found["verbs"]["export"]["runs"] is False


def test_a_folder_of_engines_without_its_bundle_is_usage(tmp_path: Path, capsys: Capture) -> None:
    assert main(["doctor", "--engines", str(tmp_path)]) == 2
    assert "name the bundle, too" in capsys.readouterr().err
