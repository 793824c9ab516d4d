"""How many attentions of SAM's image encoder become one kernel each, in TensorRT-RTX's plan.

Builds the encoder of MARIS twice for one compute capability, without a GPU: as segment-anything
writes its blocks, and as they are exported. Writes ``bench/results/fused-attention.json``.

    python tools/fused_attentions.py --variant vit_b --sm 86
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Final
from unittest import mock

from torch import Tensor

from rt_ris.build.engines import build_graph
from rt_ris_export import onnx_graph
from rt_ris_export.half import to_half
from rt_ris_export.steps.trace import trace
from rt_ris_train.architecture import load
from rt_ris_train.backbones import sam

RESULT: Final = Path(__file__).parent.parent / "bench" / "results" / "fused-attention.json"


def counted(variant: str, sm: int, *, block: Callable[..., Tensor]) -> dict[str, object]:
    """What the plan of one form holds."""
    network = load("maris").variant(variant).build().requires_grad_(False)
    with mock.patch.object(sam, "_block", block):
        model = to_half(trace(network.stages()[0]))
    attentions = sum(node.op_type == "Softmax" for node in model.graph.node)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / "encoder.onnx"
        graph.write_bytes(onnx_graph.serialise(model).graph)
        facts = build_graph(graph, Path(folder) / "encoder.engine", target="tensorrt-rtx", sm=sm)
    kept = ("fused_attentions", "layers", "bytes", "seconds", "version")
    return {"attentions": attentions, **{name: facts[name] for name in kept}}


def main() -> None:
    """Build both, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variant", default="vit_b")
    parser.add_argument("--sm", type=int, default=86)
    args = parser.parse_args()
    result = {
        "variant": args.variant,
        "sm": args.sm,
        "precision": "fp16",
        "segment_anything": counted(args.variant, args.sm, block=lambda block, x: block(x)),
        "exported": counted(args.variant, args.sm, block=sam._block),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
