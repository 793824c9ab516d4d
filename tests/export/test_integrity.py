"""An exported bundle of several stages: flipped bits are refused before they are parsed."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from rt_ris.bundle import Bundle
from rt_ris.predictor import Predictor
from rt_ris_export import ExportRecipe, export_bundle, onnx_graph
from tests.conftest import Watch

from .conftest import Traced

EDGE = 16
"""Bytes at both ends of a file: headers, and the directory of an archive."""
DRAWN = 32


def places(size: int, seed: int) -> list[int]:
    """All bytes of a small file; of a large one its ends and a seeded draw."""
    if size <= 2 * EDGE + DRAWN:
        return list(range(size))
    drawn = random.Random(seed).sample(range(EDGE, size - EDGE), DRAWN)
    return [*range(EDGE), *drawn, *range(size - EDGE, size)]


def test_flipped_bits_of_an_exported_bundle(traced: Traced, watch: Watch, tmp_path: Path) -> None:
    bundle = Path(shutil.copytree(traced.bundle, tmp_path / "bundle"))
    assert len(Bundle.open(bundle).manifest.stages) == 4
    every_file_is_guarded(bundle, watch)


@pytest.mark.usefixtures("one_picture")
def test_flipped_bits_of_what_only_some_bundles_hold(
    traced: Traced, watch: Watch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights beside their graph, as beyond 2 GiB, and the ranges of halves."""
    monkeypatch.setattr(onnx_graph, "MAX_BYTES", 1 << 10)
    monkeypatch.setattr(onnx_graph, "_SET_ASIDE", 1 << 10)
    recipe = ExportRecipe(
        arch="maris", variant="tiny", precision="fp16", out=tmp_path / "half.bundle"
    )
    bundle = export_bundle(recipe, steps=traced.steps())
    assert (bundle / "ranges.json").exists()
    assert (bundle / "decoder.onnx.data").exists()
    every_file_is_guarded(bundle, watch)


def every_file_is_guarded(bundle: Path, watch: Watch) -> None:
    """A bundle opens as it is, and with no bit of it flipped."""
    Predictor.load(bundle, threads=1).close()
    flipped = 0
    for seed, path in enumerate(sorted(bundle.iterdir())):
        flipped += watch.flip(
            path,
            places(path.stat().st_size, seed),
            lambda: Predictor.load(bundle, threads=1),
            unparsed=path.name.startswith("manifest."),
        )
    assert flipped == 64 * len(list(bundle.iterdir()))
