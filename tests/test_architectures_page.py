"""The guide to the architectures is what the registry says, and near what is published."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FOUND = json.loads((ROOT / "bench" / "results" / "architectures.json").read_text("utf-8"))

REQUIRED = [
    ("shared_ris", "base", "parameters", "whole network"),
    ("shared_ris", "base", "multiply_adds", "whole network"),
    ("shared_ris", "large", "multiply_adds", "whole network"),
    ("dmmi", "swin", "parameters", "whole network, with what acts in training only"),
    ("dmmi", "swin", "multiply_adds", "whole network, without what acts in training only"),
    ("etris", "r101", "parameters", "Bridger"),
    ("maris", "vit_h", "parameters", "image encoder"),
    ("maris", "vit_h", "multiply_adds", "image encoder"),
    ("haris", "vit_h", "parameters", "image encoder"),
]


def figures(arch: str, variant: str) -> list[dict[str, Any]]:
    (entry,) = (each for each in FOUND["architectures"] if each["name"] == arch)
    (size,) = (each for each in entry["variants"] if each["name"] == variant)
    listed: list[dict[str, Any]] = size["figures"]
    return listed


def test_the_page_and_the_numbers_are_those_of_the_registry() -> None:
    tool = ROOT / "tools" / "architectures.py"
    subprocess.run([sys.executable, str(tool), "--check"], check=True)


@pytest.mark.parametrize(("arch", "variant", "quantity", "part"), REQUIRED)
def test_published_figures_are_met(arch: str, variant: str, quantity: str, part: str) -> None:
    (figure,) = (
        each
        for each in figures(arch, variant)
        if (each["quantity"], each["part"]) == (quantity, part)
    )
    assert abs(figure["difference_percent"]) <= 1.5, figure


def test_every_other_difference_is_explained() -> None:
    for entry in FOUND["architectures"]:
        for size in entry["variants"]:
            for figure in size["figures"]:
                if abs(figure["difference_percent"] or 0) > 1.5:
                    assert figure["note"], (entry["name"], size["name"], figure)
