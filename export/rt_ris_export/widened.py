"""What a graph stores is what was trained; and a half-precision graph in exact arithmetic.

The limits of half precision are wide, as rounding is coarse: a weight off by a few percent passes
below them. Here each half becomes a float32 again and each stored value is the one that was traced,
so that what remains of a typed graph is its structure, and the limits of float32 apply to it. That
the stored values are those, rounded where they are halves, is seen bit by bit.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, numpy_helper
from torch import nn

from rt_ris.errors import ParityError
from rt_ris_export.half import HALF_SUFFIX
from rt_ris_export.onnx_graph import LARGEST_HALF

_HALF, _FULL = TensorProto.FLOAT16, TensorProto.FLOAT
_TYPE_ATTRIBUTES: Final = ("to", "dtype")


def widened(typed: ModelProto, plain: ModelProto) -> ModelProto:
    """Turn a graph in half precision into one in float32, in place.

    Args:
        typed: the graph that ships.
        plain: the float32 graph as traced, from which it was made.

    Returns:
        ``typed``, with the inputs and outputs of ``plain``.

    Raises:
        ParityError: a stored value is not the traced one, rounded; or a norm takes its moments in
            half precision, which no executor here shows.
    """
    traced, stage = dict(_stored(plain)), plain.graph.name
    for name, tensor in _stored(typed):
        if tensor.data_type == _HALF:
            source = name.removesuffix(HALF_SUFFIX)
            _check_rounded(tensor, traced.get(source), name=source, stage=stage)
            kept = tensor.name
            tensor.CopyFrom(traced[source])
            tensor.name = kept
        elif name in traced and _bytes(tensor) != _bytes(traced[name]):
            raise _other_values(stage, name, "its float32 graph as traced")
    for node in typed.graph.node:
        for entry in node.attribute:
            if entry.name in _TYPE_ATTRIBUTES and entry.i == _HALF:
                entry.i = _FULL
            if entry.name == "stash_type" and entry.i != _FULL:
                raise ParityError(
                    f"Stage '{stage}': node '{node.name}' takes its moments in half precision. No "
                    "bundle was written.",
                    stage=stage,
                )
    for value in (*typed.graph.input, *typed.graph.output):
        if value.type.tensor_type.elem_type == _HALF:
            value.type.tensor_type.elem_type = _FULL
    return typed


def check_tables(model: ModelProto, module: nn.Module) -> None:
    """Compare what a graph gathers from with the network's parameters, bit by bit.

    The gate's sentences read a few rows of a vocabulary; the others could hold anything.

    Args:
        model: a stage's graph; what it stores in half precision was compared with that of float32.
        module: the stage, whose parameters the exporter calls by their names.

    Raises:
        ParityError: they differ.
    """
    stored = {entry.name: entry for entry in model.graph.initializer}
    trained = module.state_dict()
    read = {node.input[0] for node in model.graph.node if node.op_type == "Gather"}
    for name in sorted(read & stored.keys()):
        parameter = trained.get(name.removesuffix(HALF_SUFFIX))
        if parameter is None or tuple(stored[name].dims) != tuple(parameter.shape):
            continue  # a constant, or a part that all sentences read
        if stored[name].data_type == _HALF:
            continue
        if _bytes(stored[name]) != parameter.cpu().contiguous().numpy().tobytes():
            raise _other_values(model.graph.name, name, "the network")


def _stored(model: ModelProto) -> Iterator[tuple[str, TensorProto]]:
    """The stored tensors and those of constants, by the names under which nodes read them."""
    yield from ((entry.name, entry) for entry in model.graph.initializer)
    yield from ((node.output[0], entry.t) for node in model.graph.node for entry in _tensors(node))


def _tensors(node: NodeProto) -> list[AttributeProto]:
    return [entry for entry in node.attribute if entry.type == AttributeProto.TENSOR]


def _check_rounded(
    tensor: TensorProto, source: TensorProto | None, *, name: str, stage: str
) -> None:
    if source is None:
        raise ParityError(
            f"Stage '{stage}' stores '{name}' in half precision, which its float32 graph does not "
            "hold. No bundle was written.",
            stage=stage,
        )
    halves, values = numpy_helper.to_array(tensor), numpy_helper.to_array(source)
    if halves.shape != values.shape or not _is_rounded(halves, values).all():
        raise _other_values(stage, name, "its float32 graph, rounded")


def _other_values(stage: str, name: str, than: str) -> ParityError:
    return ParityError(
        f"Stage '{stage}' stores other values of '{name}' than {than}. No bundle was written.",
        stage=stage,
        error=1.0,
    )


def _bytes(tensor: TensorProto) -> bytes:
    return numpy_helper.to_array(tensor).tobytes()


def _is_rounded(halves: npt.NDArray[Any], values: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Where halves are the nearest to values, or the largest where those are beyond the range."""
    with np.errstate(over="ignore"):
        nearest = values.astype(np.float16)
    beyond = np.isinf(nearest) & np.isfinite(values)
    nearest[beyond] = np.copysign(np.float16(LARGEST_HALF), nearest[beyond])
    same: npt.NDArray[np.bool_] = np.isclose(halves, nearest, rtol=0, atol=0, equal_nan=True)
    return same
