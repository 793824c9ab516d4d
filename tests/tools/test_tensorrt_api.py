"""The dumps of TensorRT's API are the real bindings', which are downloaded and read again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from .conftest import load_tool


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    return load_tool("tensorrt_api")


@pytest.mark.parametrize("version", ["10.3.0", "10.16.1.11", "11.4.0.106"])
def test_a_dump_is_the_wheels(tool: ModuleType, version: str, tmp_path: Path) -> None:
    assert version in tool.WHEELS
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    try:
        found = tool.dump_wheel(version, tmp_path)
    except subprocess.CalledProcessError as error:
        if "pip" not in error.cmd:
            raise
        pytest.skip(f"no wheel of {version} for this Python could be downloaded")
    assert found == tool.read(version)


def test_the_dump_of_tensorrt_rtx_is_the_installed_ones(tool: ModuleType) -> None:
    pytest.importorskip("tensorrt_rtx_libs")
    assert tool.dump("tensorrt_rtx", {}) == tool.read(tool.RTX)


def test_every_dump_has_its_wheel(tool: ModuleType) -> None:
    names = {path.name.removesuffix(".json.gz") for path in tool.OUT.iterdir()}
    assert names == {*tool.WHEELS, tool.RTX}
    assert sys.version_info >= (3, 10)
