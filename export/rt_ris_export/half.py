"""A float32 graph as a strongly typed one in half precision, and what of it is half.

The policy: everything is float16 but

- what reads a picture before its first convolution or product (values of 0..255 are normalised);
- reductions, powers and what else of ``FULL`` has a range or a rounding that half precision lacks;
  LayerNormalization and Softmax take and give halves and compute in float32 inside, which their
  definitions say (``stash_type``) and engines do;
- the network's final outputs, and inputs of an operator that ONNX types as float32.

A runtime that reads types, as TensorRT does with strongly typed networks, adds nothing and removes
nothing: what is written here is what runs.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from rt_ris.errors import PlanError
from rt_ris.spec import EXISTENCE, LOGITS, PIXELS, StageSpec, TensorSpec
from rt_ris_export import onnx_graph
from rt_ris_export.onnx_graph import LARGEST_HALF

FULL: Final = frozenset(
    {
        "ReduceMean", "ReduceSum", "ReduceL1", "ReduceL2", "ReduceSumSquare", "ReduceLogSumExp",
        "ReduceProd", "CumSum", "Pow", "Exp", "Log", "Sqrt", "Reciprocal", "InstanceNormalization",
        "GroupNormalization",
    }
)  # fmt: skip
"""Operators that are computed in float32 and whose operands are float32."""

WIDE: Final = frozenset({"LayerNormalization", "Softmax", "BatchNormalization", "Sigmoid", "Div"})
"""What is computed in float32 as well where half precision alone misses the gate."""

KEPT: Final = frozenset({LOGITS, EXISTENCE})
"""What a network gives in the end stays float32."""

PRODUCTS: Final = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum")
FIXED: Final[Mapping[str, tuple[int, ...]]] = {"Resize": (1, 2)}
"""Inputs that ONNX types as float32 whatever the others are, by operator."""

_HALF, _FULL = TensorProto.FLOAT16, TensorProto.FLOAT
HALF_SUFFIX: Final = ".half"
"""What a stored value's name gets behind it where it is stored in half precision as well."""

_SUFFIXES: Final[Mapping[int, str]] = {_HALF: HALF_SUFFIX, _FULL: ".full"}


@dataclass(frozen=True, kw_only=True)
class HalfShare:
    """How much of a graph, or of several, is in half precision.

    Attributes:
        stored: number of stored floating-point values.
        stored_half: of them in half precision.
        spent: multiply-adds of one run, attention and function bodies counted.
        spent_half: of them in half precision.
        full: names of the nodes with multiply-adds in float32, with those, the most costly first.
    """

    stored: int = 0
    stored_half: int = 0
    spent: int = 0
    spent_half: int = 0
    full: tuple[tuple[int, str], ...] = ()

    @property
    def weights(self) -> float:
        """Share of the stored values, 0..1."""
        return self.stored_half / self.stored if self.stored else 1.0

    @property
    def multiply_adds(self) -> float:
        """Share of the multiply-adds, 0..1."""
        return self.spent_half / self.spent if self.spent else 1.0

    def __add__(self, other: HalfShare) -> HalfShare:
        """Of both together."""
        return HalfShare(
            stored=self.stored + other.stored,
            stored_half=self.stored_half + other.stored_half,
            spent=self.spent + other.spent,
            spent_half=self.spent_half + other.spent_half,
            full=tuple(sorted(self.full + other.full, reverse=True)),
        )


def half_spec(spec: StageSpec, *, kept: Collection[str] = KEPT) -> StageSpec:
    """A stage whose float tensors between stages are float16, but for those that are kept."""

    def typed(tensor: TensorSpec) -> TensorSpec:
        keeps = tensor.dtype != "float32" or tensor.name in kept
        return tensor if keeps else replace(tensor, dtype="float16")

    return replace(
        spec,
        inputs=tuple(map(typed, spec.inputs)),
        outputs=tuple(map(typed, spec.outputs)),
    )


def to_half(
    model: ModelProto,
    *,
    also_full: frozenset[str] | None = frozenset(),
    kept: Collection[str] = KEPT,
) -> ModelProto:
    """A copy in half precision.

    Args:
        model: a float32 graph.
        also_full: operators that are computed in float32 as well; None for all of them, so that
            only the graph's inputs and outputs are halves.
        kept: inputs and outputs that stay float32.

    Raises:
        PlanError: a graph inside a node, which the policy does not cover, moments that are not in
            float32, or a type that cannot be inferred.
    """
    return _Converter(model, also_full, kept).converted()


class _Converter:
    """One conversion: each float tensor gets a type, and casts stand where two types meet."""

    def __init__(
        self, model: ModelProto, also_full: frozenset[str] | None, kept: Collection[str]
    ) -> None:
        self.also_full, self.kept = also_full, kept
        self.model = onnx_graph.inferred(model)
        self.graph = self.model.graph
        self.floats = {name for name, kind in _types(self.model).items() if kind == _FULL}
        self.before_products = _before_products(self.graph.node)
        self.stored = {entry.name: entry for entry in self.graph.initializer}
        self.types: dict[str, int] = {}
        self.cast: set[str] = set()
        self.nodes: list[NodeProto] = []

    def converted(self) -> ModelProto:
        """The whole of it."""
        for value in self.graph.input:
            if value.name in self.floats:
                kind = _FULL if value.name in self.kept else _HALF
                value.type.tensor_type.elem_type = self.types[value.name] = kind
        for name in self.stored:
            if name in self.floats:
                self.types[name] = _FULL  # narrowed below, where a half reads it
        for node in self.graph.node:
            self._convert(node)
        for value in self.graph.output:
            if value.name in self.floats:
                kind = _FULL if value.name in self.kept else _HALF
                self._deliver(value.name, kind)
                value.type.tensor_type.elem_type = kind
        del self.graph.node[:]
        self.graph.node.extend(self.nodes)
        self._drop_unread()
        del self.graph.value_info[:]
        return self.model

    def _convert(self, node: NodeProto) -> None:
        if any(entry.HasField("g") or entry.graphs for entry in node.attribute):
            raise PlanError(f"Node '{node.name}' ({node.op_type}) holds a graph; not in fp16.")
        if any(entry.name == "stash_type" and entry.i != _FULL for entry in node.attribute):
            raise PlanError(f"Node '{node.name}' ({node.op_type}) takes its moments in halves.")
        full = (
            self.also_full is None
            or node.op_type in FULL | self.also_full
            or node.name in self.before_products
        )
        kind = _FULL if full else _HALF
        if node.op_type in ("Cast", "Constant", "ConstantOfShape"):
            made = self._converted_source(node, kind)
        else:
            fixed = FIXED.get(node.op_type, ())
            for index, name in enumerate(node.input):
                if name in self.floats:
                    wanted = _FULL if index in fixed else kind
                    node.input[index] = self._as(name, wanted)
            made = kind
        self.types |= dict.fromkeys(self.floats.intersection(node.output), made)
        self.nodes.append(node)

    def _converted_source(self, node: NodeProto, kind: int) -> int:
        """The type that a node which makes values of nothing, or of other types, gives."""
        if node.op_type == "ConstantOfShape" and not node.attribute:
            return _FULL  # zeros of float32 are what it makes unless told otherwise
        for entry in node.attribute:
            if node.op_type == "Cast" and entry.name == "to" and entry.i == _FULL:
                entry.i = kind
            elif entry.name == "value" and entry.t.data_type == _FULL:
                entry.t.CopyFrom(_narrowed(entry.t) if kind == _HALF else entry.t)
            elif entry.name in ("value_float", "value_floats"):
                return _FULL
        return kind

    def _as(self, name: str, kind: int) -> str:
        """The name under which a tensor has a type, through a cast where it has another."""
        if self.types[name] == kind:
            return name
        target = f"{name}{_SUFFIXES[kind]}"
        if target not in self.cast:
            self.cast.add(target)
            if name in self.stored:
                narrow = _narrowed(self.stored[name])
                narrow.name = target
                self.graph.initializer.append(narrow)
            else:
                self.nodes.append(self._cast(name, target, kind))
        return target

    def _cast(self, source: str, target: str, kind: int) -> NodeProto:
        return helper.make_node("Cast", [source], [target], name=f"{target}.cast", to=kind)

    def _deliver(self, name: str, kind: int) -> None:
        """Give an output its declared type, where it was computed in another."""
        if self.types[name] == kind:
            return
        inner = f"{name}{_SUFFIXES[self.types[name]]}"
        for node in self.nodes:
            for names in (node.output, node.input):
                for index in (index for index, other in enumerate(names) if other == name):
                    names[index] = inner
        self.nodes.append(self._cast(inner, name, kind))

    def _drop_unread(self) -> None:
        read = {name for node in self.nodes for name in node.input}
        kept = [entry for entry in self.graph.initializer if entry.name in read]
        del self.graph.initializer[:]
        self.graph.initializer.extend(kept)


def half_share(model: ModelProto) -> HalfShare:
    """Count what of a graph is in half precision.

    Raises:
        PlanError: the shape of a counted tensor cannot be inferred.
    """
    half = (entry for entry in model.graph.initializer if entry.data_type == _HALF)
    costs = onnx_graph.costs(model)
    full = [
        (cost.multiply_adds, f"{cost.node} ({cost.op_type})") for cost in costs if not cost.half
    ]
    return HalfShare(
        stored=onnx_graph.parameters(model),
        stored_half=sum(math.prod(entry.dims) for entry in half),
        spent=sum(cost.multiply_adds for cost in costs),
        spent_half=sum(cost.multiply_adds for cost in costs if cost.half),
        full=tuple(sorted(full, reverse=True)),
    )


def _narrowed(tensor: TensorProto) -> TensorProto:
    """A stored tensor as halves; what is beyond their range becomes their largest."""
    values = numpy_helper.to_array(tensor)
    narrow = np.where(np.isfinite(values), np.clip(values, -LARGEST_HALF, LARGEST_HALF), values)
    return numpy_helper.from_array(narrow.astype(np.float16), tensor.name)


def _types(model: ModelProto) -> dict[str, int]:
    graph, types = model.graph, onnx_graph.element_types(model)
    missing = [name for node in graph.node for name in node.output if name and name not in types]
    if missing:
        raise PlanError(f"The type of '{missing[0]}' in '{graph.name}' cannot be inferred.")
    return types


def _before_products(nodes: Iterable[NodeProto]) -> frozenset[str]:
    """Nodes that read a picture directly, up to the first products."""
    found: set[str] = set()
    tainted = {PIXELS}
    for node in nodes:
        if node.op_type not in PRODUCTS and tainted & set(node.input):
            found.add(node.name)
            tainted |= set(node.output)
    return frozenset(found)
