"""SAM's attentions become one kernel each in TensorRT-RTX's plan, in the form that is exported."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor, nn

from rt_ris.build.engines import build_graph
from rt_ris.spec import StageSpec, TensorSpec
from rt_ris_export import onnx_graph
from rt_ris_export.half import to_half
from rt_ris_export.steps.trace import trace
from rt_ris_train.architecture import Stage, StageModule
from rt_ris_train.backbones import sam
from rt_ris_train.backbones.sam_sizes import SamSize

SIZE = SamSize(width=128, depth=4, heads=2, global_blocks=(0, 1, 2, 3), image_size=256, window=7)


class Encoder(StageModule):
    """The encoder alone, from normalised pictures to its last tap."""

    def __init__(self, size: SamSize) -> None:
        super().__init__()
        self.encoder = sam.SamEncoder(size)
        for value in self.parameters():
            nn.init.normal_(value, std=0.02)

    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        return (self.encoder(values[0])[-1],)


def fused(folder: Path, size: SamSize) -> int:
    cells = size.cells
    spec = StageSpec(
        id="encoder",
        role="image_encoder",
        inputs=(TensorSpec(name="image", dtype="float32", shape=(1, 3, 256, 256)),),
        outputs=(TensorSpec(name="tap", dtype="float32", shape=(1, cells, cells, size.width)),),
    )
    module = Encoder(size).eval().requires_grad_(False)
    model = to_half(trace(Stage(spec=spec, module=module)))
    graph = folder / "encoder.onnx"
    graph.write_bytes(onnx_graph.serialise(model).graph)
    facts = build_graph(graph, folder / "encoder.engine", target="tensorrt-rtx", sm=86)
    return int(facts["fused_attentions"])


def test_all_are_fused_as_exported_and_none_as_the_library_writes_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorrt_rtx_libs")
    assert fused(tmp_path, SIZE) == 4
    monkeypatch.setattr(sam, "_block", lambda block, features: block(features))
    assert fused(tmp_path, SIZE) == 0
