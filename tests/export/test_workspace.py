from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from rt_ris.errors import OutputError
from rt_ris_export.workspace import workspace

TINY = Path(__file__).parents[1] / "fixtures" / "tiny"


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


@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_bundle_is_refused_before_any_work(tmp_path: Path, overwrite: bool) -> None:
    (tmp_path / "a.bundle").mkdir()
    with pytest.raises(OutputError, match="exists and is not a bundle"):
        workspace(tmp_path / "a.bundle", overwrite=overwrite).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == ["a.bundle"]


def test_a_bundle_is_replaced_only_on_request(tmp_path: Path) -> None:
    output = Path(shutil.copytree(TINY, tmp_path / "a.bundle"))
    with pytest.raises(OutputError, match="exists; ask for it to be overwritten"):
        workspace(output, overwrite=False).__enter__()
    with workspace(output, overwrite=True):
        pass


def test_a_missing_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="does not exist; create it first"):
        workspace(tmp_path / "no" / "a.bundle", overwrite=False).__enter__()
