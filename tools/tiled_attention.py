"""What ONNX Runtime's attention operator saves on a processor, for MARIS at a published size.

Writes the stages as ``--target onnx`` and as ``--target onnxruntime`` would, runs each form in a
process of its own, one thread, in turns, and writes ``bench/results/tiled-attention.json``: ratios
of processor time, peaks of memory, and how far the results are apart.

    python tools/tiled_attention.py --variant vit_b
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final
from unittest import mock

import numpy as np
import stamp
from onnx import ModelProto

from rt_ris.records import to_json
from rt_ris_export import onnx_graph, tiled
from rt_ris_export.steps.function import complete
from rt_ris_export.steps.trace import trace
from rt_ris_export.workspace import Workspace
from rt_ris_train.architecture import Stage
from rt_ris_train.checkpoint import load_network

ROOT: Final = Path(__file__).parent.parent
RESULT: Final = ROOT / "bench" / "results" / "tiled-attention.json"
CHILD: Final = Path(__file__).with_name("run_stages.py")
PACKAGES: Final = ("numpy", "onnx", "onnxruntime", "torch")
FORMS: Final = ("onnx", "onnxruntime", "onnxruntime_without_bands")
PARTS: Final = {"image_encoder": ("image_encoder",), "head": ("fusion", "decoder")}
"""Stages that are measured together."""


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="vit_b")
    parser.add_argument("--rounds", type=int, default=5, help="after one that warms up")
    args = parser.parse_args()
    RESULT.write_text(json.dumps(_measured(args.variant, args.rounds), indent=1) + "\n", "utf-8")
    print(RESULT.read_text("utf-8"))
    return 0


def _measured(variant: str, rounds: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        attentions = _write(folder, variant)
        parts = {part: _part(folder, stages, rounds) for part, stages in PARTS.items()}
    return {
        "what": f"MARIS {variant}, seeded weights, float32, one sentence: --target onnx beside "
        "--target onnxruntime",
        "scope": "ONNX Runtime's CPU provider, one thread; process CPU time of a run, each form in "
        "its own process, in turns after a first run; peak_rss is of the whole process, with the "
        "interpreter, the weights and ONNX Runtime's arena; loaded_rss is before the first run; no "
        "picture is decoded and no mask resized",
        "date": date.today().isoformat(),
        "commit": stamp.commit(),
        "machine": stamp.machine(),
        "versions": {package: version(package) for package in PACKAGES},
        "attentions": attentions,
        "parts": parts,
    }


def _write(folder: Path, variant: str) -> dict[str, dict[str, int]]:
    """All graphs, in a folder for each form; how many operators each stage has."""
    network = load_network("maris", variant, None).network.requires_grad_(False)
    wanted = {stage for stages in PARTS.values() for stage in stages}
    counts: dict[str, dict[str, int]] = {form: {} for form in FORMS}
    for form in FORMS:
        (folder / form).mkdir()
    for stage in network.stages():
        if stage.spec.id in wanted:
            for form, model in _forms(stage).items():
                Workspace(folder / form).write_graph(stage.spec.id, model)
                (folder / form / f"{stage.spec.id}.json").write_bytes(to_json(stage.spec))
                counts[form][stage.spec.id] = onnx_graph.attentions(model)
    return counts


def _forms(stage: Stage) -> dict[str, ModelProto]:
    plain = trace(stage)
    complete(plain)
    with mock.patch.object(tiled, "MOST_SCORES", 1 << 62):
        whole = tiled.tiled(plain)
    return dict(zip(FORMS, (plain, tiled.tiled(plain), whole), strict=True))


def _part(folder: Path, stages: Sequence[str], rounds: int) -> dict[str, object]:
    children = {form: _start([folder / form / f"{name}.json" for name in stages]) for form in FORMS}
    seconds: dict[str, list[float]] = {form: [] for form in FORMS}
    for _ in range(rounds + 1):
        for form, child in children.items():
            seconds[form].append(float(_ask(child, "run")))
    memory = {form: json.loads(_ask(child, str(folder / form))) for form, child in children.items()}
    for child in children.values():
        child.communicate()
    found: dict[str, object] = {"stages": list(stages), "rounds": rounds}
    for form in FORMS:
        found[form] = {
            "cpu_seconds": _spread(seconds[form][1:]),
            "first_cpu_seconds": round(seconds[form][0], 2),
            "cpu_over_onnx": _ratio(seconds[form][1:], seconds["onnx"][1:]),
            **memory[form],
            "relative_error": _error(folder / "onnx.npz", folder / f"{form}.npz"),
        }
    return found


def _start(specs: Sequence[Path]) -> subprocess.Popen[str]:
    command = [sys.executable, str(CHILD), *map(str, specs)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def _ask(child: subprocess.Popen[str], word: str) -> str:
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(f"{word}\n")
    child.stdin.flush()
    return child.stdout.readline()


def _error(truth: Path, found: Path) -> float:
    with np.load(truth) as one, np.load(found) as other:
        pairs: Mapping[str, tuple[Any, Any]] = {name: (one[name], other[name]) for name in one}
        errors = [float(np.linalg.norm(b - a) / np.linalg.norm(a)) for a, b in pairs.values()]
    assert max(errors) <= 1e-5, "the forms do not compute the same"
    return float(f"{max(errors):.1e}")


def _spread(values: Sequence[float]) -> dict[str, float]:
    found = {"median": statistics.median(values), "min": min(values), "max": max(values)}
    return {name: round(value, 3) for name, value in found.items()}


def _ratio(values: Sequence[float], base: Sequence[float]) -> dict[str, float]:
    return _spread([one / other for one, other in zip(values, base, strict=True)])


if __name__ == "__main__":
    sys.exit(main())
