"""An executor in which every node rounds: the judge of half precision on a machine without any.

ONNX Runtime's processor kernels widen halves, compute a chain of nodes in float32 and drop the
casts between them, so that a value beyond 65,504 inside a stage goes unseen (1.31). Here each node
is a session of its own: its operands are halves, it computes in float32 as an engine's kernels
accumulate, and its results are rounded to halves, or become infinite, before anything reads them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import onnxruntime
import torch
from onnx import ModelProto, NodeProto, TensorProto, helper

from rt_ris.backends.base import Array, Runner
from rt_ris.errors import BackendError
from rt_ris.spec import StageSpec
from rt_ris_export import onnx_graph
from rt_ris_export.step import Kind

_HALF, _FULL = TensorProto.FLOAT16, TensorProto.FLOAT
_SEVERAL_THREADS: Final = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "Softmax")


@dataclass(frozen=True, kw_only=True)
class Range:
    """What a tensor's values have been, over all runs.

    Attributes:
        tensor: its name in the graph.
        node: operator that makes it.
        largest: the largest finite |x|.
        infinite: number of infinities.
        nan: number of values that are no number.
    """

    tensor: str
    node: str
    largest: float
    infinite: int
    nan: int


RANGES: Final = Kind[Mapping[str, Sequence[Range]]]("ranges")
"""Of every half tensor, by stage id; empty in float32."""


Memory = dict[bytes, dict[bytes, tuple[Sequence[Array], Mapping[str, Range]]]]
"""By a graph's hash, by that of its inputs: what it made of them, and the ranges of its tensors."""


class RoundingRunner(Runner):
    """One stage, node by node.

    Raises:
        BackendError: a node cannot be opened.
    """

    def __init__(self, spec: StageSpec, model: ModelProto) -> None:
        super().__init__(spec)
        flat = onnx_graph.inferred(model, inline=True)
        self._types = onnx_graph.element_types(flat)
        self._nodes = list(flat.graph.node)
        self._opset = onnx_graph.opset(model)
        self._stored = {
            name: _widened(array) for name, array in onnx_graph.initialisers(flat).items()
        }
        self._sessions: dict[bytes, Any] = {}
        self._last = {name: index for index, node in enumerate(self._nodes) for name in node.input}
        self._ranges: dict[str, Range] = {}

    @property
    def ranges(self) -> tuple[Range, ...]:
        """Of every half tensor so far, in the graph's order."""
        return tuple(self._ranges.values())

    def _run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        names = [tensor.name for tensor in self.spec.inputs]
        known = {name: _widened(array) for name, array in zip(names, inputs, strict=True)}
        wanted = {tensor.name for tensor in self.spec.outputs}
        for index, node in enumerate(self._nodes):
            given = [self._stored[n] if n in self._stored else known[n] for n in node.input if n]
            for name, array in zip(node.output, self._compute(node, given), strict=True):
                known[name] = self._rounded(name, array, node)
            for name in node.input:
                if self._last[name] == index and name not in wanted:
                    known.pop(name, None)
        return [known[tensor.name].astype(tensor.dtype) for tensor in self.spec.outputs]

    def _rounded(self, name: str, array: Array, node: NodeProto) -> Array:
        if self._types[name] != _HALF:
            return array
        wide = torch.from_numpy(array)
        rounded: Array = wide.half().float().numpy()
        largest = float(wide.abs().max()) if wide.numel() else 0.0
        infinite = nan = 0
        if not largest < onnx_graph.LARGEST_HALF:
            finite = np.isfinite(rounded)
            nan = int(np.isnan(rounded).sum())
            infinite = rounded.size - int(finite.sum()) - nan
            largest = float(np.abs(rounded[finite]).max(initial=0.0))
        self._note(
            Range(tensor=name, node=node.op_type, largest=largest, infinite=infinite, nan=nan)
        )
        return rounded

    def _note(self, found: Range) -> None:
        """Add a run's range of a tensor to those before."""
        before = self._ranges.get(found.tensor)
        if before is not None:
            found = replace(
                found,
                largest=max(found.largest, before.largest),
                infinite=found.infinite + before.infinite,
                nan=found.nan + before.nan,
            )
        self._ranges[found.tensor] = found

    def _compute(self, node: NodeProto, given: Sequence[Array]) -> Sequence[Array]:
        if node.op_type == "Cast" and self._types[node.input[0]] in (_HALF, _FULL):
            to = helper.get_node_attr_value(node, "to")
            if to in (_HALF, _FULL):
                return [given[0]]
        session = self._session(node, given)
        feeds = {f"i{index}": np.asarray(array, order="C") for index, array in enumerate(given)}
        try:
            found: Sequence[Array] = session.run(None, feeds)
        except Exception as error:  # the engine's own classes are not public
            raise BackendError(f"Node '{node.name}' ({node.op_type}) failed: {error}") from error
        return found

    def _session(self, node: NodeProto, given: Sequence[Array]) -> Any:  # noqa: ANN401 # no types
        """A session of the node in float32; equal nodes share one."""
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = ""
        places = iter(range(len(given)))
        for index, name in enumerate(node.input):
            copy.input[index] = f"i{next(places)}" if name else ""
        for index, name in enumerate(node.output):
            copy.output[index] = f"o{index}" if name else ""
        for entry in copy.attribute:
            if entry.name == "to" and entry.i == _HALF:
                entry.i = _FULL
        kinds = [helper.np_dtype_to_tensor_dtype(array.dtype) for array in given]
        results = [_full(self._types[name]) for name in node.output if name]
        key = copy.SerializeToString(deterministic=True) + bytes(kinds) + bytes(results)
        if key not in self._sessions:
            self._sessions[key] = _opened(copy, kinds, results, self._opset)
        return self._sessions[key]

    def close(self) -> None:
        """Free all sessions."""
        self._sessions.clear()


class RememberingRunner(RoundingRunner):
    """One stage that looks up what the same graph has made of the same inputs before.

    Where a ladder changes one stage of a network, the others need not run again.

    Args:
        spec: the stage.
        model: its graph.
        memory: of all graphs, by the hash of their bytes; filled here.
    """

    def __init__(self, spec: StageSpec, model: ModelProto, *, memory: Memory) -> None:
        super().__init__(spec, model)
        written = onnx_graph.serialise(model)
        graph = hashlib.sha256(written.graph + written.data).digest()
        self._made = memory.setdefault(graph, {})

    def _run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        seen = hashlib.sha256()
        for array in inputs:
            seen.update(f"{array.dtype} {array.shape}".encode())
            seen.update(np.ascontiguousarray(array).data)
        key = seen.digest()
        if key not in self._made:
            before, self._ranges = self._ranges, {}
            made = super()._run(inputs)
            self._made[key] = (made, self._ranges)
            self._ranges = before
        made, ranges = self._made[key]
        for found in ranges.values():
            self._note(found)
        return [array.copy() for array in made]


def _opened(node: NodeProto, kinds: Sequence[int], results: Sequence[int], opset: int) -> Any:  # noqa: ANN401
    inputs = [
        helper.make_tensor_value_info(f"i{index}", kind, None) for index, kind in enumerate(kinds)
    ]
    names = [name for name in node.output if name]
    outputs = [
        helper.make_tensor_value_info(name, kind, None)
        for name, kind in zip(names, results, strict=True)
    ]
    model = helper.make_model(
        helper.make_graph([node], "node", inputs, outputs),
        opset_imports=[helper.make_opsetid("", opset)],
        ir_version=10,
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 0 if node.op_type in _SEVERAL_THREADS else 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        return onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # the engine's own classes are not public
        raise BackendError(f"ONNX Runtime refused a node of {node.op_type}: {error}") from error


def _full(kind: int) -> int:
    return _FULL if kind == _HALF else kind


def _widened(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype == np.float16 else array
