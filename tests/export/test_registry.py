"""Every architecture of the registry goes the whole way; so does one that is dropped into it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import rt_ris_train.architectures
from rt_ris.cli import main
from rt_ris_export import onnx_graph
from rt_ris_export.onnx_graph import costs
from rt_ris_export.tiled import tiled
from rt_ris_train import architecture

from .conftest import same_outputs

SIXTH = Path(__file__).parents[1] / "fixtures" / "sixth.py"

SERVE = """
import sys

for name in ("torch", "onnx", "transformers", "rt_ris_train", "rt_ris_export", "rt_ris_kernels"):
    sys.modules[name] = None  # importing it fails

import numpy
from rt_ris import Predictor

picture = numpy.random.default_rng(0).integers(0, 255, (90, 120, 3), dtype=numpy.uint8)
with Predictor.load(sys.argv[1]) as predictor:
    predictor.set_image(picture)
    masks = predictor.segment(["the red box", "a cup on the left"])
    runs = {stage: timing.runs for stage, timing in predictor.stats.stages.items()}
assert [mask.binary.shape for mask in masks] == [(90, 120)] * 2
assert all(numpy.isfinite(mask.logits).all() for mask in masks)
assert not numpy.array_equal(masks[0].logits, masks[1].logits)
"""

CACHED = {
    "maris": ("z_v", "z_l"),
    "haris": ("tensors of three levels", "words and sentence"),
    "etris": ("stem to layer2", "text layers 1 to 4"),
    "dmmi": ("stage 1", "BERT"),
    "shared_ris": ("nothing", "nothing"),
}
"""What depends on the picture only and on the sentence only, in words: empty or not is tested."""


ATTENTIONS = {
    "maris": {"image_encoder": (4, 4), "text_encoder": (2, 2), "decoder": (6, 6)},
    "haris": {
        "image_encoder": (4, 4),
        "text_encoder": (2, 2),
        "fusion": (0, 9),
        "decoder": (2, 2),
    },
    "etris": {"text_front": (1, 1), "fusion": (15, 15), "decoder": (2, 2)},
    "dmmi": {"image_stage1": (1, 1), "text_encoder": (2, 2), "fusion": (3, 28), "decoder": (4, 4)},
    "shared_ris": {"whole": (9, 9)},
}
"""Softmaxes of a stage that ONNX Runtime's operator replaces, and all. What stays: HARIS's fusion
has no heads, DMMI's exchanges average several softmaxes, and a shifted window has two biases."""


def test_the_five_systems_are_there() -> None:
    assert set(CACHED) <= set(architecture.names())


@pytest.fixture(scope="module", params=architecture.names())
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """An architecture, and the bundle of its toy size that went the whole way."""
    bundle = tmp_path_factory.mktemp("registry") / f"{request.param}.bundle"
    goes_the_whole_way(request.param, bundle)
    return request.param, bundle


def test_an_architecture_goes_the_whole_way(
    exported: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    name, bundle = exported
    assert main(["inspect", str(bundle), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for what, cached in zip(("image", "sentence"), CACHED[name], strict=True):
        assert bool(found[f"cached_per_{what}"]["tensors"]) == (cached != "nothing"), what


def test_its_attentions_compute_the_same_in_onnx_runtime_s_operator(
    exported: tuple[str, Path],
) -> None:
    name, bundle = exported
    counts = {}
    for path in sorted(bundle.glob("*.onnx")):
        plain = onnx_graph.load(path)
        rewritten = tiled(plain)
        softmaxes = [sum(n.op_type == "Softmax" for n in m.graph.node) for m in (plain, rewritten)]
        assert softmaxes[0] - softmaxes[1] == onnx_graph.attentions(rewritten)
        assert same_outputs(plain, rewritten) <= 1e-5, path.stem
        spent = [sum(cost.multiply_adds for cost in costs(m)) for m in (plain, rewritten)]
        assert spent[0] == spent[1], path.stem
        if softmaxes[0]:
            counts[path.stem] = (onnx_graph.attentions(rewritten), softmaxes[0])
    assert counts == ATTENTIONS[name]


def goes_the_whole_way(name: str, bundle: Path) -> None:
    """Export through the gate, replay the golden vectors, run without torch."""
    words = ["export", "--arch", name, "--variant", "tiny", "--out", str(bundle)]
    assert main(words) == 0
    record = json.loads((bundle / "parity.json").read_text())
    for stage in record["stages"]:
        for tensor in stage["tensors"]:
            assert tensor["isolated"]["relative"] <= 1e-4, (stage["id"], tensor)
            assert tensor["chained"]["relative"] <= 1e-4, (stage["id"], tensor)
    assert main(["verify", str(bundle)]) == 0
    subprocess.run([sys.executable, "-c", SERVE, str(bundle)], check=True)


def test_a_file_dropped_into_the_registry_is_an_architecture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "registry"
    folder.mkdir()
    shutil.copy(SIXTH, folder / "sixth.py")
    package = rt_ris_train.architectures
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(folder)])
    try:
        assert "sixth" in architecture.names()
        goes_the_whole_way("sixth", tmp_path / "sixth.bundle")
    finally:
        sys.modules.pop("rt_ris_train.architectures.sixth", None)
    monkeypatch.undo()
    assert "sixth" not in architecture.names()
