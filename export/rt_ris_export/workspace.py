"""A temporary folder beside the output, gone afterwards whatever happened."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from onnx import ModelProto

from rt_ris.bundle import check_target
from rt_ris.errors import StorageError
from rt_ris_export import onnx_graph


@dataclass(frozen=True)
class Workspace:
    """Where the files of an export in progress live.

    Attributes:
        folder: exists while the export runs; on the same disk as the output.
    """

    folder: Path

    def write(self, name: str, content: bytes) -> Path:
        """Write one file.

        Raises:
            StorageError: it could not be written, such as on a full disk.
        """
        path = self.folder / name
        try:
            with path.open("wb") as stream:
                stream.write(content)
                stream.flush()
        except OSError as error:
            raise storage_error(path, error) from error
        return path

    def write_graph(self, stage: str, model: ModelProto) -> Path:
        """Write a stage's graph; where one file cannot hold it, its weights into a second.

        Raises:
            StorageError: as ``write``.
        """
        written = onnx_graph.serialise(model)
        if written.data:
            self.write(f"{stage}.onnx{onnx_graph.DATA}", written.data)
        return self.write(f"{stage}.onnx", written.graph)


@contextmanager
def workspace(output: Path, *, overwrite: bool) -> Iterator[Workspace]:
    """A workspace for an export to ``output``.

    Refuses early what the final step would refuse late, after minutes of work.

    Raises:
        OutputError: something is there that may not be replaced, or its folder does not exist.
        StorageError: no folder can be made there.
    """
    target = Path(os.path.abspath(output))
    check_target(target, overwrite=overwrite)
    try:
        folder = tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".export", dir=target.parent)
    except OSError as error:
        raise storage_error(target, error) from error
    try:
        yield Workspace(Path(folder))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def storage_error(path: Path, error: OSError) -> StorageError:
    """The sentence for a write that failed."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    cause = "the disk is full" if full else (error.strerror or str(error))
    advice = "Free some space" if full else "Look at the folder's permissions and its disk"
    return StorageError(
        f"{path.name} could not be written in {path.parent.parent}: {cause}. Nothing was left "
        f"behind. {advice}, then export again.",
        path=str(path),
    )
