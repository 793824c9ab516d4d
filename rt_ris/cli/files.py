"""Writing one file for a user: whole or not at all."""

from __future__ import annotations

from pathlib import Path

from rt_ris.bundle import replace_file
from rt_ris.errors import StorageError


def write_whole(path: Path, raw: bytes) -> None:
    """Write a file so that it appears whole or not at all; one that is there is replaced.

    Raises:
        StorageError: writing failed; what was there stays.
    """
    try:
        replace_file(path, raw)
    except OSError as error:
        raise StorageError(
            f"{path} could not be written: {error.strerror}. Free some space, then try again.",
            path=str(path),
        ) from error
