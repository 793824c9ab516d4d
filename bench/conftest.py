from __future__ import annotations

from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bundle", type=Path, help="its times [the shipped checkpoint, exported]")
    parser.addoption("--backend", default="auto", help="as of rt-ris segment")
    parser.addoption("--engines", type=Path, help="as of rt-ris segment")


@pytest.fixture(scope="session")
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bundle that is asked for, or the shipped checkpoint, exported as a user would."""
    from rt_ris.cli import main

    asked: Path | None = request.config.getoption("--bundle")
    if asked is not None:
        return asked
    out = tmp_path_factory.mktemp("lite") / "maris-lite.bundle"
    assert main(["export", "--arch", "maris", "--out", str(out)]) == 0
    return out
