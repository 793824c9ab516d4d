"""The page on Jetsons: its commands parse, its dependencies have wheels for ARM64."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from rt_ris.cli import VERBS, _parser

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "jetson.md").read_text("utf-8")
LINES = [
    line
    for block in re.findall(r"^```\n(.*?)^```", PAGE, re.M | re.S)
    for line in block.splitlines()
]
INSTALLS = [shlex.split(line) for line in LINES if line.startswith("pip install")]
PLATFORMS = ("manylinux2014", *(f"manylinux_2_{glibc}" for glibc in range(17, 36)))
"""What glibc 2.35 of Ubuntu 22.04 takes; JetPack 7 takes more."""
TRAINING = {"torch", "torchvision", "onnx", "onnxscript", "transformers", "timm", "onnxruntime-gpu"}


def declared() -> list[str]:
    """The base dependencies and those of the extra ``cpu``, as pyproject.toml has them."""
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    lists = [re.search(rf"^{name} = \[(.*?)\]", text, re.M) for name in ("dependencies", "cpu")]
    return [one for found in lists if found for one in re.findall(r'"([^"]+)"', found[1])]


def test_the_commands_are_ones_that_exist() -> None:
    ours = [shlex.split(line)[1:] for line in LINES if line.startswith("rt-ris ")]
    assert [words[0] for words in ours] == ["doctor", "verify", "segment", "build"]
    for words in ours:
        assert words[0] in VERBS
        _parser(words).parse_args(words)


def test_the_page_installs_what_is_declared_and_lists_what_was_chosen() -> None:
    names = [re.split(r"[<>=]", one)[0] for one in declared()]
    assert names == ["numpy", "pillow", "tokenizers", "onnxruntime"]
    chosen = re.findall(r"^\| ([a-z-]+) \| [\d.]+ \| [\d.]+ \|$", PAGE, re.M)
    assert chosen == [*names, "cuda-bindings"]
    assert len(INSTALLS) == 2
    assert all("--only-binary=:all:" in words for words in INSTALLS)
    assert all(words[-2].endswith(".whl[cpu]") for words in INSTALLS)


@pytest.mark.slow  # asks a package index
@pytest.mark.parametrize(("python", "install"), list(zip(("3.10", "3.12"), INSTALLS, strict=True)))
def test_the_lean_runtime_resolves_for_arm64(
    python: str, install: list[str], tmp_path: Path
) -> None:
    report = tmp_path / "report.json"
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "--implementation", "cp"]
    command += ["--target", str(tmp_path / "none"), "--report", str(report)]
    command += ["--python-version", python]
    for platform in PLATFORMS:
        command += ["--platform", f"{platform}_aarch64"]
    done = subprocess.run(
        [*command, *declared(), install[-1]], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    chosen = {
        one["metadata"]["name"].lower().replace("_", "-"): one["download_info"]["url"]
        for one in json.loads(report.read_text("utf-8"))["install"]
    }
    assert {"numpy", "pillow", "tokenizers", "onnxruntime", "cuda-bindings"} <= set(chosen)
    assert not set(chosen) & TRAINING
    for url in chosen.values():
        assert re.search(r"(aarch64|-any)\.whl$", url), url
