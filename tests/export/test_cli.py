"""The verb: numbers on stdout, news on stderr."""

from __future__ import annotations

import argparse
import json
import re
import signal
from functools import partial
from pathlib import Path

import pytest

import rt_ris_export
from rt_ris.cli import export as verb
from rt_ris_export.export import export_bundle

from .conftest import Traced


def _parsed(*words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    verb.add_parser(parser.add_subparsers())
    return parser.parse_args(["export", "--arch", "maris", "--variant", "tiny", *words])


@pytest.fixture
def quick(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = partial(export_bundle, steps=traced.steps())
    monkeypatch.setattr(rt_ris_export, "export_bundle", stored, raising=False)


@pytest.mark.usefixtures("quick", "one_picture")
def test_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = _parsed("--out", str(tmp_path / "a.bundle"))
    assert args.run(args) == 0
    out, err = capsys.readouterr()
    assert "fusion f_lav" in out
    assert re.search(r"limit, passed +1\.0e-04 +1\.0e-04\n", out)
    assert "not trained: masks mean nothing" in out
    assert str(tmp_path / "a.bundle") in out
    assert "[5/7] parity    PyTorch on chelsea with 3 sentences" in err


@pytest.mark.usefixtures("quick", "one_picture")
def test_json_is_alone_on_stdout(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = _parsed("--out", str(tmp_path / "a.bundle"), "--json")
    assert args.run(args) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bundle"] == str(tmp_path / "a.bundle")
    assert result["parity"]["stages"][0]["id"] == "image_encoder"


@pytest.mark.parametrize("words", [["--precision", "int8"], ["--target", "tensorrt"]])
def test_only_what_exists_is_offered(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        _parsed(*words)
    assert "invalid choice" in capsys.readouterr().err


@pytest.mark.usefixtures("quick")
def test_kill_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = signal.getsignal(signal.SIGTERM)

    def killed(*_: object, **__: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr("rt_ris_export.steps.parity.measure", killed)
    args = _parsed("--out", str(tmp_path / "a.bundle"))
    with pytest.raises(KeyboardInterrupt):
        args.run(args)
    assert not list(tmp_path.iterdir())
    assert signal.getsignal(signal.SIGTERM) is before
