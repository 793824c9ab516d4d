"""The README's own commands, and its numbers."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rt_ris.cli import main

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def verbs() -> list[str]:
    """The lines that call rt-ris, in the README's order, without their comments."""
    lines = [line.split("#")[0].strip() for block in blocks("") for line in block.splitlines()]
    return [line for line in lines if line.startswith("rt-ris ")]


def test_the_two_commands_come_first_and_exist() -> None:
    first = blocks("")[0]
    assert "make demo" in first
    assert "make check" in first
    makefile = (ROOT / "Makefile").read_text("utf-8")
    assert re.search(r"^demo:", makefile, flags=re.MULTILINE)
    assert re.search(r"^check:", makefile, flags=re.MULTILINE)


def test_the_commands_and_the_snippet_run_as_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((640, 480)).save("table.jpg")
    commands = verbs()
    assert commands[0] == "rt-ris export --arch maris"
    assert any(command.startswith("rt-ris segment") for command in commands)
    for command in commands:
        assert main(shlex.split(command)[1:]) == 0, command
    assert (tmp_path / "maris-lite.bundle" / "manifest.json").is_file()
    assert list((tmp_path / "masks").glob("*overlay.png"))
    (snippet,) = blocks("python")
    subprocess.run([sys.executable, "-c", snippet], cwd=tmp_path, check=True)


def test_the_numbers_are_those_of_the_json() -> None:
    subprocess.run(
        [sys.executable, str(ROOT / "tools" / "readme_numbers.py"), "--check"], check=True
    )


def test_every_linked_page_exists() -> None:
    for page in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / page).is_file(), page
