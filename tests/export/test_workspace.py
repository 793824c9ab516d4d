from __future__ import annotations

from pathlib import Path

import pytest

from rt_ris.errors import OutputError
from rt_ris_export.workspace import workspace


def test_it_lives_beside_the_output_and_goes_away(tmp_path: Path) -> None:
    with workspace(tmp_path / "a.bundle", overwrite=False) as work:
        path = work.write("x", b"content")
        assert path.parent.parent == tmp_path
        assert path.read_bytes() == b"content"
    assert not list(tmp_path.iterdir())


def _interrupted(tmp_path: Path) -> None:
    with workspace(tmp_path / "a.bundle", overwrite=False) as work:
        work.write("x", b"content")
        raise KeyboardInterrupt


def test_an_interruption_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        _interrupted(tmp_path)
    assert not list(tmp_path.iterdir())


def test_an_existing_output_is_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "a.bundle").mkdir()
    with pytest.raises(OutputError, match="exists; ask for it to be overwritten"):
        workspace(tmp_path / "a.bundle", overwrite=False).__enter__()
    with workspace(tmp_path / "a.bundle", overwrite=True):
        pass


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist; create it first"):
        workspace(tmp_path / "no" / "a.bundle", overwrite=False).__enter__()
