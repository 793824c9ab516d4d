from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def lite_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped checkpoint, exported as a user would."""
    from rt_ris.cli import main

    out = tmp_path_factory.mktemp("lite") / "maris-lite.bundle"
    assert main(["export", "--arch", "maris", "--out", str(out)]) == 0
    return out
