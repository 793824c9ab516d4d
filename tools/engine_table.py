"""TensorRT-RTX engines of the published sizes, built without a GPU: time, size, fused attentions.

Weights are seeded random ones, so the table is about graphs and builders and not about masks; no
engine is run. Writes ``bench/results/engines.json``, one network at a time, and goes on from there.

    python tools/engine_table.py --sm 75,80,86,89,120
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rt_ris.build.engines import build_graph
from rt_ris.errors import BuildError
from rt_ris_export.half import half_share, to_half
from rt_ris_export.steps.function import complete
from rt_ris_export.steps.trace import trace
from rt_ris_export.workspace import Workspace
from rt_ris_train.architecture import load

RESULT: Final = Path(__file__).parent.parent / "bench" / "results" / "engines.json"
SIZES: Final = (
    ("maris", "vit_b"),
    ("haris", "vit_b"),
    ("etris", "r101"),
    ("etris", "v16"),
    ("dmmi", "swin"),
    ("shared_ris", "base"),
)


def rows(arch: str, variant: str, sms: Sequence[int]) -> list[dict[str, object]]:
    """One row for each stage and compute capability."""
    network = load(arch).variant(variant).build().requires_grad_(False)
    found: list[dict[str, object]] = []
    for stage in network.stages():
        began = time.monotonic()
        model = trace(stage)
        complete(model)
        half = to_half(model)
        share = half_share(half)
        traced = round(time.monotonic() - began, 1)
        with tempfile.TemporaryDirectory() as folder:
            graph = Workspace(Path(folder)).write_graph(stage.spec.id, half)
            for sm in sms:
                row: dict[str, object] = {
                    "stage": stage.spec.id,
                    "sm": sm,
                    "trace_seconds": traced,
                    "half_multiply_adds": round(share.multiply_adds, 4),
                }
                try:
                    facts = build_graph(
                        graph, Path(folder) / "engine", target="tensorrt-rtx", sm=sm
                    )
                    kept = ("seconds", "peak_mib", "bytes", "layers", "fused_attentions", "version")
                    row |= {name: facts[name] for name in kept}
                except BuildError as error:
                    row["refused"] = str(error)
                found.append(row)
                print(arch, variant, row, flush=True)
    return found


def main() -> None:
    """Build what is not in the result yet, or is there without its memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sm", default="75,80,86,89,120")
    sms = [int(part) for part in parser.parse_args().sm.split(",")]
    done = json.loads(RESULT.read_text("utf-8")) if RESULT.exists() else {}
    for arch, variant in SIZES:
        name = f"{arch} {variant}"
        kept = [row for row in done.get(name, []) if "peak_mib" in row or row["sm"] not in sms]
        todo = sorted(set(sms) - {row["sm"] for row in kept})
        if todo:
            done[name] = kept + rows(arch, variant, todo)
            RESULT.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
