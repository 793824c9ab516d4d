"""What the built wheel is, seen from an environment that has nothing but it and an engine."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

DISTRIBUTION = importlib.metadata.distribution("rt-ris")
PACKAGES = {"rt_ris", "rt_ris_export", "rt_ris_kernels", "rt_ris_train"}
HEAVY = ("torch", "torchvision", "onnx", "onnxscript", "transformers", "timm")


def installed() -> list[Path]:
    return [Path(str(file)) for file in DISTRIBUTION.files or ()]


pytestmark = pytest.mark.skipif(
    not any(file.parts[0] == "rt_ris" for file in installed()),
    reason="rt-ris is installed from its source folder; `make runtime` runs this on the wheel",
)


def test_the_top_level_names_are_ours() -> None:
    names = {file.parts[0] for file in installed() if file.parts[0] not in ("..", "__pycache__")}
    assert {name for name in names if not name.endswith(".dist-info")} == PACKAGES


def test_what_must_travel_is_inside() -> None:
    names = {file.as_posix() for file in installed()}
    for wanted in (
        "rt_ris/py.typed",
        "rt_ris/manifest.schema.json",
        "rt_ris_train/checkpoints/maris-lite.safetensors",
        "rt_ris_train/recipes/maris-lite.toml",
        "rt_ris_export/gate/gate.json",
        "rt_ris_kernels/binaries/masked_mutual_attention.fatbin",
        "rt_ris_kernels/binaries/masked_mutual_attention.json",
        "rt_ris_kernels/csrc/masked_mutual_attention.cu",
        "rt_ris_kernels/csrc/plugin.cpp",
        "rt_ris_kernels/csrc/plugin_kernels.h",
    ):
        assert wanted in names, wanted


@pytest.mark.parametrize("module", HEAVY)
def test_this_environment_has_no_training_library(module: str) -> None:
    assert importlib.util.find_spec(module) is None


def test_the_package_under_test_is_the_installed_one() -> None:
    import rt_ris

    assert "site-packages" in str(rt_ris.__file__)


@pytest.mark.parametrize("verb", ["export", "train"])
def test_a_verb_without_its_extra_says_what_to_install(verb: str, tmp_path: Path) -> None:
    options = {
        "export": ["--arch", "maris"],
        "train": ["--data", str(tmp_path), "--out", str(tmp_path / "run")],
    }
    done = subprocess.run(
        [sys.executable, "-m", "rt_ris.cli", verb, *options[verb]],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 4, done.stderr
    assert "pip install" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())
