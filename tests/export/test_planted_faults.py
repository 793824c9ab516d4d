"""Faults planted one by one into an export: each must be caught, with the right stage named.

A fault's size is in its name. Where the whole export runs, ``replay`` stands for the runtime's
replay of the sealed bundle, ``parity`` for the comparison of graphs, ``third party`` for the stored
results of others.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

import rt_ris.image
import rt_ris.mask
from rt_ris.errors import ParityError
from rt_ris.image import Pixels
from rt_ris.manifest import Manifest
from rt_ris.mask import Mask
from rt_ris.predictor import Predictor
from rt_ris_export import ExportRecipe, export_bundle, onnx_graph
from rt_ris_export.artefacts import GRAPHS
from rt_ris_export.step import Context, Kind, Step
from rt_ris_export.steps import STEPS, pack
from rt_ris_export.steps.precision import TYPED
from rt_ris_train.architecture import load

from .conftest import Traced

Edit = Callable[[ModelProto], None]
Patch = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True, kw_only=True)
class Fault:
    """One fault.

    Attributes:
        what: what is wrong, and by how much.
        gate: what must find it.
        stage: that must be named.
        edit: changes the graph of ``graph`` before the gate sees it.
        patch: changes the exporter or the runtime themselves.
        half: asks for a half-precision export.
        typed: the graph is changed after it was narrowed.
        said: what the message must tell.
    """

    what: str
    gate: str
    stage: str
    graph: str = ""
    edit: Edit | None = None
    patch: Patch | None = None
    half: bool = False
    typed: bool = False
    said: str = "No bundle was written|no bundle was written"


def _products(model: ModelProto) -> list[NodeProto]:
    """Matrix products with stored weights."""
    stored = onnx_graph.initialisers(model)
    return [
        node
        for node in model.graph.node
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in stored
    ]


def _stored(model: ModelProto, name: str, change: Callable[[npt.NDArray[Any]], Any]) -> None:
    entry = next(entry for entry in model.graph.initializer if entry.name == name)
    before = numpy_helper.to_array(entry)
    changed = np.asarray(change(before), dtype=before.dtype)
    entry.CopyFrom(numpy_helper.from_array(changed, name))


def _scale_a_block(model: ModelProto) -> None:
    products = _products(model)
    _stored(model, products[len(products) // 2].input[1], lambda weight: weight * 1.05)


def _widen_epsilon(model: ModelProto, *, epsilon: float = 1e-2) -> None:
    norms = [node for node in model.graph.node if node.op_type == "LayerNormalization"]
    entry = next(entry for entry in norms[0].attribute if entry.name == "epsilon")
    assert entry.f < 2e-5
    entry.f = epsilon


def _set_attribute(name: str, value: float) -> Edit:
    def edit(model: ModelProto) -> None:
        (entry,) = (
            entry for entry in onnx_graph.custom_nodes(model)[0].attribute if entry.name == name
        )
        assert entry.f != value
        entry.f = value

    return edit


def _sum_out_of_range(model: ModelProto) -> None:
    """Scaled up and down by powers of two, so that float32 shows nothing."""
    constants = {
        node.output[0]: node for node in model.functions[0].node if node.op_type == "Constant"
    }
    for name, power in (("smaller_32", 16), ("larger_32", -16)):
        constants[name].attribute[0].f = 2.0**power


def _insert(model: ModelProto, tensor: str, made: list[NodeProto]) -> None:
    """Nodes that turn an input into ``<tensor>.faulty``, which everything else reads instead."""
    for node in model.graph.node:
        for index, name in enumerate(node.input):
            if name == tensor:
                node.input[index] = f"{tensor}.faulty"
    nodes = [*made, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _drop_padding_mask(model: ModelProto) -> None:
    mask, padded = "token_mask", "token_mask.padded"
    made = [
        helper.make_node("Not", [mask], [padded], name="not"),
        helper.make_node("Or", [mask, padded], [f"{mask}.faulty"], name="all"),
    ]
    _insert(model, mask, made)


def _between(model: ModelProto, tensor: str, operator: str, constant: npt.NDArray[Any]) -> None:
    """Everything reads an input through one more operator with a constant."""
    other, faulty = f"{tensor}.constant", f"{tensor}.faulty"
    model.graph.initializer.append(numpy_helper.from_array(constant, other))
    _insert(model, tensor, [helper.make_node(operator, [tensor, other], [faulty], name=faulty)])


def _ignore_border_on_the_right(model: ModelProto) -> None:
    _between(model, "valid_box", "Max", np.array([[0, 0, 0, 128]], np.int32))


def _drop_late_words(model: ModelProto) -> None:
    words = next(value for value in model.graph.input if value.name == "token_mask")
    most = words.type.tensor_type.shape.dim[1].dim_value
    _between(model, "token_mask", "And", np.arange(most)[None] < 10)


def _drop_words_of_the_fourth(model: ModelProto) -> None:
    """From the fourth sentence of a call on, no word counts."""
    mask = "token_mask"
    for name, values in {"zero": 0, "four": 4, "last": [1], "one": [[1]]}.items():
        stored = numpy_helper.from_array(np.array(values, np.int64), name)
        model.graph.initializer.append(stored)
    made = [
        helper.make_node("Shape", [mask], ["n"], name="n", start=0, end=1),
        helper.make_node("Concat", ["n", "last"], ["n_1"], name="n_1", axis=0),
        helper.make_node("Expand", ["one", "n_1"], ["ones"], name="ones"),
        helper.make_node("CumSum", ["ones", "zero"], ["place"], name="place"),
        helper.make_node("Less", ["place", "four"], ["early"], name="early"),
        helper.make_node("And", [mask, "early"], [f"{mask}.faulty"], name="faulty"),
    ]
    _insert(model, mask, made)


def _spoil_rare_words(model: ModelProto) -> None:
    """Rows of the vocabulary that no sentence of the gate reads."""
    table = next(entry for entry in model.graph.initializer if entry.dims[:1] == [49408])
    rows = slice(20_000, 20_010)

    def change(weight: npt.NDArray[Any]) -> npt.NDArray[Any]:
        changed = weight.copy()
        changed[rows] *= -3.0
        return changed

    _stored(model, table.name, change)


def _halve_moments(model: ModelProto) -> None:
    for node in model.graph.node:
        if node.op_type == "LayerNormalization":
            kept = [entry for entry in node.attribute if entry.name != "stash_type"]
            del node.attribute[:]
            node.attribute.extend([*kept, helper.make_attribute("stash_type", TensorProto.FLOAT16)])


def _append(model: ModelProto, output: str, operator: str, *, constant: npt.NDArray[Any]) -> None:
    """Put one more node between an output and what made it."""
    for node in model.graph.node:
        for names in (node.output, node.input):
            for index in (index for index, other in enumerate(names) if other == output):
                names[index] = f"{output}.right"
    model.graph.initializer.append(numpy_helper.from_array(constant, f"{output}.constant"))
    inputs = [f"{output}.right", f"{output}.constant"]
    model.graph.node.append(helper.make_node(operator, inputs, [output], name="faulty"))


def _shift_one_logit(model: ModelProto) -> None:
    shift = np.zeros((1, 32, 32), dtype=np.float32)
    shift[0, 5, 7] = 0.5
    _append(model, "logits", "Add", constant=shift)


def _negate_logits(model: ModelProto) -> None:
    _append(model, "logits", "Mul", constant=np.array(-1.0, dtype=np.float32))


def _turn_cells(model: ModelProto) -> None:
    """f_lav [N, P, C] with its P = 8 x 8 cells in column order."""
    for node in model.graph.node:
        for index, name in enumerate(node.output):
            if name == "f_lav":
                node.output[index] = "f_lav.right"
    order = np.arange(64).reshape(8, 8).T.reshape(-1)
    model.graph.initializer.append(numpy_helper.from_array(order, "order"))
    model.graph.node.append(
        helper.make_node("Gather", ["f_lav.right", "order"], ["f_lav"], name="turn", axis=1)
    )


def _in_manifest(part: str, change: Callable[[Any], Any]) -> Patch:
    """A manifest that says something else than the network that was measured."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = pack.draft_manifest

        def wrong(*args: Any, **named: Any) -> Manifest:
            manifest = right(*args, **named)
            return replace(manifest, **{part: change(getattr(manifest, part))})

        monkeypatch.setattr(pack, "draft_manifest", wrong)

    return patch


def _member(name: str, change: Callable[[bytes], bytes]) -> Patch:
    """Other bytes are sealed than were measured."""

    def patch(monkeypatch: pytest.MonkeyPatch) -> None:
        right = pack.write_bundle

        def wrong(path: Path, *, manifest: Manifest, members: dict[str, Any]) -> Any:
            source = members[name]
            raw = source if isinstance(source, bytes) else source.read_bytes()
            return right(path, manifest=manifest, members={**members, name: change(raw)})

        monkeypatch.setattr(pack, "write_bundle", wrong)

    return patch


def _other_tokenizer(_: bytes) -> bytes:
    return load("haris").variant("tiny").build().tokenizer_json().replace("</w>", "").encode()


def _swap_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rt_ris.image._resize

    def wrong(*args: Any) -> Pixels:
        return np.ascontiguousarray(right(*args)[..., ::-1])

    monkeypatch.setattr(rt_ris.image, "_resize", wrong)


def _swap_channels_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rt_ris.image._decode

    def wrong(*args: Any, **named: Any) -> Pixels:
        return np.ascontiguousarray(right(*args, **named)[..., ::-1])

    monkeypatch.setattr(rt_ris.image, "_decode", wrong)


def _other_filter(monkeypatch: pytest.MonkeyPatch) -> None:
    filters = rt_ris.image._FILTERS
    monkeypatch.setattr(rt_ris.image, "_FILTERS", {**filters, "bilinear": filters["bicubic"]})


def _round_down(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(length: int, side: int, longest: int) -> int:
        return max(1, length * side // longest)

    monkeypatch.setattr(rt_ris.image, "_scaled", wrong)


def _turn_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Mask.binary.func
    monkeypatch.setattr(Mask, "binary", property(lambda mask: ~right(mask)))


def _other_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    right = rt_ris.mask.logit
    monkeypatch.setattr(rt_ris.mask, "logit", lambda threshold: right(threshold) + 0.1)


def _perturb(raw: bytes) -> bytes:
    model = onnx_graph.parse(raw)
    _scale_a_block(model)
    return onnx_graph.serialise(model).graph


FAULTS = (
    Fault(
        what="the weight of one product in the middle of the image encoder x 1.05",
        gate="parity",
        stage="image_encoder",
        graph="image_encoder",
        edit=_scale_a_block,
    ),
    Fault(
        what="the epsilon of the text encoder's first norm 1e-5 -> 1e-2",
        gate="parity",
        stage="text_encoder",
        graph="text_encoder",
        edit=_widen_epsilon,
    ),
    Fault(
        what="A^T Z_v of mutual attention summed 2^16 times too large, then scaled back",
        gate="parity",
        stage="fusion",
        graph="fusion",
        edit=_sum_out_of_range,
        half=True,
        said=r"left the range of float16 first in '\S*sum_small",
    ),
    Fault(
        what="one product of the image encoder x 1.05 in its half-precision graph alone",
        gate="parity",
        stage="image_encoder",
        graph="image_encoder",
        edit=_scale_a_block,
        half=True,
        typed=True,
        said="than its float32 graph, rounded",
    ),
    Fault(
        what="the epsilon of the text encoder's first norm 1e-5 -> 1e-4 in half precision alone",
        gate="parity",
        stage="text_encoder",
        graph="text_encoder",
        edit=partial(_widen_epsilon, epsilon=1e-4),
        half=True,
        typed=True,
    ),
    Fault(
        what="moments of the text encoder's norms in half precision",
        gate="parity",
        stage="text_encoder",
        graph="text_encoder",
        edit=_halve_moments,
        half=True,
        typed=True,
        said="takes its moments in half precision",
    ),
    Fault(
        what="ten rows of the vocabulary that no sentence of the gate reads x -3",
        gate="parity",
        stage="text_encoder",
        graph="text_encoder",
        edit=_spoil_rare_words,
        said="other values of .* than the network",
    ),
    Fault(
        what="the same ten rows in half precision alone",
        gate="parity",
        stage="text_encoder",
        graph="text_encoder",
        edit=_spoil_rare_words,
        half=True,
        typed=True,
        said="than its float32 graph, rounded",
    ),
    Fault(
        what="the border on the right of pictures in portrait format ignored",
        gate="parity",
        stage="image_encoder",
        graph="image_encoder",
        edit=_ignore_border_on_the_right,
    ),
    Fault(
        what="words from the eleventh token on dropped",
        gate="parity",
        stage="fusion",
        graph="fusion",
        edit=_drop_late_words,
    ),
    Fault(
        what="words of the fourth sentence of a call and of later ones dropped",
        gate="parity",
        stage="fusion",
        graph="fusion",
        edit=_drop_words_of_the_fourth,
        half=True,
    ),
    Fault(
        what="the threshold of mutual attention 0.5 -> 0.6",
        gate="parity",
        stage="fusion",
        graph="fusion",
        edit=_set_attribute("threshold", 0.6),
    ),
    Fault(
        what="padding mask dropped: every token counts as real",
        gate="parity",
        stage="fusion",
        graph="fusion",
        edit=_drop_padding_mask,
    ),
    Fault(
        what="the cells of fusion's f_lav in column order",
        gate="parity",
        stage="fusion",
        graph="fusion",
        edit=_turn_cells,
    ),
    Fault(
        what="one logit of 1,024 shifted by 0.5",
        gate="parity",
        stage="decoder",
        graph="decoder",
        edit=_shift_one_logit,
    ),
    Fault(
        what="mask polarity: logits negated",
        gate="parity",
        stage="decoder",
        graph="decoder",
        edit=_negate_logits,
    ),
    Fault(
        what="RGB swapped in the manifest: mean and std in BGR order",
        gate="replay",
        stage="manifest",
        patch=_in_manifest("image", lambda spec: replace(spec, mean=spec.mean[::-1])),
    ),
    Fault(
        what="resize rule in the manifest: longest_side -> stretch",
        gate="replay",
        stage="manifest",
        patch=_in_manifest("image", lambda spec: replace(spec, fit="stretch")),
    ),
    Fault(
        what="threshold in the manifest 0.5 -> 0.55",
        gate="replay",
        stage="manifest",
        patch=_in_manifest("mask", lambda spec: replace(spec, threshold=0.55)),
    ),
    Fault(
        what="sentences cut to 16 tokens in place of 17 by the manifest",
        gate="replay",
        stage="manifest",
        patch=_in_manifest("text", lambda spec: replace(spec, max_tokens=16)),
    ),
    Fault(
        what="tokenizer of another model sealed",
        gate="replay",
        stage="tokenizer",
        patch=_member("tokenizer.json", _other_tokenizer),
    ),
    Fault(
        what="a graph sealed that is not the one measured: one product x 1.05",
        gate="replay",
        stage="fusion",
        patch=_member("fusion.onnx", _perturb),
    ),
    *(
        Fault(
            what=f"a graph of half precision sealed that is not the one measured: {stage} x 1.05",
            gate="replay",
            stage=stage,
            patch=_member(f"{stage}.onnx", _perturb),
            half=True,
        )
        for stage in ("image_encoder", "text_encoder", "fusion", "decoder")
    ),
    Fault(
        what="RGB swapped where rt_ris.image resizes",
        gate="third party",
        stage="prepare",
        patch=_swap_channels,
    ),
    Fault(
        what="RGB swapped where rt_ris.image reads files",
        gate="third party",
        stage="prepare",
        patch=_swap_channels_of_files,
    ),
    Fault(
        what="rt_ris.image resizes bicubically where bilinear is asked for",
        gate="third party",
        stage="prepare",
        patch=_other_filter,
    ),
    Fault(
        what="rt_ris.image rounds sides down: one row of pixels less",
        gate="third party",
        stage="prepare",
        patch=_round_down,
    ),
    Fault(
        what="mask polarity turned in rt_ris.mask",
        gate="third party",
        stage="mask",
        patch=_turn_masks,
    ),
    Fault(
        what="threshold moved by 0.1 logits in rt_ris.mask",
        gate="third party",
        stage="mask",
        patch=_other_threshold,
    ),
)


def _planted(
    steps: tuple[Step, ...], graph: str, edit: Edit, *, typed: bool = False
) -> tuple[Step, ...]:
    """The table with a step that spoils one graph, before or after it is narrowed."""
    kind: Kind[Any] = TYPED if typed else GRAPHS

    def spoil(context: Context) -> None:
        made = context.artefacts.get(kind)
        path = (made.files if typed else made)[graph]
        model = onnx_graph.parse(path.read_bytes())
        edit(model)
        onnx_graph.check(model)
        path.write_bytes(onnx_graph.serialise(model).graph)
        context.artefacts.put(kind, made)

    step = Step(name="spoil", needs=(kind,), makes=(kind,), run=spoil)
    before = "precision" if typed else "function"
    behind = next(index for index, other in enumerate(steps) if other.name == before) + 1
    return (*steps[:behind], step, *steps[behind:])


@pytest.mark.usefixtures("one_picture")
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_a_planted_fault_is_caught(
    fault: Fault, traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = traced.steps()
    if fault.edit is not None:
        steps = _planted(steps, fault.graph, fault.edit, typed=fault.typed)
    if fault.patch is not None:
        fault.patch(monkeypatch)
    reached: list[str] = []
    recipe = ExportRecipe(
        arch="maris",
        variant="tiny",
        out=tmp_path / "faulty.bundle",
        precision="fp16" if fault.half else "fp32",
    )
    with pytest.raises(ParityError, match=fault.said) as caught:
        export_bundle(recipe, steps=steps, progress=lambda news: reached.append(news.step))
    assert caught.value.stage == fault.stage
    assert caught.value.exit_code == 1
    assert reached[-1] == ("replay" if fault.gate == "replay" else "parity")
    assert ("third" in fault.gate) == ("Mend it" in str(caught.value))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("one_picture")
def test_without_a_fault_the_same_export_passes(traced: Traced, tmp_path: Path) -> None:
    for precision in ("fp32", "fp16"):
        out = tmp_path / f"{precision}.bundle"
        recipe = ExportRecipe(arch="maris", variant="tiny", out=out, precision=precision)  # type: ignore[arg-type]
        Predictor.load(export_bundle(recipe, steps=traced.steps())).close()


@pytest.mark.usefixtures("one_picture")
def test_outputs_that_change_places_are_caught(tmp_path: Path) -> None:
    """HARIS's image encoder gives two feature maps of one shape; their names are swapped."""

    def swap(model: ModelProto) -> None:
        places = {"half2": "half3", "half3": "half2"}
        for node in model.graph.node:
            for names in (node.output, node.input):
                for index, name in enumerate(names):
                    names[index] = places.get(name, name)

    recipe = ExportRecipe(arch="haris", variant="tiny", out=tmp_path / "faulty.bundle")
    with pytest.raises(ParityError, match="of 'half2'") as caught:
        export_bundle(recipe, steps=_planted(STEPS, "image_encoder", swap))
    assert caught.value.stage == "image_encoder"
    assert list(tmp_path.iterdir()) == []
