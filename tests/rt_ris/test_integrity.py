"""A bundle works wherever it is copied; a flipped bit in it is refused before it is parsed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

import rt_ris.bundle
from rt_ris.build.replay import replay
from rt_ris.bundle import Bundle
from rt_ris.cli import main
from rt_ris.predictor import Predictor
from tests.conftest import Watch

TINY = Path(__file__).parents[1] / "fixtures" / "tiny"
FILES = sorted(path.name for path in TINY.iterdir())
SEALED_FIRST = ("manifest.json", "manifest.sha256")
REPLAYED = ("golden.npz", "parity.json")


@pytest.fixture
def elsewhere(tmp_path: Path) -> Iterator[Path]:
    """A copy in a folder of its own that nobody may write to."""
    bundle = Path(shutil.copytree(TINY, tmp_path / "a place" / "bundle.of mine"))
    for path in bundle.iterdir():
        path.chmod(0o444)
    bundle.chmod(0o555)
    yield bundle
    bundle.chmod(0o755)


def state(bundle: Path) -> dict[str, tuple[bytes, int, int]]:
    """Content and times of everything; the folder's time tells of files that came and went."""
    files = {path.name: path for path in bundle.iterdir()}
    return {
        name: (
            b"" if path.is_dir() else path.read_bytes(),
            path.stat().st_mtime_ns,
            path.stat().st_mode,
        )
        for name, path in {**files, ".": bundle}.items()
    }


def test_a_copy_that_nobody_may_write_to_works(
    elsewhere: Path, picture: npt.NDArray[np.uint8], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("onnxruntime")
    Image.fromarray(picture).save(tmp_path / "photo.png")
    monkeypatch.chdir(tmp_path)
    before = state(elsewhere)
    words = ["segment", str(elsewhere), "photo.png", "--describe", "red", "--out", "out"]
    assert main(words) == 0
    assert (tmp_path / "out" / "photo_1_mask.png").is_file()
    for verb in ("verify", "inspect", "doctor"):
        assert main([verb, str(elsewhere)]) == 0
    assert state(elsewhere) == before


def test_the_watch_sees_every_parser(tiny: Path, watch: Watch) -> None:
    with Predictor.load(tiny, threads=1) as predictor:
        replay(Bundle.open(tiny), predictor)
    parsed = {name for name in FILES if (tiny / name).read_bytes() in watch.seen}
    assert parsed == set(FILES) - {"manifest.sha256"}


@pytest.mark.parametrize("name", FILES)
def test_any_flipped_bit_is_refused_before_it_is_parsed(
    name: str, tiny: Path, watch: Watch
) -> None:
    size = (tiny / name).stat().st_size
    flipped = watch.flip(
        tiny / name,
        range(size),
        lambda: Predictor.load(tiny, threads=1),
        unparsed=name in SEALED_FIRST,
    )
    assert flipped == size


@pytest.mark.parametrize("name", REPLAYED)
def test_what_is_replayed_is_checked_again_when_it_is_read(
    name: str, tiny: Path, watch: Watch
) -> None:
    bundle = Bundle.open(tiny)
    with Predictor.load(tiny, threads=1) as predictor:
        places = range(0, (tiny / name).stat().st_size, 7)
        watch.flip(tiny / name, places, lambda: replay(bundle, predictor), unparsed=False)


@pytest.mark.parametrize("name", FILES)
def test_every_verb_that_uses_a_bundle_refuses_it_with_code_5(
    name: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxruntime")
    Image.new("RGB", (40, 24)).save(tmp_path / "photo.png")
    segment = ["segment", str(tiny), str(tmp_path / "photo.png"), "--describe", "red", "--out"]
    raw = (tiny / name).read_bytes()
    for place in {0, len(raw) // 2, len(raw) - 1}:
        (tiny / name).write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
        for words in (
            [*segment, str(tmp_path / "out")],
            ["verify", str(tiny)],
            ["inspect", str(tiny)],
        ):
            assert main(words) == 5, (words[0], place)
        assert name.split(".")[0] in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_watch_would_notice(tiny: Path, watch: Watch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rt_ris.bundle, "_check_seal", lambda *_: None)
    graph = tiny / "fusion.onnx"
    with pytest.raises(BaseException, match="DID NOT RAISE"):
        watch.flip(
            graph, [os.path.getsize(graph) - 1], lambda: Bundle.open(tiny).verify(), unparsed=False
        )
