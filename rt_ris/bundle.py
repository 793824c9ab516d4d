"""A bundle: one flat folder that holds everything a device needs, sealed by hashes.

The manifest's own bytes are checked before they are parsed, every other member's before they are
used, and what is used is what was hashed: a member is read once into memory. This is integrity,
not authenticity: it finds damage and mix-ups, not somebody who rewrites the hashes as well.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final

from rt_ris.errors import BundleError, IntegrityError, ManifestError, OutputError, StorageError
from rt_ris.manifest import (
    MANIFEST,
    MANIFEST_HASH,
    Manifest,
    Member,
    check_member_name,
    parse_manifest,
)
from rt_ris.records import parse_json

MAX_MANIFEST_BYTES: Final = 16 << 20
_CHUNK: Final = 1 << 20


@dataclass(frozen=True)
class Bundle:
    """A bundle on disk whose manifest has been checked; its members are checked when read.

    Attributes:
        path: the folder.
        manifest: the parsed manifest.
        sha256: of the manifest's bytes; identifies the bundle.
    """

    path: Path
    manifest: Manifest
    sha256: str

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Bundle:
        """Check the manifest's hash, parse it, and compare the folder with its list of members.

        The bytes of the other members are checked by ``read`` and ``verify``.

        Raises:
            BundleError: there is no bundle at ``path``.
            IntegrityError: the manifest's bytes, the set of files, their kinds or their sizes
                are not what was sealed.
            ManifestError: the manifest breaks the format or has another version.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise BundleError(
                f"There is no bundle at {folder}; a bundle is a folder with {MANIFEST} in it."
            )
        raw = _read(folder / MANIFEST, limit=MAX_MANIFEST_BYTES)
        digest = hashlib.sha256(raw).hexdigest()
        _check_manifest_hash(folder, digest)
        manifest = parse_manifest(raw)
        _check_files(folder, manifest.members)
        return cls(folder, manifest, digest)

    def read(self, name: str) -> bytes:
        """The bytes of a member, checked.

        Raises:
            IntegrityError: there is no such member, or its bytes are not what was sealed.
        """
        if name not in self.manifest.members:
            known = ", ".join(sorted(self.manifest.members))
            raise IntegrityError(f"The bundle has no member '{name}'; it has {known}.", member=name)
        member = self.manifest.members[name]
        raw = _read(self.path / name, limit=member.bytes)
        _check_seal(name, member, Member(sha256=hashlib.sha256(raw).hexdigest(), bytes=len(raw)))
        return raw

    def verify(self, *, skip: Iterable[str] = ()) -> None:
        """Check the bytes of all members, in constant memory.

        Args:
            skip: members that are left out, because the caller reads them anyway.

        Raises:
            IntegrityError: the first member that is not what was sealed.
        """
        left_out = frozenset(skip)
        for name, member in self.manifest.members.items():
            if name not in left_out:
                with _opened(self.path / name) as stream:
                    _check_seal(name, member, _copy(_chunks(stream), None))


def write_bundle(
    path: str | os.PathLike[str],
    *,
    manifest: Manifest,
    members: Mapping[str, bytes | Path],
    overwrite: bool = False,
) -> Bundle:
    """Seal members into a bundle, atomically: it appears complete or not at all.

    Args:
        path: the new folder; its parent must exist.
        manifest: a draft, that is one without ``members``.
        members: file name -> its bytes, or the file to copy.
        overwrite: replace a bundle that is already there; anything else, also a bundle's folder
            with a further file in it, is never touched.

    Raises:
        ManifestError: a member's name is not allowed, one that the manifest needs is absent, or
            a value of the manifest breaks the format.
        OutputError: ``path`` cannot be used.
        StorageError: writing failed, such as on a full disk; nothing is left behind.
    """
    target = Path(os.path.abspath(path))
    _check_draft(manifest, members)
    check_target(target, overwrite=overwrite)
    try:
        with partial_folder(target) as folder:
            sealed = {name: _store(folder / name, source) for name, source in members.items()}
            raw = replace(manifest, members=sealed).to_json()
            parse_manifest(raw)  # never seal what cannot be opened
            _store(folder / MANIFEST, raw)
            digest = hashlib.sha256(raw).hexdigest()
            _store(folder / MANIFEST_HASH, f"{digest}\n".encode())
            _sync_folder(folder)
            put_in_place(folder, target)
    except OSError as error:
        raise storage_error(target, error) from error
    return Bundle.open(target)


def _check_draft(manifest: Manifest, members: Mapping[str, bytes | Path]) -> None:
    if manifest.members:
        raise ManifestError(
            "The manifest is already sealed; give one without members.", field="members"
        )
    for name in members:
        check_member_name(name)
    for name in manifest.needed():
        if name not in members:
            raise ManifestError(
                f"The manifest needs '{name}', which is not among the members.", field="members"
            )


def check_target(path: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Refuse what ``write_bundle`` would refuse about its path; costs nothing.

    Raises:
        OutputError: the path's parent does not exist; something is there that is not a bundle and
            nothing else; or a bundle is there and ``overwrite`` is false.
    """
    target = Path(os.path.abspath(path))
    if not target.parent.is_dir():
        raise OutputError(f"The folder {target.parent} does not exist; create it first.")
    if not os.path.lexists(target):
        return
    foreign = _foreign(target)
    if foreign is not None:
        raise OutputError(
            f"{target} exists and is not a bundle{foreign}; it is left alone, choose another path."
        )
    if not overwrite:
        raise OutputError(f"{target} exists; ask for it to be overwritten or choose another path.")


def _foreign(path: Path) -> str | None:
    """Why this is not a bundle's folder alone; None for a bundle, even one that lacks members."""
    if path.is_symlink() or not path.is_dir():
        return ""
    entries = {entry.name: entry.is_file(follow_symlinks=False) for entry in os.scandir(path)}
    if not {MANIFEST, MANIFEST_HASH} <= set(entries):
        return ""
    own = {MANIFEST, MANIFEST_HASH, *_listed(path)}
    others = sorted(name for name, plain in entries.items() if not plain or name not in own)
    return f" alone: it holds '{others[0]}', which its manifest does not list" if others else None


def _listed(folder: Path) -> set[str]:
    """Names that a manifest of any version lists; none where it cannot be read."""
    try:
        document = parse_json(_read(folder / MANIFEST, limit=MAX_MANIFEST_BYTES))
    except BundleError:
        return set()
    members = document.get("members") if isinstance(document, dict) else None
    return set(members) if isinstance(members, dict) else set()


@contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A temporary sibling of ``target`` that is gone afterwards unless it was moved."""
    folder = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".partial", dir=target.parent))
    try:
        folder.chmod(0o755)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def put_in_place(folder: Path, target: Path) -> None:
    """Move a finished folder to its place; an old one there survives a failure."""
    old = folder.with_suffix(".old")
    if os.path.lexists(target):
        target.rename(old)
    try:
        folder.rename(target)
    except BaseException:  # an interrupt as well
        if old.exists():
            old.rename(target)
        raise
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _store(path: Path, source: bytes | Path) -> Member:
    """Write or copy one file, flush it to the disk, and return its seal."""
    with path.open("xb") as stream:
        if isinstance(source, bytes):
            seal = _copy([source], stream)
        else:
            with source.open("rb") as opened:
                seal = _copy(_chunks(opened), stream)
        stream.flush()
        os.fsync(stream.fileno())
    return seal


def _copy(chunks: Iterable[bytes], stream: BinaryIO | None) -> Member:
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        digest.update(chunk)
        size += len(chunk)
        if stream is not None:
            stream.write(chunk)
    return Member(sha256=digest.hexdigest(), bytes=size)


def _chunks(stream: BinaryIO) -> Iterator[bytes]:
    while chunk := stream.read(_CHUNK):
        yield chunk


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot open a folder for flushing
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def replace_file(path: Path, raw: bytes) -> None:
    """Write a file that appears whole or not at all; one that is there is replaced.

    Raises:
        OSError: writing failed; what was there stays.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(raw)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def storage_error(target: Path, error: OSError, *, what: str = "bundle") -> StorageError:
    """The error of an artefact that could not be written."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    cause = "the disk is full" if full else (error.strerror or str(error))
    advice = "Free some space" if full else "Look at the folder's permissions and its disk"
    return StorageError(
        f"The {what} {target} could not be written: {cause}. Nothing was left behind. {advice}, "
        "then try again.",
        path=str(target),
    )


def _check_manifest_hash(folder: Path, digest: str) -> None:
    stored = _read(folder / MANIFEST_HASH, limit=128)
    if stored != f"{digest}\n".encode():
        raise IntegrityError(
            f"{MANIFEST} in {folder} has other bytes than {MANIFEST_HASH} says: it was changed or "
            "damaged after it was sealed. Copy or export the bundle again.",
            member=MANIFEST,
            expected=stored[:64].decode("ascii", "replace"),
            found=digest,
        )


def _check_files(folder: Path, members: Mapping[str, Member]) -> None:
    """Compare names, kinds and sizes of the files with the manifest."""
    found = {entry.name: entry.stat(follow_symlinks=False) for entry in os.scandir(folder)}
    unlisted = sorted(set(found) - set(members) - {MANIFEST, MANIFEST_HASH})
    if unlisted:
        raise IntegrityError(
            f"The bundle {folder} holds '{unlisted[0]}', which its manifest does not list. Remove "
            "it, or copy the bundle again.",
            member=unlisted[0],
        )
    for name, member in members.items():
        if name not in found:
            raise IntegrityError(
                f"The bundle {folder} lacks '{name}', which its manifest lists. Copy the bundle "
                "again.",
                member=name,
            )
        _check_kind(name, found[name].st_mode)
        _check_size(name, member, found[name].st_size)


def _check_kind(name: str, mode: int) -> None:
    if not stat.S_ISREG(mode):
        kind = "a symbolic link" if stat.S_ISLNK(mode) else "not a plain file"
        raise IntegrityError(
            f"Member '{name}' is {kind}; a bundle holds plain files only. Copy the bundle again, "
            "following links.",
            member=name,
        )


def _check_size(name: str, member: Member, size: int) -> None:
    if size != member.bytes:
        raise IntegrityError(
            f"Member '{name}' has {size} bytes; the manifest says {member.bytes}. The copy is "
            "incomplete or damaged; copy the bundle again.",
            member=name,
            expected=str(member.bytes),
            found=str(size),
        )


def _check_seal(name: str, member: Member, found: Member) -> None:
    _check_size(name, member, found.bytes)
    if found.sha256 != member.sha256:
        raise IntegrityError(
            f"Member '{name}' has SHA-256 {found.sha256[:16]}...; the manifest says "
            f"{member.sha256[:16]}.... Its bytes changed after it was sealed; copy or export the "
            "bundle again.",
            member=name,
            expected=member.sha256,
            found=found.sha256,
        )


def _read(path: Path, *, limit: int) -> bytes:
    """All bytes of a plain file, never following a link; more than ``limit`` is refused."""
    with _opened(path) as stream:
        raw = stream.read(limit + 1)
    if len(raw) > limit:
        raise IntegrityError(
            f"Member '{path.name}' is larger than {limit} bytes; copy the bundle again.",
            member=path.name,
            expected=str(limit),
        )
    return raw


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    names = ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK")  # no link to follow, no pipe to wait for
    flags = os.O_RDONLY | sum(getattr(os, name, 0) for name in names)
    try:
        _check_kind(path.name, os.lstat(path).st_mode)
        descriptor = os.open(path, flags)
    except OSError as error:
        raise IntegrityError(
            f"The bundle {path.parent} lacks a readable '{path.name}': {error.strerror}. Is it a "
            "complete bundle? Copy it again.",
            member=path.name,
        ) from error
    with os.fdopen(descriptor, "rb") as stream:
        _check_kind(path.name, os.fstat(descriptor).st_mode)
        yield stream
