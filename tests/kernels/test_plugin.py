"""The TensorRT plugin: its callbacks by hand, and TensorRT-RTX plans for GPUs that are absent."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from rt_ris.build.process import libraries
from rt_ris.errors import PluginError
from rt_ris_kernels import plugin
from rt_ris_kernels.geometry import geometry, workspace_bound
from rt_ris_kernels.ops.masked_mutual_attention import MASKED_MUTUAL_ATTENTION as SPEC

CHILD = Path(__file__).with_name("rtx_child.py")
SMS = ("75", "80", "86", "89", "120")
TRIES = 8
"""TensorRT-RTX 1.7.1 names what a plan holds in one of two ways, by chance."""
WIDTH, PIXELS = 256, 4096


class Launcher:
    """Stands for the kernels of a GPU; notes the launch."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []

    def geometry(self, **sizes: Any) -> Any:
        return geometry(**sizes, multiprocessors=16)

    def launch_unchecked(self, pointers: list[int], **given: Any) -> None:
        self.calls.append({"pointers": pointers, **given})


def make(trt: Any, launcher: Launcher, **attributes: float) -> Any:
    plugin.register(trt, open_launcher=lambda: launcher)  # type: ignore[arg-type, return-value]
    creator = trt.get_plugin_registry().get_creator(SPEC.op_type, "1", "rt_ris")
    given = plugin.Fields(trt, {**SPEC.attributes, **attributes})
    return creator.create_plugin("node", given.collection, None)


def test_registering_twice_keeps_the_first(trt: Any) -> None:
    plugin.register(trt)
    first = trt.REGISTRY.get_creator(SPEC.op_type, "1", "rt_ris")
    plugin.register(trt)
    assert trt.REGISTRY.get_creator(SPEC.op_type, "1", "rt_ris") is first
    assert [field.name for field in first.field_names] == list(SPEC.attributes)


def test_a_refusal_and_an_old_tensorrt_are_said(trt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trt.REGISTRY, "refuses", True)
    with pytest.raises(PluginError, match="refused the plugin MaskedMutualAttention in 'rt_ris'"):
        plugin.register(trt)
    monkeypatch.delattr(trt, "IPluginV3")
    with pytest.raises(PluginError, match=r"has no IPluginV3; 10\.3 or later has"):
        plugin.register(trt)


def test_fields_survive_serialising_and_cloning(trt: Any) -> None:
    made = make(trt, Launcher(), threshold=0.75, normalize=1)
    again = plugin.read_fields(made.clone().get_fields_to_serialize())
    assert again == {
        **SPEC.attributes,
        "threshold": 0.75,
        "normalize": 1,
        "epsilon": pytest.approx(1e-5),
    }
    types = {field.name: field.type.name for field in made.get_fields_to_serialize()}
    assert types == {
        "threshold": "FLOAT32",
        "scale": "FLOAT32",
        "epsilon": "FLOAT32",
        "normalize": "INT32",
    }


def test_shapes_types_and_formats(trt: Any) -> None:
    made = make(trt, Launcher())
    shapes = made.get_output_shapes([["one", "P", "C"], ["N", "L", "C"]], None, None)
    assert [list(shape) for shape in shapes] == [["N", "P", "C"], ["N", "L", "C"]]
    assert made.get_output_data_types(["half"] * 7) == ["half", "half"]
    tensors = [trt.dynamic((1, 9, 256)) for _ in range(9)]
    assert all(made.supports_format_combination(at, tensors, 7) for at in range(9))
    tensors[3] = trt.dynamic((1, 9, 256), trt.DataType.FLOAT)
    assert not made.supports_format_combination(3, tensors, 7)
    tensors[0] = trt.dynamic((1, 9, 256), trt.DataType.INT8)
    assert not made.supports_format_combination(0, tensors, 7)
    tensors[1].desc.format = trt.TensorFormat.CHW2
    assert not made.supports_format_combination(1, tensors, 7)


def test_channels_without_a_kernel_are_refused_at_building(trt: Any) -> None:
    made = make(trt, Launcher())
    made.configure_plugin([trt.dynamic((1, 9, 256))], [])
    with pytest.raises(PluginError, match="not 64; build without the plugin"):
        made.configure_plugin([trt.dynamic((1, 9, 64))], [])


def test_a_call_is_the_launch_of_its_sizes(trt: Any) -> None:
    launcher = Launcher()
    made = make(trt, launcher, threshold=0.25).attach_to_context(None)
    inputs = [trt.desc((1, 900, 128)), trt.desc((3, 17, 128))] + [trt.desc((128,))] * 5
    made.enqueue(inputs, [], list(range(1, 8)), [8, 9], 10, 11)
    (call,) = launcher.calls
    assert call["pointers"] == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert (call["workspace"], call["stream"], call["shared"]) == (10, 11, True)
    assert call["plan"].forward.kernel == "forward_f16_c128_w32_p32"
    assert call["attributes"]["threshold"] == 0.25
    room = made.get_workspace_size([None, trt.dynamic((16, 80, 256))], [])
    assert room == workspace_bound(expressions=16, words=80, channels=256)
    assert call["plan"].workspace_bytes <= room


def model(element: int, **attributes: float) -> onnx.ModelProto:
    """One node with its function; as many expressions and words as the profile allows."""
    dtype = helper.tensor_dtype_to_np_dtype(element)
    shapes: dict[str, list[int | str]] = {
        "z_v": [1, PIXELS, WIDTH],
        "z_l": ["N", "L", WIDTH],
        "word_mask": ["N", "L"],
        "f_lav": ["N", PIXELS, WIDTH],
        "f_val": ["N", "L", WIDTH],
    }
    values = [
        helper.make_tensor_value_info(operand.name, element, shapes[operand.name])
        for operand in (*SPEC.inputs[:3], *SPEC.outputs)
    ]
    norms = [
        numpy_helper.from_array(np.full(WIDTH, value, dtype), operand.name)
        for operand, value in zip(SPEC.inputs[3:], (1, 0, 1, 0), strict=True)
    ]
    node = helper.make_node(
        SPEC.op_type,
        [operand.name for operand in SPEC.inputs],
        [operand.name for operand in SPEC.outputs],
        domain=SPEC.domain,
        **{**SPEC.node_attributes, **attributes},
    )
    return helper.make_model(
        helper.make_graph([node], "operator", values[:3], values[3:], norms),
        opset_imports=[helper.make_opsetid("", 20), helper.make_opsetid(SPEC.domain, 1)],
        functions=[SPEC.body(20)],
        ir_version=10,
    )


def plans(path: Path, how: str, sms: Sequence[str] = SMS) -> list[dict[str, Any]]:
    with libraries("tensorrt-rtx") as environment:
        done = subprocess.run(
            [sys.executable, str(CHILD), str(path), how, *sms],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("element", [TensorProto.FLOAT16, TensorProto.FLOAT])
def test_one_onnx_file_builds_with_the_plugin_and_without(element: int, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx_libs")
    path = tmp_path / "operator.onnx"
    onnx.save(model(element), path)
    with_plugin = plans(path, "plugin")
    assert [row.get("plugin_layers") for row in with_plugin] == [1] * len(SMS), with_plugin
    assert [row["errors"] for row in with_plugin] == [[]] * len(SMS)
    inlined = plans(path, "inlined")
    if element == TensorProto.FLOAT:  # TensorRT-RTX 1.7.1 has no float32 products for Turing
        assert "FP32 GEMM is not supported" in inlined.pop(0)["errors"][0]
    assert [row.get("plugin_layers") for row in inlined] == [0] * len(inlined), inlined
    assert all(row["layers"] > with_plugin[0]["layers"] for row in inlined)


@pytest.mark.parametrize("element", [TensorProto.FLOAT16, TensorProto.FLOAT])
def test_the_library_in_c_makes_the_plans_of_this_plugin(
    element: int, tmp_path: Path, plugin_library: Path
) -> None:
    pytest.importorskip("tensorrt_rtx_libs")
    path = tmp_path / "operator.onnx"
    onnx.save(model(element, threshold=0.25, scale=0.5, normalize=1), path)
    for sm in ("80", "89"):
        ours = plans(path, "plugin", [sm] * TRIES)
        of_library = plans(path, str(plugin_library), [sm] * TRIES)
        assert [row.get("plugin_layers") for row in of_library] == [1] * TRIES, of_library
        assert {row["bytes"] for row in ours} == {row["bytes"] for row in of_library}
        assert {row["sha256"] for row in ours} & {row["sha256"] for row in of_library}
