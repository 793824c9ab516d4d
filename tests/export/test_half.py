"""Half precision: typed graphs, what of them is half, the executor that rounds, and the ladder."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from rt_ris.cli import main
from rt_ris.errors import ParityError, PlanError
from rt_ris.spec import LOGITS, PIXELS, StageSpec, TensorSpec
from rt_ris_export import ExportRecipe, export_bundle, half, onnx_graph
from rt_ris_export.measure import loosest
from rt_ris_export.parity_record import Deviation, StageParity, TensorParity
from rt_ris_export.rounding import Memory, RememberingRunner, RoundingRunner
from rt_ris_export.steps import precision
from rt_ris_export.steps.function import complete
from rt_ris_export.workspace import Workspace
from rt_ris_kernels.ops import KERNELS
from rt_ris_train import architecture

from .conftest import Traced

HALF, FULL = TensorProto.FLOAT16, TensorProto.FLOAT


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: dict[str, list[int | str]],
    outputs: dict[str, list[int | str]],
    stored: dict[str, np.ndarray] | None = None,
    *,
    kind: int = FULL,
) -> onnx.ModelProto:
    made = [
        [helper.make_tensor_value_info(name, kind, shape) for name, shape in values.items()]
        for values in (inputs, outputs)
    ]
    weights = [numpy_helper.from_array(array, name) for name, array in (stored or {}).items()]
    graph = helper.make_graph(nodes, "g", made[0], made[1], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def spec_of(model: onnx.ModelProto) -> StageSpec:
    names = {HALF: "float16", FULL: "float32"}

    def tensors(values: object) -> tuple[TensorSpec, ...]:
        return tuple(
            TensorSpec(
                name=value.name,
                dtype=names[value.type.tensor_type.elem_type],  # type: ignore[arg-type]
                shape=tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim),
            )
            for value in values  # type: ignore[attr-defined]
        )

    return StageSpec(
        id="g",
        role="fusion",
        inputs=tensors(model.graph.input),
        outputs=tensors(model.graph.output),
    )


def test_everything_is_half_but_what_the_policy_keeps() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="product"),
        helper.make_node("ReduceMean", ["y"], ["m"], name="mean", axes=None, keepdims=1),
        helper.make_node("Sub", ["y", "m"], [LOGITS], name="centre"),
    ]
    weights = {"w": np.full((4, 4), 1e5, dtype=np.float32)}
    model = model_of(nodes, {"x": ["N", 4]}, {LOGITS: ["N", 4]}, weights)
    converted = half.to_half(model)
    onnx_graph.check(converted)
    types = onnx_graph.element_types(onnx.shape_inference.infer_shapes(converted))
    by_name = {node.name: node for node in converted.graph.node}
    assert types["x"] == HALF
    assert types[by_name["product"].input[1]] == HALF
    assert types[by_name["mean"].input[0]] == FULL
    assert types[by_name["centre"].output[0]] == HALF
    assert types[LOGITS] == FULL
    (stored,) = converted.graph.initializer
    assert numpy_helper.to_array(stored).max() == 65504  # clipped, not infinite
    share = half.half_share(converted)
    assert (share.weights, share.multiply_adds, share.full) == (1.0, 1.0, ())


def test_a_picture_is_normalised_in_full() -> None:
    nodes = [
        helper.make_node("Cast", [PIXELS], ["p"], name="widen", to=FULL),
        helper.make_node("Div", ["p", "s"], ["n"], name="scale"),
        helper.make_node("MatMul", ["n", "w"], ["y"], name="product"),
    ]
    stored = {"s": np.float32([58.0]), "w": np.eye(3, dtype=np.float32)}
    model = model_of(nodes, {PIXELS: [1, 2, 2, 3]}, {"y": [1, 2, 2, 3]}, stored)
    model.graph.input[0].type.tensor_type.elem_type = TensorProto.UINT8
    converted = half.to_half(model)
    onnx_graph.check(converted)
    types = onnx_graph.element_types(onnx.shape_inference.infer_shapes(converted))
    assert [types["p"], types["n"], types["y"]] == [FULL, FULL, HALF]


def test_a_share_below_nine_tenths_is_not_fp16(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="small"),
        helper.make_node("MatMul", ["y", "v"], ["z"], name="large"),
    ]
    stored = {"w": np.eye(4, dtype=np.float32), "v": np.ones((4, 16), dtype=np.float32)}
    model = model_of(nodes, {"x": ["N", 4]}, {"z": ["N", 16]}, stored)
    precision.check_share(half.half_share(half.to_half(model)))
    share = half.half_share(half.to_half(model, also_full=frozenset({"MatMul"})))
    with pytest.raises(PlanError, match=r"0\.0% of the multiply-adds.*large \(MatMul\), small"):
        precision.check_share(share)


def test_an_overflow_inside_a_stage_is_seen_here_and_not_by_onnx_runtime() -> None:
    """1 x 64 summed over 4,096 pixels is 262,144, beyond halves; then scaled back."""
    nodes = [
        helper.make_node("MatMul", ["a", "z"], ["sum"]),
        helper.make_node("Mul", ["sum", "k"], ["y"]),
    ]
    stored = {"k": np.array([2.0**-6], dtype=np.float16)}
    shapes: dict[str, list[int | str]] = {"a": ["N", 4096], "z": [4096, 2]}
    model = model_of(nodes, shapes, {"y": ["N", 2]}, stored, kind=HALF)
    values = {
        "a": np.ones((1, 4096), dtype=np.float16),
        "z": np.full((4096, 2), 64, dtype=np.float16),
    }
    session = onnxruntime.InferenceSession(model.SerializeToString())
    assert session.run(None, values)[0].tolist() == [[4096.0, 4096.0]]
    runner = RoundingRunner(spec_of(model), model)
    assert np.isinf(runner.run(values)["y"]).all()
    found = {entry.tensor: entry for entry in runner.ranges}
    assert (found["sum"].infinite, found["sum"].nan) == (2, 0)


def test_every_node_rounds() -> None:
    nodes = [
        helper.make_node("Add", ["x", "small"], ["y"]),
        helper.make_node("Sub", ["y", "x"], ["z"]),
    ]
    stored = {"small": np.array([2.0**-12], dtype=np.float16)}
    model = model_of(nodes, {"x": ["N"]}, {"z": ["N"]}, stored, kind=HALF)
    runner = RoundingRunner(spec_of(model), model)
    assert runner.run({"x": np.ones(1, dtype=np.float16)})["z"].tolist() == [0.0]


@pytest.mark.parametrize(("mean", "near"), [(64, None), (0, 1e-2)])
def test_the_operator_keeps_its_range_in_half(mean: float, near: float | None) -> None:
    """Words collect 4,096 pixels of mean 64: digits are lost, the range is not."""
    kernel = KERNELS[0]
    draw = np.random.default_rng(0)
    pixels, words, width = 4096, 5, 16
    arrays = [
        mean + draw.standard_normal((1, pixels, width)),
        0.01 * draw.standard_normal((1, words, width)) + 0.01,
        np.ones((1, words)),
        *(np.full(width, value, dtype=np.float64) for value in (1, 0, 1, 0)),
    ]
    arrays = [array.astype(np.float16) for array in arrays]
    names = [operand.name for operand in kernel.inputs]
    node = helper.make_node(
        kernel.op_type,
        names,
        ["f_lav", "f_val"],
        domain=kernel.domain,
        **kernel.node_attributes,
    )
    model = model_of(
        [node],
        {name: list(array.shape) for name, array in zip(names, arrays, strict=True)},
        {"f_lav": [1, pixels, width], "f_val": [1, words, width]},
        kind=HALF,
    )
    model.opset_import.append(helper.make_opsetid(kernel.domain, 1))
    complete(model)
    runner = RoundingRunner(spec_of(model), model)
    found = runner.run(dict(zip(names, arrays, strict=True)))
    assert not any(entry.infinite or entry.nan for entry in runner.ranges)
    truth = kernel.run([array.astype(np.float64) for array in arrays])
    error = np.linalg.norm(found["f_val"] - truth[1]) / np.linalg.norm(truth[1])
    assert np.isfinite(error)
    assert near is None or error < near


@pytest.mark.parametrize("name", ["maris", "haris", "etris", "shared_ris"])
def test_a_network_goes_the_whole_way_in_half(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "half.bundle"
    words = ["export", "--arch", name, "--variant", "tiny", "--precision", "fp16", "--json"]
    assert main([*words, "--out", str(bundle)]) == 0
    said = json.loads(capsys.readouterr().out)
    for stage in said["precision"]:
        assert stage["precision"] == "fp16"
        assert min(stage["half_weights"], stage["half_multiply_adds"]) > 0.9
    for stage in said["parity"]["stages"]:
        for tensor in stage["tensors"]:
            assert 1e-5 < tensor["isolated"]["relative"] < 2e-2, (stage["id"], tensor)
    manifest = json.loads((bundle / "manifest.json").read_text())
    between = [
        tensor
        for stage in manifest["stages"]
        for tensor in stage["spec"]["outputs"]
        if tensor["name"] != LOGITS
    ]
    assert all(tensor["dtype"] == "float16" for tensor in between)
    ranges = json.loads((bundle / "ranges.json").read_text())
    assert all(ranges[stage["spec"]["id"]] for stage in manifest["stages"])
    assert main(["verify", str(bundle)]) == 0


def test_a_mask_that_half_precision_turns_is_a_miss_and_the_ladder_finds_the_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DMMI's instance norms blow up what random weights leave nearly constant."""
    bundle = tmp_path / "half.bundle"
    words = ["export", "--arch", "dmmi", "--variant", "tiny", "--precision", "fp16", "--json"]
    words += ["--out", str(bundle)]
    assert main(words) == 1
    assert "differs from PyTorch's: IoU" in capsys.readouterr().err
    assert not bundle.exists()
    assert main([*words, "--remedy", "auto"]) == 0
    said = json.loads(capsys.readouterr().out)
    called = {stage["stage"]: stage["precision"] for stage in said["precision"]}
    assert called["fusion"] == "mixed"
    assert called["text_encoder"] == "fp16"
    assert said["parity"]["remedies"][0] == "fusion: half -> wide"
    assert main(["verify", str(bundle)]) == 0


def typed_graphs(tmp_path: Path, traced: Traced) -> precision.TypedGraphs:
    (tmp_path / "plain").mkdir()
    plain = Workspace(tmp_path / "plain")
    graphs = precision.TypedGraphs(
        workspace=Workspace(tmp_path),
        plain={name: plain.write(f"{name}.onnx", raw) for name, raw in traced.graphs.items()},
        traced={stage.id: stage for stage in traced.network.graph().stages},
    )
    for name in graphs.plain:
        graphs.apply(name, "half")
    return graphs


def test_the_ladder_ends_where_all_is_float32(tmp_path: Path, traced: Traced) -> None:
    graphs = typed_graphs(tmp_path, traced)
    (given,) = (tensor.name for tensor in graphs.traced["text_encoder"].outputs)
    for _ in range(3):
        assert graphs.climb("text_encoder")
    assert not graphs.climb("text_encoder")
    for stage, side in (("text_encoder", "outputs"), ("fusion", "inputs")):
        declared = {it.name: it.dtype for it in getattr(graphs.specs[stage], side)}
        assert declared.pop(given) == "float32"
        assert "float32" not in declared.values()
        onnx_graph.check_interface(onnx_graph.load(graphs.files[stage]), graphs.specs[stage])
    assert graphs.settled() == {"text_encoder"}
    for _ in range(4):
        assert graphs.climb("fusion")
    assert [step.split(":")[0] for step in graphs.steps[-4:]] == [*["fusion"] * 3, "image_encoder"]
    while any(graphs.climb(name) for name in graphs.plain):
        pass
    assert graphs.settled() == set(graphs.plain)
    assert graphs.specs == graphs.traced  # what decides gives nothing but the final outputs
    assert "decoder: full inside -> full and given so" not in graphs.steps


def test_a_stage_that_did_not_change_is_not_run_again(traced: Traced) -> None:
    stage = traced.network.graph().stage("text_encoder")
    model = half.to_half(onnx_graph.parse(traced.graphs["text_encoder"]))
    spec = half.half_spec(stage)
    memory: Memory = {}
    ids = np.zeros((2, stage.inputs[0].shape[1]), np.int32)
    given = {"token_ids": ids, "token_mask": np.ones(ids.shape, np.bool_)}
    first = RememberingRunner(spec, model, memory=memory)
    made = first.run(given)
    again = RememberingRunner(spec, model, memory=memory)
    again._compute = None  # type: ignore[assignment,method-assign] # nothing is computed
    for name, array in again.run(given).items():
        np.testing.assert_array_equal(array, made[name])
    assert again.ranges == first.ranges
    with pytest.raises(TypeError):
        again.run({**given, "token_ids": ids + 1})


def test_ranges_are_of_what_a_runner_was_asked_alone() -> None:
    """What a graph made of other inputs, in an attempt that was given up, is none of its ranges."""
    node = helper.make_node("Mul", ["x", "x"], ["y"], name="square")
    shape = (TensorProto.FLOAT16, [2])
    model = helper.make_model(
        helper.make_graph(
            [node],
            "g",
            [helper.make_tensor_value_info("x", *shape)],
            [helper.make_tensor_value_info("y", *shape)],
        ),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    tensors = [TensorSpec(name=name, dtype="float16", shape=(2,)) for name in ("x", "y")]
    spec = StageSpec(id="g", role="fusion", inputs=(tensors[0],), outputs=(tensors[1],))
    memory: Memory = {}
    large, small = np.float16([1000, 2]), np.float16([3, 2])
    RememberingRunner(spec, model, memory=memory).run({"x": large})
    again = RememberingRunner(spec, model, memory=memory)
    for _ in range(2):
        again.run({"x": small})
    (found,) = again.ranges
    assert (found.largest, found.infinite) == (9.0, 0)
    again.run({"x": large})
    (found,) = again.ranges
    assert (found.largest, found.infinite) == (9.0, 1)


def test_a_wrong_mask_is_put_down_to_a_stage_that_can_still_be_remedied() -> None:
    def measured(stage: str, error: float) -> StageParity:
        found = Deviation(relative=error, peak=error)
        tensor = TensorParity(name="y", isolated=found, chained=found)
        return StageParity(id=stage, tensors=(tensor,), decides=False, tied=0)

    stages = [measured("image", 1e-3), measured("fusion", 2e-3), measured("decoder", 5e-3)]
    assert loosest(stages) == "decoder"
    assert loosest(stages, {"decoder"}) == "fusion"
    assert loosest(stages, {"decoder", "fusion"}) == "image"
    assert loosest(stages, {"decoder", "fusion", "image"}) == "decoder"


def overflowing(model: onnx.ModelProto) -> onnx.ModelProto:
    """A graph whose last float tensor goes by way of values that halves do not have."""
    graph = model.graph
    output = graph.output[0].name
    node = next(node for node in graph.node if output in node.output)
    node.output[list(node.output).index(output)] = "before"
    for factor, source, target in ((1e6, "before", "between"), (1e-6, "between", output)):
        name = f"{target}.factor"
        graph.initializer.append(numpy_helper.from_array(np.float32([factor]), name))
        graph.node.append(helper.make_node("Mul", [source, name], [target], name=f"{target}.mul"))
    return model


@pytest.mark.usefixtures("one_picture")
def test_a_miss_names_where_halves_ended_and_the_ladder_mends_it(
    traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    graph = overflowing(onnx_graph.parse(traced.graphs["fusion"]))
    steps = traced.steps(fusion=onnx_graph.serialise(graph).graph)
    out = tmp_path / "half.bundle"
    recipe = ExportRecipe(arch="maris", variant="tiny", out=out, precision="fp16")
    with pytest.raises(ParityError, match="'fusion' differs from PyTorch: relative error inf") as e:
        export_bundle(recipe, steps=steps)
    assert e.value.stage == "fusion"
    assert not list(tmp_path.iterdir())
    path = export_bundle(replace(recipe, remedy="auto"), steps=steps)
    manifest = json.loads((path / "manifest.json").read_text())
    called = {stage["spec"]["id"]: stage["target"]["precision"] for stage in manifest["stages"]}
    assert called == {
        "image_encoder": "fp16",
        "text_encoder": "fp16",
        "fusion": "mixed",
        "decoder": "fp16",
    }
    parity = json.loads((path / "parity.json").read_text())
    assert parity["remedies"] == ["fusion: half -> wide", "fusion: wide -> full inside"]


def test_the_five_systems_offer_a_toy_size() -> None:
    assert all("tiny" in architecture.load(name).variants for name in architecture.names())
