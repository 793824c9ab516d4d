"""Samples whose deviation is explained by a hard decision inside a stage.

Masked mutual attention keeps a pair of pixel and word or drops it. Where a score lies so close to
the threshold that rounding decides, two right implementations differ by far more than rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
from onnx import ModelProto

from rt_ris.backends.base import Runner
from rt_ris.spec import StageSpec
from rt_ris_export import onnx_graph
from rt_ris_export.steps.function import kernel_of

Array = npt.NDArray[Any]
Opener = Callable[[StageSpec, ModelProto], Runner]


def typed(values: Mapping[str, Array], spec: StageSpec) -> dict[str, Array]:
    """What a stage reads, in the types that it declares."""
    return {
        tensor.name: values[tensor.name].astype(tensor.dtype, copy=False) for tensor in spec.inputs
    }


class TieFinder:
    """Looks inside one stage's graph for scores near a decision.

    Args:
        spec: the stage.
        model: its graph.
        opened: opens a graph on the backend that the gate uses.
        band: half width of the tie band, in rms of the scores.
    """

    def __init__(self, *, spec: StageSpec, model: ModelProto, opened: Opener, band: float) -> None:
        self._band = band
        self._spec, self._model, self._opened = spec, model, opened
        self._nodes = [node for node in onnx_graph.own_nodes(model) if kernel_of(node).closeness]
        self._runner: Runner | None = None

    @property
    def decides(self) -> bool:
        """Whether the stage makes hard decisions at all."""
        return bool(self._nodes)

    def tied(self, values: Mapping[str, Array]) -> npt.NDArray[np.bool_]:
        """For each of the N sentences whether a score lies within the tie band.

        Args:
            values: the stage's inputs by name; others are ignored.
        """
        inputs = typed(values, self._spec)
        result = np.zeros(max(len(array) for array in inputs.values()), dtype=np.bool_)
        known = self._inner(inputs) if self._nodes else {}
        for node in self._nodes:
            arrays = [known[name] for name in node.input]
            attributes = onnx_graph.attribute_values(node)
            result |= kernel_of(node).distance_to_ties(arrays, attributes) <= self._band
        return result

    def close(self) -> None:
        """Free what was opened."""
        if self._runner is not None:
            self._runner.close()
            self._runner = None

    def _inner(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Everything that the deciding nodes read, for these inputs of the stage."""
        stored = onnx_graph.initialisers(self._model)
        if self._runner is None:
            there = {*stored, *inputs, *(tensor.name for tensor in self._spec.outputs)}
            read = dict.fromkeys(name for node in self._nodes for name in node.input)
            names = tuple(name for name in read if name not in there)
            model, inner = onnx_graph.expose(self._model, names)
            spec = replace(self._spec, outputs=(*self._spec.outputs, *inner))
            self._runner = self._opened(spec, model)
        return {**stored, **inputs, **self._runner.run(inputs)}
