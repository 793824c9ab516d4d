"""One traced network for all tests of the export, because tracing takes seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from rt_ris.spec import VALID_BOX
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


def inputs_of(model: ModelProto, *, expressions: int) -> dict[str, Any]:
    """Random inputs of a graph: sentences of different lengths, a picture with a border."""
    random = np.random.default_rng(0)
    made: dict[str, Any] = {}
    for value in model.graph.input:
        kind = value.type.tensor_type
        shape = [dim.dim_value or expressions for dim in kind.shape.dim]
        if kind.elem_type == TensorProto.BOOL:
            made[value.name] = np.arange(shape[1]) < np.arange(2, 2 + shape[0])[:, None]
        elif value.name == VALID_BOX:
            made[value.name] = np.array([[0, 0, 40, 30]], np.int32)
        elif kind.elem_type == TensorProto.FLOAT:
            made[value.name] = random.standard_normal(shape, dtype=np.float32)
        else:
            dtype = helper.tensor_dtype_to_np_dtype(kind.elem_type)
            made[value.name] = random.integers(1, 20, shape).astype(dtype)
    return made


def same_outputs(
    plain: ModelProto, other: ModelProto, *, change: Callable[[dict[str, Any]], None] | None = None
) -> float:
    """The largest relative error of another graph's outputs, with one sentence and with three."""
    worst = 0.0
    for expressions in (1, 3):
        inputs = inputs_of(plain, expressions=expressions)
        if change is not None and expressions > 1:
            change(inputs)
        pairs = zip(_outputs(plain, inputs), _outputs(other, inputs), strict=True)
        for truth, found in pairs:
            assert np.isfinite(truth).all()
            scale = max(float(np.linalg.norm(truth)), np.finfo(np.float32).tiny)
            worst = max(worst, float(np.linalg.norm(found - truth)) / scale)
    return worst


def _outputs(model: ModelProto, inputs: dict[str, Any]) -> list[Any]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    raw = onnx_graph.serialise(model).graph
    session = onnxruntime.InferenceSession(raw, options, providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


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
