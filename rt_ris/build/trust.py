"""Reading what an engine's parser may see: an engine is code, so only from the user's own folder.

NVIDIA ("Security Considerations", TensorRT 11.4) calls an engine an executable artefact that its
own checks do not protect. Hashes find damage; that the folder is the user's own, and not everybody
may write into it, is what makes them mean more.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Final

from rt_ris.errors import IntegrityError, OutputError

ROOT: Final = 0
"""The administrator's files are trusted as well: services run what they cannot write."""


def check_folder(folder: Path) -> None:
    """Refuse a folder that somebody else could have filled.

    Raises:
        OutputError: there is no such folder.
        IntegrityError: it is of another user, or everybody may write into it.
    """
    if not folder.is_dir():
        raise OutputError(
            f"There is no folder of engines at '{folder}'; make one with `rt-ris build`, or name "
            "it with --engines."
        )
    _check_owner(folder, folder.stat())


def read_trusted(path: Path, *, limit: int) -> bytes:
    """All bytes of a plain file of the user's own, never following a link.

    Raises:
        IntegrityError: it is missing, no plain file, larger than ``limit``, or somebody else's.
    """
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise _refused(path, f"cannot be read as a plain file ({error.strerror})") from error
    with os.fdopen(descriptor, "rb") as stream:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise _refused(path, "is not a plain file")
        _check_owner(path, found)
        raw = stream.read(limit + 1)
    if len(raw) > limit:
        raise _refused(path, f"has more than {limit} bytes")
    return raw


def _check_owner(path: Path, found: os.stat_result) -> None:
    if not hasattr(os, "geteuid"):  # Windows keeps owners elsewhere
        return
    if found.st_uid not in (os.geteuid(), ROOT):
        raise _refused(path, f"belongs to user {found.st_uid}, not to you")
    if found.st_mode & stat.S_IWOTH:
        raise _refused(path, "may be written by everybody (run: chmod o-w)")


def _refused(path: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"'{path}' {why}. An engine is code that runs on this machine: only files of your own or "
        "of the administrator that not everybody may write are opened. Build the engines here, or "
        "copy them as yourself.",
        member=path.name,
    )
