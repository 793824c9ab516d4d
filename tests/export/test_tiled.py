"""ONNX Runtime's attention in place of attentions: the same numbers, and only where it fits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from PIL import Image

from rt_ris.bundle import Bundle
from rt_ris.cli import main
from rt_ris.errors import ParityError, PlanError
from rt_ris_export import ExportRecipe, export_bundle, onnx_graph, tiled
from rt_ris_export.attention_operator import OPERATOR

from .conftest import Traced, same_outputs

LIMIT = 1e-5
"""On the relative error of every output of a rewritten graph."""

N, HEADS, QUERIES, KEYS, WIDTH, WIDE = "N", 3, 6, 4, 5, 7


class Attention:
    """One attention as a graph, each of whose parts may be written in another way."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.inputs: dict[str, Sequence[int | str]] = {
            "q": [N, QUERIES, HEADS * WIDTH],
            "k": [N, KEYS, HEADS * WIDTH],
            "v": [N, KEYS, HEADS * WIDE],
        }
        self.outputs: dict[str, Sequence[int | str]] = {"y": [N, QUERIES, HEADS * WIDE]}
        self.stored: dict[str, np.ndarray[Any, Any]] = {
            "scale": np.float32([0.4]),
            "zero": np.float32(0),
            "infinite": np.float32(-np.inf),
            "packed": np.array([0, 0, -1]),
        }

    def add(self, op_type: str, inputs: Sequence[str], output: str, **attributes: object) -> str:
        self.nodes.append(helper.make_node(op_type, inputs, [output], **attributes))
        return output

    def heads(self, name: str, width: int, perm: Sequence[int] = (0, 2, 1, 3)) -> str:
        self.stored[f"{name}.shape"] = np.array([0, 0, HEADS, width])
        split = self.add("Reshape", [name, f"{name}.shape"], f"{name}.split")
        return self.add("Transpose", [split], f"{name}.heads", perm=perm)

    def product(self) -> str:
        """Queries by keys, not scaled yet."""
        turned = self.add("Transpose", [self.heads("k", WIDTH)], "k.turned", perm=(0, 1, 3, 2))
        return self.add("MatMul", [self.heads("q", WIDTH), turned], "scores")

    def finish(self, scores: str, *, guarded: bool = False) -> ModelProto:
        weights = self.add("Softmax", [scores], "weights", axis=-1)
        if guarded:
            self.add("IsNaN", [weights], "nothing")
            weights = self.add("Where", ["nothing", "zero", weights], "guarded")
        self.add("MatMul", [weights, self.heads("v", WIDE)], "mixed")
        self.add("Transpose", ["mixed"], "back", perm=(0, 2, 1, 3))
        self.add("Reshape", ["back", "packed"], "y")
        return self.model()

    def model(self) -> ModelProto:
        kinds = {"open": TensorProto.BOOL}
        values = [
            [
                helper.make_tensor_value_info(name, kinds.get(name, TensorProto.FLOAT), shape)
                for name, shape in sides.items()
            ]
            for sides in (self.inputs, self.outputs)
        ]
        stored = [numpy_helper.from_array(np.asarray(a), name) for name, a in self.stored.items()]
        return helper.make_model(
            helper.make_graph(self.nodes, "stage", *values, stored),
            opset_imports=[helper.make_opsetid("", 20)],
            ir_version=10,
        )


def scaled_queries() -> ModelProto:
    graph = Attention()
    query = graph.add("Mul", ["scale", graph.heads("q", WIDTH)], "q.scaled")
    turned = graph.add("Transpose", [graph.heads("k", WIDTH)], "k.turned", perm=(0, 1, 3, 2))
    return graph.finish(graph.add("MatMul", [query, turned], "scores"))


def scaled_twice() -> ModelProto:
    """As the exporter writes it: queries and keys by the root of the scale, keys in three axes."""
    graph = Attention()
    query = graph.add("Mul", [graph.heads("q", WIDTH), "scale"], "q.scaled")
    graph.stored["three"] = np.array([-1, KEYS, WIDTH])
    graph.stored["four"] = np.array([-1, HEADS, WIDTH, KEYS])
    flat = graph.add("Reshape", [graph.heads("k", WIDTH), "three"], "k.flat")
    turned = graph.add("Transpose", [flat], "k.turned", perm=(0, 2, 1))
    whole = graph.add("Reshape", [turned, "four"], "k.whole")
    key = graph.add("Mul", [whole, "scale"], "k.scaled")
    return graph.finish(graph.add("MatMul", [query, key], "scores"))


def divided_scores() -> ModelProto:
    graph = Attention()
    return graph.finish(graph.add("Div", [graph.product(), "scale"], "scaled"))


def one_bias_for_all() -> ModelProto:
    """As Swin's, on the left of the sum and without an axis B."""
    graph = Attention()
    shape = (HEADS, QUERIES, KEYS)
    graph.stored["bias"] = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    return graph.finish(graph.add("Add", ["bias", graph.product()], "biased"))


def masked(*, guarded: bool = True) -> ModelProto:
    """As PyTorch's: sentences have a mask each; the guard is for those that are all mask."""
    graph = Attention()
    graph.inputs["open"] = [N, KEYS]
    graph.stored["axes"] = np.array([1, 2])
    graph.add("Unsqueeze", ["open", "axes"], "wide")
    graph.add("Where", ["wide", "zero", "infinite"], "mask")
    scaled = graph.add("Mul", [graph.product(), "scale"], "scaled")
    return graph.finish(graph.add("Add", [scaled, "mask"], "biased"), guarded=guarded)


def on_cells() -> ModelProto:
    """As SAM's: queries and keys are cells, their bias is a sum over rows and columns."""
    graph = Attention()
    rows, columns = 3, QUERIES // 3
    graph.inputs |= {
        name: [2, QUERIES, HEADS * width]
        for name, width in zip("qkv", (WIDTH, WIDTH, WIDE), strict=True)
    }
    graph.inputs["down"] = [2, HEADS, rows, columns, rows, 1]
    graph.inputs["across"] = [2, HEADS, rows, columns, 1, columns]
    graph.outputs = {"y": [2, QUERIES, HEADS * WIDE]}
    graph.stored["cells"] = np.array([2, HEADS, QUERIES, QUERIES])
    graph.add("Add", ["down", "across"], "sum")
    graph.add("Reshape", ["sum", "cells"], "bias")
    return graph.finish(graph.add("Add", [graph.product(), "bias"], "biased"))


def odd_layout() -> ModelProto:
    """Queries, keys and values with heads in front, and a result that is wanted so."""
    graph = Attention()
    graph.inputs = {
        "q": [N, HEADS, QUERIES, WIDTH],
        "k": [N, HEADS, KEYS, WIDTH],
        "v": [N, HEADS, KEYS, WIDE],
    }
    graph.outputs = {"y": [N, HEADS, QUERIES, WIDE]}
    graph.add("Transpose", ["k"], "k.turned", perm=(0, 1, 3, 2))
    graph.add("MatMul", ["q", "k.turned"], "scores")
    graph.add("Softmax", ["scores"], "weights")
    graph.add("MatMul", ["weights", "v"], "y")
    return graph.model()


FORMS = (
    scaled_queries, scaled_twice, divided_scores, one_bias_for_all, masked, on_cells, odd_layout
)  # fmt: skip


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_a_form_is_rewritten_and_computes_the_same(form: Callable[[], ModelProto]) -> None:
    plain = form()
    rewritten = tiled.tiled(plain)
    kinds = [node.op_type for node in rewritten.graph.node]
    assert kinds.count(OPERATOR) == 1
    assert not {"MatMul", "Softmax"} & set(kinds), "what the operator replaces is left behind"
    assert same_outputs(plain, rewritten) <= LIMIT
    assert [cost.multiply_adds for cost in onnx_graph.costs(rewritten)] == [
        sum(cost.multiply_adds for cost in onnx_graph.costs(plain))
    ]


def test_no_transposition_is_left_where_heads_were_split_and_joined() -> None:
    rewritten = tiled.tiled(scaled_twice())
    assert [node.op_type for node in rewritten.graph.node] == [OPERATOR]


def test_a_sentence_that_is_all_mask_gives_zeros_as_before() -> None:
    def feeds(inputs: dict[str, Any]) -> None:
        inputs["open"][1] = False

    assert same_outputs(masked(), tiled.tiled(masked()), change=feeds) <= LIMIT


@pytest.mark.parametrize(("rows", "parts"), [(1, 3), (2, 2), (3, 1)])
def test_a_bias_on_cells_is_made_in_bands(
    monkeypatch: pytest.MonkeyPatch, rows: int, parts: int
) -> None:
    plain = on_cells()
    row = 4 * 2 * HEADS * (QUERIES // 3) * QUERIES
    monkeypatch.setattr(tiled, "MOST_SCORES", rows * row)
    rewritten = tiled.tiled(plain)
    assert onnx_graph.attentions(rewritten) == parts
    assert same_outputs(plain, rewritten) <= LIMIT
    spent = [sum(cost.multiply_adds for cost in onnx_graph.costs(m)) for m in (plain, rewritten)]
    assert spent[0] == spent[1]


def _scores_are_read_twice(graph: Attention) -> ModelProto:
    graph.outputs["weights"] = [N, HEADS, QUERIES, KEYS]
    return graph.finish(graph.product())


def _two_biases(graph: Attention) -> ModelProto:
    graph.stored["bias"] = np.ones((QUERIES, KEYS), np.float32)
    once = graph.add("Add", [graph.product(), "bias"], "once")
    return graph.finish(graph.add("Add", [once, "bias"], "twice"))


def _a_scaled_bias(graph: Attention) -> ModelProto:
    graph.stored["bias"] = np.ones((QUERIES, KEYS), np.float32)
    biased = graph.add("Add", [graph.product(), "bias"], "biased")
    return graph.finish(graph.add("Mul", [biased, "scale"], "scaled"))


def _softmax_over_queries(graph: Attention) -> ModelProto:
    model = graph.finish(graph.product())
    softmax = next(node for node in model.graph.node if node.op_type == "Softmax")
    softmax.attribute[0].i = 2
    return model


def _one_picture_for_all_sentences(graph: Attention) -> ModelProto:
    graph.inputs["k"] = [1, KEYS, HEADS * WIDTH]
    return graph.finish(graph.product())


def _a_number_that_is_computed(graph: Attention) -> ModelProto:
    graph.inputs["number"] = [1]
    return graph.finish(graph.add("Mul", [graph.product(), "number"], "scaled"))


@pytest.mark.parametrize(
    "other",
    [
        _scores_are_read_twice,
        _two_biases,
        _a_scaled_bias,
        _softmax_over_queries,
        _one_picture_for_all_sentences,
        _a_number_that_is_computed,
    ],
    ids=lambda other: other.__name__,
)
def test_what_the_operator_does_not_fit_stays_as_it_is(
    other: Callable[[Attention], ModelProto],
) -> None:
    plain = other(Attention())
    assert tiled.tiled(plain) == plain


def test_the_checker_knows_the_operator() -> None:
    model = tiled.tiled(scaled_queries())
    node = next(node for node in model.graph.node if node.op_type == OPERATOR)
    node.attribute[0].name = "heads"
    with pytest.raises(PlanError, match="heads"):
        onnx_graph.check(model)


@pytest.fixture(scope="module")
def bundle(traced: Traced, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiled") / "tiny.bundle"
    recipe = ExportRecipe(arch="maris", variant="tiny", target="onnxruntime", out=out)
    return export_bundle(recipe, steps=traced.steps())


def test_a_bundle_says_who_reads_each_graph(traced: Traced, bundle: Path) -> None:
    plain, manifest = Bundle.open(traced.bundle).manifest, Bundle.open(bundle).manifest
    formats = {stage.spec.id: stage.target.format for stage in manifest.stages}
    assert formats.pop("fusion") == "onnx", "its operator is ours, and there is no softmax"
    assert set(formats.values()) == {"onnxruntime"}
    for one, other in zip(plain.stages, manifest.stages, strict=True):
        assert (one.spec, one.operators) == (other.spec, other.operators)
        assert one.multiply_adds == other.multiply_adds
        assert one.target.precision == other.target.precision == "fp32"


def test_a_bundle_is_verified_and_segments(bundle: Path, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "cup.png")
    assert main(["verify", str(bundle)]) == 0
    words = ["--describe", "the cup", "--out", str(tmp_path / "out")]
    assert main(["segment", str(bundle), str(tmp_path / "cup.png"), *words]) == 0
    assert (tmp_path / "out" / "result.json").exists()


@pytest.mark.usefixtures("one_picture")
@pytest.mark.parametrize("stage", ["image_encoder", "decoder"])
def test_the_gate_judges_the_graphs_that_ship(
    traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str
) -> None:
    real = tiled.tiled

    def faulty(model: ModelProto) -> ModelProto:
        made = real(model)
        for node in made.graph.node if made.graph.name == stage else ():
            for entry in node.attribute if node.op_type == OPERATOR else ():
                if entry.name == "scale":
                    entry.f *= 1.05
        return made

    monkeypatch.setattr("rt_ris_export.steps.precision.tiled", faulty)
    out = tmp_path / "a.bundle"
    recipe = ExportRecipe(arch="maris", variant="tiny", target="onnxruntime", out=out)
    with pytest.raises(ParityError) as caught:
        export_bundle(recipe, steps=traced.steps())
    assert caught.value.stage == stage
    assert not out.exists()
