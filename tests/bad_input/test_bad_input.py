"""Every row of docs/bad_input.md, through the command line and as an exception."""

from __future__ import annotations

import ast
import errno
import hashlib
import json
import os
import re
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import rt_ris.errors
from rt_ris.cli import main
from rt_ris.image import load_image
from rt_ris.text import TruncationWarning

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "fixtures" / "tiny"


@dataclass(frozen=True)
class Row:
    """A row of the table."""

    id: str
    exception: str
    exit_code: int
    test: str


def rows() -> list[Row]:
    found = []
    for line in (ROOT / "docs" / "bad_input.md").read_text().splitlines():
        cells = [cell.strip().strip("`") for cell in line.strip("|").split("|")]
        if line.startswith("| `"):
            found.append(Row(cells[0], cells[3], int(cells[4]), cells[5]))
    return found


@dataclass
class Call:
    """A call of ``segment`` that a case may spoil."""

    folder: Path
    patch: pytest.MonkeyPatch
    sentence: str | None = "red"
    backend: str = "auto"
    further_pictures: tuple[Path, ...] = ()
    further_sentences: tuple[str, ...] = ()
    out: Path = field(init=False)
    bundle: Path = field(init=False)
    picture: Path = field(init=False)

    def __post_init__(self) -> None:
        self.out = self.folder / "out"
        self.bundle = Path(shutil.copytree(TINY, self.folder / "bundle"))
        self.save(red(24, 40))

    def save(self, image: Image.Image, name: str = "a.png", **options: object) -> None:
        self.picture = self.folder / name
        image.save(self.picture, **options)

    def write(self, raw: bytes, name: str = "a.jpg") -> None:
        self.picture = self.folder / name
        self.picture.write_bytes(raw)

    def flip(self, name: str) -> None:
        raw = bytearray((self.bundle / name).read_bytes())
        raw[len(raw) // 2] ^= 1
        (self.bundle / name).write_bytes(raw)

    def reseal(self, before: str, after: str) -> None:
        path = self.bundle / "manifest.json"
        text = path.read_text()
        assert before in text
        raw = text.replace(before, after, 1).encode()
        path.write_bytes(raw)
        path.with_name("manifest.sha256").write_text(hashlib.sha256(raw).hexdigest() + "\n")

    def words(self) -> list[str]:
        sentences = () if self.sentence is None else (self.sentence, *self.further_sentences)
        describe = [word for sentence in sentences for word in ("--describe", sentence)]
        pictures = map(str, (self.picture, *self.further_pictures))
        named = ["--out", str(self.out), "--backend", self.backend, "--threads", "1"]
        return ["segment", str(self.bundle), *pictures, *describe, *named]


def red(height: int, width: int) -> Image.Image:
    return Image.new("RGB", (width, height), (230, 20, 20))


def half(path: Path) -> bytes:
    raw = path.read_bytes()
    return raw[: len(raw) // 2]


CASES: dict[str, Callable[[Call], object]] = {}


def case(name: str) -> Callable[[Callable[[Call], object]], Callable[[Call], object]]:
    def note(made: Callable[[Call], object]) -> Callable[[Call], object]:
        CASES[name] = made
        return made

    return note


CASES |= {
    "grey": lambda call: call.save(Image.new("L", (40, 24), 90)),
    "rgba": lambda call: call.save(Image.new("RGBA", (40, 24), (230, 20, 20, 128))),
    "palette": lambda call: call.save(red(24, 40).quantize(4), transparency=0),
    "cmyk": lambda call: call.save(red(24, 40).convert("CMYK"), "a.jpg"),
    "sixteen-bit": lambda call: call.save(
        Image.fromarray(np.full((24, 40), 40_000, dtype=np.uint16))
    ),
    "one-pixel": lambda call: call.save(red(1, 1)),
    "long": lambda call: call.save(red(3, 20_000)),
    "missing-file": lambda call: call.picture.unlink(),
    "not-an-image": lambda call: call.write(b"to whom it may concern"),
    "empty-file": lambda call: call.write(b""),
    "postscript": lambda call: call.write(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n", "a.eps"
    ),
    "no-bundle": lambda call: shutil.rmtree(call.bundle),
    "wrong-version": lambda call: call.reseal('"schema_version": 1', '"schema_version": 2'),
    "flipped-byte": lambda call: call.flip("text.onnx"),
    "flipped-manifest": lambda call: call.flip("manifest.json"),
    "flipped-hash": lambda call: call.flip("manifest.sha256"),
    "missing-member": lambda call: (call.bundle / "parity.json").unlink(),
    "extra-member": lambda call: (call.bundle / "notes.txt").write_text("mine"),
    "truncated-member": lambda call: (call.bundle / "image.onnx").write_bytes(
        half(call.bundle / "image.onnx")
    ),
    "path-out": lambda call: call.reseal('"image.onnx": {', '"../image.onnx": {'),
    "absolute-path": lambda call: call.reseal('"image.onnx": {', '"/image.onnx": {'),
    "duplicate-key": lambda call: call.reseal('"variant":', '"variant": "other", "variant":'),
    "unknown-field": lambda call: call.reseal('"variant":', '"colour": "red", "variant":'),
    "not-a-number": lambda call: call.reseal('"relative_error": 0.0', '"relative_error": NaN'),
    "huge-number": lambda call: call.reseal(
        '"relative_error": 0.0', f'"relative_error": 1{"0" * 400}'
    ),
    "out-is-a-file": lambda call: call.out.write_text("mine"),
}


@case("exif")
def exif(call: Call) -> None:
    tag = Image.Exif()
    tag[0x0112] = 6
    call.save(red(24, 40), "a.jpg", exif=tag)


@case("long-name")
def long_name(call: Call) -> None:
    call.picture = call.folder / ("a" * 300 + ".png")


@case("folder")
def folder(call: Call) -> None:
    call.picture = call.folder


@case("truncated-jpeg")
def truncated_jpeg(call: Call) -> None:
    call.save(red(200, 300), "a.jpg")
    call.write(half(call.picture))


@case("truncated-png")
def truncated_png(call: Call) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3)).astype(np.uint8)
    call.save(Image.fromarray(noise))
    call.write(half(call.picture), "a.png")


@case("second-broken")
def second_broken(call: Call) -> None:
    broken = call.folder / "b.png"
    broken.write_bytes(half(call.picture))
    call.further_pictures = (broken,)


@case("second-empty")
def second_empty(call: Call) -> None:
    call.further_sentences = ("",)


@case("bomb")
def bomb(call: Call) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return (
            struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes(1000)))
    call.write(b"\x89PNG\r\n\x1a\n" + head + body + chunk(b"IEND", b""), "a.png")


def saying(sentence: str | None) -> Callable[[Call], object]:
    def say(call: Call) -> None:
        call.sentence = sentence

    return say


CASES |= {
    "emoji": saying("the red 🍎"),
    "non-latin": saying("красная чашка 红色 أحمر"),
    "long-sentence": saying("the red thing that is on the left of the blue thing"),
    "very-long-sentence": saying("red " * 25_000),
    "empty-sentence": saying(""),
    "blank-sentence": saying(" \t "),
    "no-sentence": saying(None),
}


@case("link-out")
def link_out(call: Call) -> None:
    (call.bundle / "golden.npz").rename(call.folder / "golden.npz")
    (call.bundle / "golden.npz").symlink_to(call.folder / "golden.npz")


@case("unknown-backend")
def unknown_backend(call: Call) -> None:
    call.backend = "tpu"


@case("no-engine")
def no_engine(call: Call) -> None:
    call.patch.setattr("importlib.util.find_spec", lambda name: None)


@case("full-disk-segment")
def full_disk(call: Call) -> None:
    write = Path.write_bytes

    def full(self: Path, raw: bytes) -> int:
        write(self, raw[:10])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    call.patch.setattr(Path, "write_bytes", full)


PIXELS: dict[str, tuple[int, int, int]] = {
    "grey": (90, 90, 90),
    "rgba": (242, 137, 137),
    "palette": (255, 255, 255),
    "sixteen-bit": (156, 156, 156),
    "exif": (230, 20, 20),
    "cmyk": (230, 20, 20),
    "long": (230, 20, 20),
}
"""What the pictures' pixels are read as; JPEG is off by a few."""

SIZES = {"exif": (40, 24), "one-pixel": (1, 1), "long": (3, 20_000)}
"""Height and width of the masks; those of the others are 24 and 40."""


def check_outcome(row: Row, call: Call) -> None:
    """The result is that of the picture as the table says it is read."""
    [image] = json.loads((call.out / "result.json").read_text("utf-8"))["images"]
    [result] = image["results"]
    size = SIZES.get(row.id, (24, 40))
    assert tuple(image["size"]) == size
    assert np.asarray(Image.open(call.out / result["mask"])).shape == size
    assert (result["truncated_after"] is not None) == (row.exception == "TruncationWarning")
    if row.id in PIXELS:
        off = load_image(call.picture).astype(int) - PIXELS[row.id]
        assert np.abs(off).max() <= (4 if call.picture.suffix == ".jpg" else 0)


TABLE = rows()
HERE = [row for row in TABLE if not row.test]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Call:
    pytest.importorskip("onnxruntime")
    return Call(tmp_path, monkeypatch)


@pytest.mark.parametrize("row", HERE, ids=lambda row: row.id)
def test_bad_input(row: Row, call: Call, capsys: pytest.CaptureFixture[str]) -> None:
    CASES[row.id](call)
    assert main(call.words()) == row.exit_code
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if row.exit_code == 0:
        check_outcome(row, call)
        lines = 1 if row.exception == "TruncationWarning" else 0
        assert captured.err.count("rt-ris: warning: ") == lines
    elif row.exception == "-":
        assert "usage:" in captured.err
    else:
        assert re.fullmatch(r"rt-ris: error: .+[.\]]", captured.err.strip(), re.DOTALL) or (
            "pip install" in captured.err
        )
        assert not call.out.is_dir() or not list(call.out.iterdir())


@pytest.mark.parametrize(
    "row",
    [row for row in HERE if row.exception not in ("-", "TruncationWarning")],
    ids=lambda r: r.id,
)
def test_its_exception(row: Row, call: Call) -> None:
    CASES[row.id](call)
    call.patch.setenv("RT_RIS_DEBUG", "1")
    with pytest.raises(rt_ris.errors.RtRisError) as caught:
        main(call.words())
    assert type(caught.value).__name__ == row.exception
    assert caught.value.exit_code == row.exit_code


def test_every_row_has_a_test_and_every_case_a_row() -> None:
    assert sorted(CASES) == sorted(row.id for row in HERE)
    assert len({row.id for row in TABLE}) == len(TABLE)
    for row in TABLE:
        if row.test:
            path, name = row.test.split("::")
            tree = ast.parse((ROOT / path).read_text())
            assert name in {at.name for at in ast.walk(tree) if isinstance(at, ast.FunctionDef)}


def test_the_warning_is_the_one_of_the_table() -> None:
    named = {row.exception for row in TABLE if row.exit_code == 0} - {"-"}
    assert named == {TruncationWarning.__name__}
