"""One traced network for all tests of the export, because tracing takes seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from onnx import numpy_helper

from rt_ris_export import onnx_graph
from rt_ris_export.artefacts import GRAPHS, NETWORK, WEIGHTS
from rt_ris_export.export import export_bundle
from rt_ris_export.gate_data import shipped_samples
from rt_ris_export.recipe import ExportRecipe
from rt_ris_export.step import Context, Step
from rt_ris_export.steps import STEPS
from rt_ris_train.architecture import ReferringNetwork
from rt_ris_train.checkpoint import LoadedNetwork


@dataclass(frozen=True)
class Traced:
    """MARIS tiny, its complete graphs by stage id, and the bundle made of them."""

    loaded: LoadedNetwork
    graphs: Mapping[str, bytes]
    bundle: Path

    @property
    def network(self) -> ReferringNetwork:
        """The network itself."""
        return self.loaded.network

    def steps(self, **changed: bytes) -> tuple[Step, ...]:
        """The table of steps with the stored graphs in place of tracing, some of them changed."""

        def stored(context: Context) -> None:
            graphs = {**self.graphs, **changed}
            context.artefacts.put(
                GRAPHS,
                {
                    name: context.workspace.write(f"{name}.onnx", raw)
                    for name, raw in graphs.items()
                },
            )

        def loaded(context: Context) -> None:
            context.artefacts.put(NETWORK, self.loaded)
            context.artefacts.put(WEIGHTS, ())

        load = Step(name="load", makes=(NETWORK, WEIGHTS), run=loaded)
        trace = Step(name="trace", needs=(NETWORK,), makes=(GRAPHS,), run=stored)
        instead = {step.name: step for step in (load, trace)}
        return tuple(instead.get(step.name, step) for step in STEPS)

    def perturbed(self, stage: str, *, factor: float = 1.01) -> bytes:
        """A stage's graph with the weights of its last matrix product off by a factor."""
        model = onnx_graph.parse(self.graphs[stage])
        stored = {entry.name: entry for entry in model.graph.initializer}
        products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm")]
        weight = next(stored[node.input[1]] for node in products[::-1] if node.input[1] in stored)
        changed = numpy_helper.to_array(weight) * np.float32(factor)
        weight.CopyFrom(numpy_helper.from_array(changed, weight.name))
        return onnx_graph.serialise(model).graph


@pytest.fixture(scope="session")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Traced:
    kept: list[LoadedNetwork] = []

    def keep(context: Context) -> None:
        kept.append(context.artefacts.get(NETWORK))

    spy = Step(name="spy", needs=(NETWORK,), run=keep)
    out = tmp_path_factory.mktemp("traced") / "tiny.bundle"
    bundle = export_bundle(ExportRecipe(arch="maris", variant="tiny", out=out), steps=(*STEPS, spy))
    names = [stage.spec.id for stage in kept[0].network.stages()]
    graphs = {name: (bundle / f"{name}.onnx").read_bytes() for name in names}
    return Traced(kept[0], graphs, bundle)


@pytest.fixture
def one_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """A gate of one picture, for tests of what happens around the gate."""
    first = shipped_samples()[:1]
    monkeypatch.setattr("rt_ris_export.steps.parity.shipped_samples", lambda: first)
