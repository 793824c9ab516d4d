"""Samples whose deviation is explained by a hard decision inside a stage.

Masked mutual attention keeps a pair of pixel and word or drops it. Where a score lies so close to
the threshold that rounding decides, two right implementations differ by far more than rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from onnx import ModelProto, NodeProto

from rt_ris.backends.base import Runner
from rt_ris.spec import StageSpec
from rt_ris_export import onnx_graph
from rt_ris_export.steps.function import kernel_of

TIE_BAND: Final = 1.0e-5
"""In rms of the scores: a tenth of the gate, some ten times what float32 rounds off."""

Array = npt.NDArray[Any]
Opener = Callable[[StageSpec, bytes], Runner]


@dataclass(frozen=True, kw_only=True)
class TieFinder:
    """Looks inside one stage's graph for scores near a decision.

    Attributes:
        spec: the stage.
        model: its graph.
        opened: opens a graph on the backend that the gate uses.
    """

    spec: StageSpec
    model: ModelProto
    opened: Opener

    def tied(self, values: Mapping[str, Array]) -> npt.NDArray[np.bool_]:
        """For each of the N sentences whether a score lies within the tie band.

        Args:
            values: the stage's inputs by name.
        """
        nodes = [node for node in onnx_graph.custom_nodes(self.model) if kernel_of(node).closeness]
        count = max(len(values[tensor.name]) for tensor in self.spec.inputs)
        result = np.zeros(count, dtype=np.bool_)
        if nodes:
            known = self._inner(nodes, values)
            for node in nodes:
                arrays = [known[name] for name in node.input]
                attributes = onnx_graph.attribute_values(node)
                result |= kernel_of(node).distance_to_ties(arrays, attributes) <= TIE_BAND
        return result

    def _inner(self, nodes: list[NodeProto], values: Mapping[str, Array]) -> dict[str, Array]:
        """The inputs of some nodes, for these inputs of the stage."""
        known = {**onnx_graph.initialisers(self.model), **values}
        made = {tensor.name for tensor in self.spec.outputs}
        wanted = [
            name for node in nodes for name in node.input if name not in (known.keys() | made)
        ]
        model, inner = onnx_graph.expose(self.model, tuple(dict.fromkeys(wanted)))
        spec = replace(self.spec, outputs=(*self.spec.outputs, *inner))
        runner = self.opened(spec, onnx_graph.serialise(model))
        try:
            return {**known, **runner.run(values)}
        finally:
            runner.close()
