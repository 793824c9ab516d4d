"""From PyTorch stages to typed ONNX graphs."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from onnx import ModelProto
from torch import Tensor

from rt_ris.errors import PlanError
from rt_ris.spec import EXPRESSIONS, VALID_BOX, StageSpec, TensorSpec
from rt_ris_export import onnx_graph
from rt_ris_export.artefacts import GRAPHS, NETWORK
from rt_ris_export.step import Context, Step
from rt_ris_train.architecture import Stage
from rt_ris_train.counting import TORCH

OPSET: Final = 20
"""The newest that TensorRT 10.3, the one of JetPack 6, reads."""

_EXAMPLE_EXPRESSIONS: Final = 3
"""N of the example: not 1, which an exporter may take for a constant, and unlike any axis."""


def trace(stage: Stage) -> ModelProto:
    """One stage as an ONNX graph whose tensors are exactly those of its declaration.

    Custom operators are still without functions.

    Raises:
        PlanError: the stage cannot be traced.
        ShapeError: the graph's tensors are not those of the stage's declaration.
    """
    spec = stage.spec
    with _quiet():
        try:
            program = torch.onnx.export(
                stage.module,
                tuple(_example(tensor) for tensor in spec.inputs),
                dynamo=True,
                opset_version=OPSET,
                input_names=[tensor.name for tensor in spec.inputs],
                output_names=[tensor.name for tensor in spec.outputs],
                dynamic_shapes=_dynamic_shapes(spec),
                verbose=False,
            )
        except Exception as error:  # the exporter's own kinds are not public
            raise PlanError(
                f"Stage '{spec.id}' cannot be traced to ONNX: {error}".rstrip()
            ) from error
    assert program is not None
    model = program.model_proto
    model.graph.name = spec.id
    onnx_graph.name_by_source(model)
    onnx_graph.strip(model)
    onnx_graph.check_interface(model, spec)
    return model


def _run(context: Context) -> None:
    graphs: dict[str, Path] = {}
    for stage in context.artefacts.get(NETWORK).network.stages():
        context.say(f"tracing {stage.spec.id}")
        model = trace(stage)
        graphs[stage.spec.id] = context.workspace.write_graph(stage.spec.id, model)
    context.artefacts.put(GRAPHS, graphs)


def _example(spec: TensorSpec) -> Tensor:
    """A tensor of a spec's dtype and shape; its values are traced through, not looked at."""
    shape = [_EXAMPLE_EXPRESSIONS if axis == EXPRESSIONS else int(axis) for axis in spec.shape]
    example = torch.ones(shape, dtype=TORCH[spec.dtype])
    if spec.name == VALID_BOX:
        example[:, :2] = 0
    return example


def _dynamic_shapes(spec: StageSpec) -> tuple[Any, ...]:
    """Axis N of every input that has it; stage modules take ``*inputs``, hence the inner tuple."""
    expressions = torch.export.Dim(EXPRESSIONS, min=1)
    return (
        tuple(
            {index: expressions for index, axis in enumerate(tensor.shape) if axis == EXPRESSIONS}
            for tensor in spec.inputs
        ),
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter's notes about itself; what it gets wrong is checked afterwards.

    The logger is onnxscript 0.7's: its constant folding reports shapes that it gives up on.
    """
    folding = logging.getLogger("onnxscript.optimizer")
    before = folding.level
    folding.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        folding.setLevel(before)


TRACE = Step(name="trace", needs=(NETWORK,), makes=(GRAPHS,), run=_run)
