from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rt_ris.bundle import Bundle, write_bundle
from rt_ris.errors import BundleError, IntegrityError, ManifestError, OutputError, StorageError
from rt_ris.manifest import Manifest
from rt_ris.predictor import Predictor

TINY = Path(__file__).parents[1] / "fixtures" / "tiny"
MEMBERS = sorted(path.name for path in TINY.iterdir())


def draft() -> tuple[Manifest, dict[str, bytes | Path]]:
    bundle = Bundle.open(TINY)
    members: dict[str, bytes | Path] = {name: bundle.read(name) for name in bundle.manifest.members}
    return replace(bundle.manifest, members={}), members


def check_all(path: Path) -> None:
    Bundle.open(path).verify()


def reseal(path: Path, change: Callable[[str], str]) -> None:
    """Change the manifest's text and write the hash that fits."""
    raw = change((path / "manifest.json").read_text()).encode()
    (path / "manifest.json").write_bytes(raw)
    (path / "manifest.sha256").write_text(hashlib.sha256(raw).hexdigest() + "\n")


def test_an_untouched_bundle_is_whole(tiny: Path) -> None:
    check_all(tiny)
    Predictor.load(tiny, backend="fake").close()


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("verify", ["open", "load"])
def test_any_flipped_byte_is_found(tiny: Path, name: str, verify: str) -> None:
    raw = (tiny / name).read_bytes()
    for place in sorted({*range(0, len(raw), max(1, len(raw) // 16)), len(raw) - 1}):
        spoilt = bytearray(raw)
        spoilt[place] ^= 0x01
        (tiny / name).write_bytes(spoilt)
        with pytest.raises(IntegrityError) as caught:
            check_all(tiny) if verify == "open" else Predictor.load(tiny, backend="fake")
        assert caught.value.exit_code == 5
    (tiny / name).write_bytes(raw)
    check_all(tiny)


@pytest.mark.parametrize("name", MEMBERS)
@pytest.mark.parametrize("change", ["longer", "shorter", "empty", "missing"])
def test_members_keep_their_length(tiny: Path, name: str, change: str) -> None:
    raw = (tiny / name).read_bytes()
    (tiny / name).unlink()
    if change != "missing":
        (tiny / name).write_bytes(
            {"longer": raw + b"\n", "shorter": raw[:-1], "empty": b""}[change]
        )
    with pytest.raises(IntegrityError):
        check_all(tiny)


def test_the_hash_is_checked_before_the_manifest_is_parsed(tiny: Path) -> None:
    (tiny / "manifest.json").write_bytes(b"[" * 1000)
    with pytest.raises(IntegrityError, match="other bytes"):
        Bundle.open(tiny)


@pytest.mark.parametrize("kind", ["file", "folder", "link", "hidden"])
def test_an_unlisted_member_is_refused(tiny: Path, kind: str) -> None:
    extra = tiny / (".hidden" if kind == "hidden" else "extra")
    if kind == "folder":
        extra.mkdir()
    elif kind == "link":
        extra.symlink_to(tiny / "image.onnx")
    else:
        extra.write_bytes(b"")
    with pytest.raises(IntegrityError, match="does not list"):
        Bundle.open(tiny)


@pytest.mark.parametrize("name", MEMBERS)
def test_a_link_is_refused_wherever_it_leads(tiny: Path, tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    (tiny / name).rename(outside)
    (tiny / name).symlink_to(outside)
    with pytest.raises(IntegrityError, match="symbolic link"):
        check_all(tiny)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs pipes")
@pytest.mark.parametrize("name", MEMBERS)
def test_a_pipe_is_refused_without_waiting(tiny: Path, name: str) -> None:
    (tiny / name).unlink()
    os.mkfifo(tiny / name)
    with pytest.raises(IntegrityError, match="not a plain file"):
        check_all(tiny)


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "sub/x", "sub\\\\x", "..", "."])
def test_a_path_leading_out_is_refused(tiny: Path, name: str) -> None:
    reseal(tiny, lambda text: text.replace('"image.onnx": {', f'"{name}": {{'))
    with pytest.raises(ManifestError):
        Bundle.open(tiny)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"schema_version": 1', '"schema_version": 2'),
        ('"variant": "tiny"', '"variant": "tiny", "variant": "tiny"'),
        ('"variant": "tiny"', '"variant": "tiny", "later": 1'),
        ('"relative_error": 0.0', '"relative_error": NaN'),
    ],
)
def test_a_resealed_manifest_is_still_strict(tiny: Path, before: str, after: str) -> None:
    reseal(tiny, lambda text: text.replace(before, after, 1))
    with pytest.raises(ManifestError) as caught:
        Bundle.open(tiny)
    assert caught.value.exit_code == 5


def test_what_was_read_is_what_was_hashed(tiny: Path) -> None:
    bundle = Bundle.open(tiny)
    raw = (tiny / "image.onnx").read_bytes()
    (tiny / "image.onnx").write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
    with pytest.raises(IntegrityError):
        bundle.read("image.onnx")
    with pytest.raises(IntegrityError, match="no member"):
        bundle.read("../image.onnx")


@pytest.mark.parametrize("what", ["nothing", "file", "empty folder"])
def test_no_bundle_is_said_so(tmp_path: Path, what: str) -> None:
    path = tmp_path / "x"
    if what == "file":
        path.write_bytes(b"")
    elif what == "empty folder":
        path.mkdir()
    with pytest.raises(BundleError, match="bundle"):
        Bundle.open(path)


def test_writing_is_repeatable(tmp_path: Path) -> None:
    manifest, members = draft()
    written = write_bundle(tmp_path / "a", manifest=manifest, members=members)
    assert written.sha256 == Bundle.open(TINY).sha256
    written.verify()


def test_members_may_be_files(tmp_path: Path) -> None:
    manifest, members = draft()
    from_files: dict[str, bytes | Path] = {name: TINY / name for name in members}
    written = write_bundle(tmp_path / "a", manifest=manifest, members=from_files)
    assert written.sha256 == Bundle.open(TINY).sha256


def test_only_a_bundle_is_replaced_and_only_on_request(tmp_path: Path, tiny: Path) -> None:
    manifest, members = draft()
    with pytest.raises(OutputError, match="overwritten"):
        write_bundle(tiny, manifest=manifest, members=members)
    changed = replace(manifest, variant="other")
    write_bundle(tiny, manifest=changed, members=members, overwrite=True)
    assert Bundle.open(tiny).manifest.variant == "other"
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]


KINDS = ["file", "empty folder", "a bundle and a folder", "a bundle and a file", "link"]


@pytest.mark.parametrize("kind", KINDS)
def test_anything_else_is_left_alone(tmp_path: Path, tiny: Path, kind: str) -> None:
    target = tmp_path / "target"
    if kind == "file":
        target.write_bytes(b"mine")
    elif kind == "empty folder":
        target.mkdir()
    elif kind == "link":
        target.symlink_to(tiny)
    elif kind == "a bundle and a folder":
        target = tiny
        (tiny / "notes").mkdir()
    else:
        target = tiny
        (tiny / "notes.txt").write_bytes(b"mine")
    manifest, members = draft()
    with pytest.raises(OutputError, match="not a bundle"):
        write_bundle(target, manifest=manifest, members=members, overwrite=True)
    assert kind != "a bundle and a file" or (target / "notes.txt").read_bytes() == b"mine"


def test_an_incomplete_bundle_may_be_replaced(tiny: Path) -> None:
    (tiny / "text.onnx").unlink()
    reseal(tiny, lambda text: text.replace('"schema_version": 1', '"schema_version": 2'))
    manifest, members = draft()
    write_bundle(tiny, manifest=manifest, members=members, overwrite=True)
    check_all(tiny)


def test_a_missing_parent_is_said_so(tmp_path: Path) -> None:
    manifest, members = draft()
    with pytest.raises(OutputError, match="does not exist"):
        write_bundle(tmp_path / "no" / "x", manifest=manifest, members=members)


@pytest.mark.parametrize("call", ["fsync", "rename"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_a_full_disk_leaves_nothing_behind(
    tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch, call: str, overwrite: bool
) -> None:
    before = Bundle.open(tiny).sha256
    target = tiny if overwrite else tmp_path / "new"
    manifest, members = draft()

    def full(*args: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if call == "fsync":
        monkeypatch.setattr(os, "fsync", full)
    else:
        rename = Path.rename

        def refuse(self: Path, to: Path) -> Path:
            return full() if self.suffix == ".partial" else rename(self, to)  # type: ignore[return-value, func-returns-value]

        monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(StorageError, match="disk is full") as caught:
        write_bundle(target, manifest=manifest, members=members, overwrite=overwrite)
    assert caught.value.exit_code == 6
    assert [path.name for path in tmp_path.iterdir()] == ["tiny"]
    assert Bundle.open(tiny).sha256 == before


def test_drafts_are_checked(tmp_path: Path) -> None:
    manifest, members = draft()
    with pytest.raises(ManifestError, match=r"needs 'text\.onnx'"):
        write_bundle(
            tmp_path / "x",
            manifest=manifest,
            members={name: raw for name, raw in members.items() if name != "text.onnx"},
        )
    with pytest.raises(ManifestError, match="already sealed"):
        write_bundle(tmp_path / "x", manifest=Bundle.open(TINY).manifest, members=members)
    with pytest.raises(ManifestError, match="refused"):
        write_bundle(tmp_path / "x", manifest=manifest, members={**members, "../x": b""})


@pytest.mark.parametrize(
    "change", [{"relative_error": float("nan")}, {"flips": 0.5}, {"cases": True}]
)
def test_nothing_is_sealed_that_could_not_be_opened(tmp_path: Path, change: dict[str, Any]) -> None:
    manifest, members = draft()
    spoilt = replace(manifest, parity=replace(manifest.parity, **change))
    with pytest.raises(ManifestError):
        write_bundle(tmp_path / "x", manifest=spoilt, members=members)
    assert not list(tmp_path.iterdir())


def test_the_fixture_is_small_and_json() -> None:
    assert sum(path.stat().st_size for path in TINY.iterdir()) < 20_000
    assert json.loads((TINY / "manifest.json").read_text())["schema_version"] == 1
