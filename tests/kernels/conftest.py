"""A TensorRT without TensorRT, and the plugin's C++ library compiled without its headers."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rt_ris_kernels.plugin_library import LIBRARY, build_library

ROOT = Path(__file__).parents[2]


@pytest.fixture
def trt() -> Iterator[Any]:
    folder = str(ROOT / "bench" / "gpu")
    sys.path.insert(0, folder)
    import fake_tensorrt

    fake_tensorrt.REGISTRY.creators.clear()
    yield fake_tensorrt
    sys.path.remove(folder)


@pytest.fixture(scope="session")
def plugin_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plugin") / LIBRARY
    build_library(path, headers=ROOT / "tests" / "fakes" / "plugin")
    return path
