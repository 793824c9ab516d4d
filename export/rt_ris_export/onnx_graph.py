"""Everything that looks inside an ONNX graph: its tensors, its operators, its cost."""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt
import onnx
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    inliner,
    shape_inference,
)

from rt_ris.errors import PlanError, ShapeError
from rt_ris.spec import EXPRESSIONS, DType, StageSpec, TensorSpec
from rt_ris_export.attention_operator import DOMAIN, OPERATOR

MAX_BYTES: Final = (1 << 31) - (64 << 20)
"""Of stored tensors in one file: protocol buffers end at 2 GiB; beyond, there is a second file."""

DATA: Final = ".data"
"""What the second file has behind the name of the first."""

_SET_ASIDE: Final = 1 << 16
"""Bytes of a stored tensor above which nothing infers a shape from its values."""

_ALIGNMENT: Final = 64

_DTYPES: Final[Mapping[int, DType]] = {
    TensorProto.FLOAT: "float32",
    TensorProto.FLOAT16: "float16",
    TensorProto.UINT8: "uint8",
    TensorProto.INT32: "int32",
    TensorProto.INT64: "int64",
    TensorProto.BOOL: "bool",
}
_FLOATS: Final = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.BFLOAT16,
    TensorProto.DOUBLE,
)
_STANDARD: Final = ("", "ai.onnx")
LARGEST_HALF: Final = 65504.0

_SCOPE: Final = re.compile(r"'([^']*)'")
_FRAME: Final = re.compile(r'File "(?:[^"]*/(?:site-packages|train)/|[^"]*/)([^"]+)", line (\d+)')
"""Path within its package, or the file's name alone, and the line."""

Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Serialised:
    """A model's file or files.

    Attributes:
        graph: the ONNX file.
        data: the file ``<graph's name>.onnx.data`` with its large tensors; empty where the first
            holds everything.
    """

    graph: bytes
    data: bytes = b""


def parse(graph: bytes, data: bytes = b"") -> ModelProto:
    """A model from the bytes of its files, with everything in memory."""
    model = onnx.load_model_from_string(graph)
    for entry in model.graph.initializer:
        if entry.data_location == TensorProto.EXTERNAL:
            place = {field.key: field.value for field in entry.external_data}
            start = int(place["offset"])
            entry.raw_data = data[start : start + int(place["length"])]
            entry.ClearField("external_data")
            entry.ClearField("data_location")
    return model


def serialise(model: ModelProto) -> Serialised:
    """The bytes of a model's file, or of two where one cannot hold it."""
    if sum(len(entry.raw_data) for entry in model.graph.initializer) <= MAX_BYTES:
        return Serialised(model.SerializeToString(deterministic=True))
    chunks: list[bytes] = []
    with _weights_aside(model) as aside:
        outside = [entry for entry in model.graph.initializer if entry.name in aside]
        offset = 0
        for entry in outside:
            content = aside[entry.name]
            _point(entry, f"{model.graph.name}.onnx{DATA}", offset, len(content))
            chunks += [content, bytes(-len(content) % _ALIGNMENT)]
            offset += len(content) + len(chunks[-1])
        graph = model.SerializeToString(deterministic=True)
        for entry in outside:
            entry.ClearField("external_data")
            entry.ClearField("data_location")
    return Serialised(graph, b"".join(chunks))


def _point(entry: TensorProto, file: str, offset: int, length: int) -> None:
    """Say where a tensor's bytes are."""
    entry.data_location = TensorProto.EXTERNAL
    for key, value in (("location", file), ("offset", offset), ("length", length)):
        entry.external_data.add(key=key, value=str(value))


def load(path: Path) -> ModelProto:
    """A model from its file, and from the one beside it where there is one."""
    data = path.with_name(path.name + DATA)
    return parse(path.read_bytes(), data.read_bytes() if data.exists() else b"")


@contextmanager
def _weights_aside(model: ModelProto) -> Iterator[Mapping[str, bytes]]:
    """A model without the bytes of its large tensors, which come back afterwards.

    ONNX's own tools pass whole models through protocol buffers, and so end at 2 GiB.
    """
    large = [entry for entry in model.graph.initializer if len(entry.raw_data) > _SET_ASIDE]
    aside = {entry.name: entry.raw_data for entry in large}
    for entry in large:
        entry.ClearField("raw_data")
    try:
        yield aside
    finally:
        _put_back(model, aside)


def _put_back(model: ModelProto, aside: Mapping[str, bytes]) -> None:
    for entry in model.graph.initializer:
        if entry.name in aside:
            entry.raw_data = aside[entry.name]


def inferred(model: ModelProto, *, inline: bool = False) -> ModelProto:
    """A copy in which every tensor's type and shape is stated.

    Args:
        model: a graph whose custom operators have functions.
        inline: put the functions' nodes in place of their operators.
    """
    with _weights_aside(model) as aside:
        flat = inliner.inline_local_functions(model) if inline else model
        found = shape_inference.infer_shapes(flat, strict_mode=True, data_prop=True)
    _put_back(found, aside)
    return found


def check_interface(model: ModelProto, spec: StageSpec) -> None:
    """Compare a graph's inputs and outputs with a stage's declaration.

    Raises:
        ShapeError: a name, order, dtype or shape differs.
    """
    for side, values, wanted in (
        ("inputs", model.graph.input, spec.inputs),
        ("outputs", model.graph.output, spec.outputs),
    ):
        found = tuple(_tensor_spec(value) for value in values)
        if found != wanted:
            raise ShapeError(
                f"Stage '{spec.id}' was traced with {side} {_listed(found)}; its architecture "
                f"declares {_listed(wanted)}. Make the module and its StageSpec agree."
            )


def _listed(specs: Iterable[TensorSpec]) -> str:
    return "; ".join(str(spec) for spec in specs) or "none"


def _tensor_spec(value: ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    if tensor.elem_type not in _DTYPES:
        kind = TensorProto.DataType.Name(tensor.elem_type)
        raise ShapeError(f"'{value.name}' is {kind}; accepted are {', '.join(_DTYPES.values())}.")
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorSpec(name=value.name, dtype=_DTYPES[tensor.elem_type], shape=shape)


def opset(model: ModelProto) -> int:
    """Version of the standard operators."""
    return int(next(entry.version for entry in model.opset_import if entry.domain in _STANDARD))


def custom_nodes(model: ModelProto) -> tuple[NodeProto, ...]:
    """The nodes of other than standard domains, in graph order."""
    return tuple(node for node in model.graph.node if node.domain not in _STANDARD)


def own_nodes(model: ModelProto) -> tuple[NodeProto, ...]:
    """The nodes whose operators are ours, in graph order."""
    return tuple(node for node in custom_nodes(model) if node.domain != DOMAIN)


def attentions(model: ModelProto) -> int:
    """How many of a graph's nodes are ONNX Runtime's attention operator."""
    return sum(node.domain == DOMAIN for node in model.graph.node)


def operator_channels(model: ModelProto) -> dict[str, tuple[int, ...]]:
    """The last axis of the first input of each operator of ours, as ``domain::op_type`` -> sizes.

    Raises:
        PlanError: the shape of one cannot be inferred.
    """
    nodes = own_nodes(model)
    if not nodes:
        return {}
    shapes = shapes_of(model, expressions=1)
    found: dict[str, set[int]] = {}
    for node in nodes:
        name = f"{node.domain}::{node.op_type}"
        found.setdefault(name, set()).add(_shape(node, node.input[0], shapes)[-1])
    return {name: tuple(sorted(sizes)) for name, sizes in found.items()}


def attribute_names(node: NodeProto) -> frozenset[str]:
    """The attributes that a node states."""
    return frozenset(attribute.name for attribute in node.attribute)


def attribute_values(node: NodeProto) -> dict[str, float | int]:
    """A node's numeric attributes."""
    values = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    return {name: value for name, value in values.items() if isinstance(value, float | int)}


def attach(model: ModelProto, functions: Sequence[FunctionProto]) -> None:
    """Add model-local functions, in place of those of the same names."""
    new = {(function.domain, function.name) for function in functions}
    kept = [entry for entry in model.functions if (entry.domain, entry.name) not in new]
    del model.functions[:]
    model.functions.extend([*kept, *functions])


def name_by_source(model: ModelProto) -> None:
    """Give each node a name that says which module and which line it came from.

    Builders name a node that they refuse, profilers one that is slow; on a device that name is all
    there is. Torch's exporter (2.9 to 2.15) notes both as metadata; its paths of this machine are
    cut to those within packages, and torch's own lines are passed over.
    """
    for node in model.graph.node:
        noted = {entry.key: entry.value for entry in node.metadata_props}
        scopes = _SCOPE.findall(noted.get("pkg.torch.onnx.name_scopes", ""))
        frames = _FRAME.findall(noted.get("pkg.torch.onnx.stack_trace", ""))
        places = [f" {path}:{line}" for path, line in frames if not path.startswith("torch/")]
        modules = [f"{scope}/" for scope in scopes[:-1] if scope and not scope.startswith("_")]
        node.name = "".join([*modules[-1:], node.name, *places[-1:]])


def strip(model: ModelProto) -> None:
    """Remove what the exporter noted for debugging: source paths, stack traces, value shapes."""
    model.doc_string = ""
    del model.metadata_props[:]
    graph = model.graph
    graph.doc_string = ""
    del graph.metadata_props[:]
    del graph.value_info[:]
    for item in (*graph.node, *graph.initializer, *graph.input, *graph.output):
        item.doc_string = ""
        del item.metadata_props[:]


def check(model: ModelProto) -> None:
    """Run the ONNX checker with full type and shape inference.

    Raises:
        PlanError: the graph is not valid ONNX.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:  # the checker takes large models by path
            path, written = Path(folder) / f"{model.graph.name}.onnx", serialise(model)
            path.write_bytes(written.graph)
            if written.data:
                path.with_name(path.name + DATA).write_bytes(written.data)
            onnx.checker.check_model(path, full_check=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError) as error:
        raise PlanError(f"Graph '{model.graph.name}' is not valid ONNX: {error}") from error


def parameters(model: ModelProto) -> int:
    """Number of stored floating-point values."""
    stored = (entry for entry in model.graph.initializer if entry.data_type in _FLOATS)
    return sum(math.prod(entry.dims) for entry in stored)


def expose(model: ModelProto, names: Sequence[str]) -> tuple[ModelProto, tuple[TensorSpec, ...]]:
    """A copy with inner float tensors as further outputs.

    Args:
        model: a graph whose custom operators have functions.
        names: inner tensors, none of them an input or output.

    Returns:
        The copy, and what the new outputs are.

    Raises:
        PlanError: the type of one cannot be inferred.
    """
    copy = inferred(model)
    inner = {value.name: value for value in copy.graph.value_info}
    missing = [name for name in names if name not in inner]
    if missing:
        raise PlanError(f"The type of '{missing[0]}' in '{model.graph.name}' cannot be inferred.")
    exposed = [inner[name] for name in names]
    copy.graph.output.extend(exposed)
    del copy.graph.value_info[:]
    return copy, tuple(_tensor_spec(value) for value in exposed)


def initialisers(model: ModelProto) -> dict[str, npt.NDArray[Any]]:
    """The stored tensors by name."""
    return {entry.name: onnx.numpy_helper.to_array(entry) for entry in model.graph.initializer}


def shapes_of(model: ModelProto, *, expressions: int) -> Shapes:
    """The shape of every tensor that has one without free axes, for a run with that N."""
    copy = ModelProto()
    with _weights_aside(model):
        copy.CopyFrom(model)
    typed = shape_inference.infer_shapes(
        _with_expressions(copy, expressions), strict_mode=True, data_prop=True
    )
    return _shapes(typed.graph)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Multiply-adds of one node, and whether it computes in half precision."""

    node: str
    op_type: str
    multiply_adds: int
    half: bool


def costs(model: ModelProto) -> tuple[Cost, ...]:
    """The multiply-adds of products, attentions and convolutions, for a run with N = 1.

    Custom operators count as their functions do.

    Raises:
        PlanError: the shape of a counted tensor cannot be inferred.
    """
    with _weights_aside(model):
        flat = _with_expressions(inliner.inline_local_functions(model), 1)
    typed = shape_inference.infer_shapes(flat, strict_mode=True, data_prop=True)
    shapes, types = _shapes(typed.graph), element_types(typed)
    counted = (
        Cost(
            node=node.name or node.output[0],
            op_type=node.op_type,
            multiply_adds=_cost(node, shapes),
            half=types.get(node.output[0]) == TensorProto.FLOAT16,
        )
        for node in typed.graph.node
    )
    return tuple(cost for cost in counted if cost.multiply_adds)


def element_types(model: ModelProto) -> dict[str, int]:
    """The element type of every tensor whose type is stated."""
    graph = model.graph
    types = {entry.name: entry.data_type for entry in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        types[value.name] = value.type.tensor_type.elem_type
    return types


def _with_expressions(model: ModelProto, count: int) -> ModelProto:
    graph = model.graph
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == EXPRESSIONS:
                dim.dim_value = count
    return model


def _shapes(graph: GraphProto) -> dict[str, tuple[int, ...]]:
    shapes = {entry.name: tuple(entry.dims) for entry in graph.initializer}
    for value in (*graph.input, *graph.output, *graph.value_info):
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            shapes[value.name] = tuple(dim.dim_value for dim in dims)
    return shapes


def _cost(node: NodeProto, shapes: Shapes) -> int:
    if node.op_type == "Einsum":
        return _einsum_cost(node, shapes)
    if node.op_type == OPERATOR:
        query, key, value = (_shape(node, name, shapes) for name in node.input[:3])
        return query[0] * query[1] * key[1] * (key[2] + value[2])
    if node.op_type == "ConvTranspose":
        _, per_group, *kernel = _shape(node, node.input[1], shapes)
        return math.prod(_shape(node, node.input[0], shapes)) * per_group * math.prod(kernel)
    if node.op_type not in ("MatMul", "Gemm", "Conv"):
        return 0
    per_output = {
        "MatMul": lambda: _shape(node, node.input[0], shapes)[-1],
        "Gemm": lambda: _shape(node, node.input[0], shapes)[0 if _transposed(node) else 1],
        "Conv": lambda: math.prod(_shape(node, node.input[1], shapes)[1:]),
    }[node.op_type]()
    return math.prod(_shape(node, node.output[0], shapes)) * per_output


def _einsum_cost(node: NodeProto, shapes: Shapes) -> int:
    equation = helper.get_node_attr_value(node, "equation").decode()
    terms = equation.replace(" ", "").split("->")[0].split(",")
    sizes: dict[str, int] = {}
    for term, name in zip(terms, node.input, strict=True):
        sizes.update(zip(term, _shape(node, name, shapes), strict=True))
    return math.prod(sizes.values())


def _transposed(node: NodeProto) -> bool:
    return any(entry.name == "transA" and entry.i for entry in node.attribute)


def _shape(node: NodeProto, name: str, shapes: Shapes) -> tuple[int, ...]:
    if name not in shapes:
        raise PlanError(
            f"Node '{node.name}' ({node.op_type}) cannot be counted: the shape of '{name}' cannot "
            "be inferred."
        )
    return shapes[name]
