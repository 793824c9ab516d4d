"""Masks of maris-lite in PyTorch, float32 and half precision: ``bench/results/half-masks.json``.

All sentences of the composite test split, three times: the checkpoint in PyTorch, the float32
bundle in ONNX Runtime, and the half-precision bundle in the executor that rounds at every node,
which stands for an engine where there is no GPU.

    python tools/half_masks.py --data out/scenes
"""

from __future__ import annotations

import argparse
import json
import tempfile
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import stamp

from rt_ris import Predictor
from rt_ris.bundle import Bundle
from rt_ris.cli import main as rt_ris
from rt_ris.session import Session, open_runners
from rt_ris.spec import StageSpec
from rt_ris.text import Tokenizer
from rt_ris_export import onnx_graph
from rt_ris_export.rounding import RoundingRunner
from rt_ris_train.checkpoint import load_network
from rt_ris_train.data.refcoco import RefDataset
from rt_ris_train.evaluate import Segmenter, evaluate
from rt_ris_train.runner import predictor_of

ROOT: Final = Path(__file__).parent.parent
OUT: Final = ROOT / "bench" / "results" / "half-masks.json"
LIBRARIES: Final = ("numpy", "onnx", "onnxruntime", "pillow", "timm", "tokenizers", "torch")
LIMIT: Final = 0.1
"""Points of overall IoU that an export may differ from PyTorch."""


def main() -> int:
    """Export, measure, write; 1 where an export is beyond the limit."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="composite scenes, split test")
    args = parser.parse_args()
    dataset = RefDataset.open(args.data, split="test")
    with predictor_of(load_network("maris", "lite", None).network) as trained:
        masks = {"pytorch": measured(trained, dataset)}
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("fp32", "fp16"):
            path = Path(folder) / precision
            code = rt_ris(
                ["export", "--arch", "maris", "--precision", precision, "--out", str(path)]
            )
            if code:
                return code
            with opened(path, precision) as predictor:
                masks[precision] = measured(predictor, dataset)
    differences = {
        name: round(abs(masks[name]["oIoU"] - masks["pytorch"]["oIoU"]), 4)
        for name in ("fp32", "fp16")
    }
    result = {
        "what": "maris-lite, the checkpoint in the package",
        "date": date.today().isoformat(),
        "commit": stamp.commit(),
        "versions": {name: version(name) for name in LIBRARIES},
        "data": json.loads((args.data / "synth.json").read_text("utf-8"))["assets"]["sprites"],
        "scope": "unseen scenes and backgrounds, known objects; original size; threshold 0.5; fp16 "
        "in the executor in which every node rounds, no GPU",
        "limit": LIMIT,
        "differences_in_oIoU": differences,
        "masks": masks,
    }
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(differences)
    return int(max(differences.values()) > LIMIT)


def opened(path: Path, precision: str) -> Predictor:
    """A bundle's predictor; one in half precision rounds at every node."""
    if precision == "fp32":
        return Predictor.load(path)
    bundle = Bundle.open(path)
    manifest = bundle.manifest

    def rounding(stage: StageSpec) -> RoundingRunner:
        graph, *data = map(bundle.read, manifest.graph_files(manifest.stage(stage.id)))
        return RoundingRunner(stage, onnx_graph.parse(graph, *data))

    graph = manifest.graph()
    return Predictor(
        session=Session(graph, open_runners(graph.stages, rounding)),
        tokenizer=Tokenizer(bundle.read(manifest.tokenizer), manifest.text),
        image=manifest.image,
        mask=manifest.mask,
    )


def measured(segmenter: Segmenter, dataset: RefDataset) -> dict[str, Any]:
    """The measures on the whole split."""
    return dict(evaluate(segmenter, dataset))


if __name__ == "__main__":
    raise SystemExit(main())
