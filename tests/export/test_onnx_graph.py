from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from onnx import NodeProto, TensorProto, helper, numpy_helper

from rt_ris.errors import PlanError, PluginError, ShapeError
from rt_ris.spec import StageSpec, TensorSpec
from rt_ris_export import onnx_graph
from rt_ris_export.steps.function import complete, kernel_of
from rt_ris_kernels.ops import KERNELS


def _model(
    nodes: Sequence[NodeProto],
    *,
    inputs: dict[str, list[int | str]],
    outputs: dict[str, list[int | str] | None],
    weights: dict[str, tuple[int, ...]],
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "stage",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in outputs.items()],
        [numpy_helper.from_array(np.ones(s, np.float32), n) for n, s in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _linear() -> onnx.ModelProto:
    return _model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        inputs={"x": ["N", 5, 3]},
        outputs={"y": ["N", 5, 4]},
        weights={"w": (3, 4)},
    )


def _spec(shape: tuple[int | str, ...] = ("N", 5, 3), name: str = "y") -> StageSpec:
    return StageSpec(
        id="stage",
        role="fusion",
        inputs=(TensorSpec(name="x", dtype="float32", shape=shape),),
        outputs=(TensorSpec(name=name, dtype="float32", shape=("N", 5, 4)),),
    )


def test_interface() -> None:
    onnx_graph.check_interface(_linear(), _spec())
    with pytest.raises(ShapeError, match=r"inputs x float32 \[N, 5, 3\]; .* x float32 \[1, 5, 3\]"):
        onnx_graph.check_interface(_linear(), _spec(shape=(1, 5, 3)))
    with pytest.raises(ShapeError, match="with outputs y float32"):
        onnx_graph.check_interface(_linear(), _spec(name="z"))


@pytest.mark.parametrize(
    ("node", "x", "w", "cost"),
    [
        (helper.make_node("MatMul", ["x", "w"], ["y"]), ["N", 5, 3], (3, 4), 5 * 3 * 4),
        (helper.make_node("Gemm", ["x", "w"], ["y"]), [5, 3], (3, 4), 5 * 3 * 4),
        (helper.make_node("Gemm", ["x", "w"], ["y"], transA=1), [3, 5], (3, 4), 5 * 3 * 4),
        (
            helper.make_node("Conv", ["x", "w"], ["y"], group=2, pads=[1, 1, 1, 1]),
            ["N", 4, 8, 6],
            (10, 2, 3, 3),
            8 * 6 * 10 * 2 * 9,
        ),
        (
            helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2]),
            ["N", 4, 8, 6],
            (4, 10, 2, 2),
            8 * 6 * 4 * 10 * 4,
        ),
        (
            helper.make_node("Einsum", ["x", "w"], ["y"], equation="bhc, kc -> bhk"),
            [2, 5, 3],
            (4, 3),
            2 * 5 * 3 * 4,
        ),
        (helper.make_node("Relu", ["x"], ["y"]), ["N", 5, 3], (1,), 0),
    ],
    ids=lambda value: value.op_type if isinstance(value, NodeProto) else "",
)
def test_multiply_adds(node: NodeProto, x: list[int | str], w: tuple[int, ...], cost: int) -> None:
    model = _model([node], inputs={"x": x}, outputs={"y": None}, weights={"w": w})
    for value in model.graph.output:
        value.type.tensor_type.ClearField("shape")
    assert sum(node.multiply_adds for node in onnx_graph.costs(model)) == cost


def test_unknown_shapes_are_not_guessed() -> None:
    model = _model(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        inputs={"x": ["M", 3]},
        outputs={"y": ["M", 4]},
        weights={"w": (3, 4)},
    )
    with pytest.raises(PlanError, match="the shape of 'x' cannot be inferred"):
        onnx_graph.costs(model)


def test_parameters_are_the_stored_numbers() -> None:
    assert onnx_graph.parameters(_linear()) == 12


def test_strip_removes_what_the_exporter_noted() -> None:
    model = _linear()
    model.graph.node[0].doc_string = "/home/somebody/model.py"
    model.graph.node[0].metadata_props.add(key="trace", value="/home/somebody/model.py")
    model.metadata_props.add(key="trace", value="/home/somebody/model.py")
    onnx_graph.strip(model)
    assert b"somebody" not in onnx_graph.serialise(model).graph


def test_expose_types_an_inner_tensor() -> None:
    model = _model(
        [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])],
        inputs={"x": ["N", 5, 3]},
        outputs={"y": ["N", 5, 4]},
        weights={"w": (3, 4)},
    )
    copy, inner = onnx_graph.expose(model, ["h"])
    assert inner == (TensorSpec(name="h", dtype="float32", shape=("N", 5, 4)),)
    assert [value.name for value in copy.graph.output] == ["y", "h"]
    with pytest.raises(PlanError, match="'q' in 'stage' cannot be inferred"):
        onnx_graph.expose(model, ["q"])


def test_an_invalid_graph_is_refused() -> None:
    model = _linear()
    model.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(PlanError, match="Graph 'stage' is not valid ONNX"):
        onnx_graph.check(model)


def test_operators_without_a_kernel_are_refused() -> None:
    model = _linear()
    model.graph.node[0].domain = "elsewhere"
    with pytest.raises(PluginError, match="elsewhere::MatMul, which no kernel defines"):
        complete(model)


def test_a_node_must_state_every_attribute() -> None:
    kernel = KERNELS[0]
    attributes = {**kernel.node_attributes}
    node = helper.make_node(kernel.op_type, ["x"], ["y"], domain=kernel.domain, **attributes)
    assert kernel_of(node) is kernel
    del attributes["threshold"]
    node = helper.make_node(kernel.op_type, ["x"], ["y"], domain=kernel.domain, **attributes)
    with pytest.raises(PluginError, match="does not state threshold"):
        kernel_of(node)
