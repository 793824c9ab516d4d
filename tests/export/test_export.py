"""From the command to the bundle, and everything that must leave nothing behind."""

from __future__ import annotations

import errno
import io
import re
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from rt_ris.build.replay import replay
from rt_ris.bundle import Bundle, write_bundle
from rt_ris.errors import (
    CheckpointError,
    IntegrityError,
    OutputError,
    ParityError,
    RecipeError,
    RtRisError,
    StorageError,
)
from rt_ris.manifest import GOLDEN, PARITY
from rt_ris.predictor import Predictor
from rt_ris.records import to_json
from rt_ris_export import ExportRecipe, export_bundle, onnx_graph
from rt_ris_export.gate_data import shipped_samples
from rt_ris_export.golden import STORED
from rt_ris_export.limits import LIMITS
from rt_ris_export.parity_record import read_record
from rt_ris_export.steps import trace
from rt_ris_kernels.ops import find
from rt_ris_train.checkpoint import metadata_of, save_checkpoint

from .conftest import Traced


def _recipe(out: Path, **changed: object) -> ExportRecipe:
    return replace(ExportRecipe(arch="maris", variant="tiny", out=out), **changed)  # type: ignore[arg-type]


def test_graphs_hold_what_their_architecture_declares(traced: Traced) -> None:
    for stage in traced.network.stages():
        model = onnx_graph.parse(traced.graphs[stage.spec.id])
        onnx_graph.check_interface(model, stage.spec)
        onnx_graph.check(model)
        assert onnx_graph.opset(model) == trace.OPSET


def test_mutual_attention_is_one_node_with_every_attribute(traced: Traced) -> None:
    nodes = onnx_graph.custom_nodes(onnx_graph.parse(traced.graphs["fusion"]))
    assert [node.op_type for node in nodes] == ["MaskedMutualAttention"] * 2
    kernel = find("rt_ris", "MaskedMutualAttention")
    assert kernel is not None
    assert all(onnx_graph.attribute_names(node) == set(kernel.node_attributes) for node in nodes)


def test_graphs_name_no_file_of_this_machine(traced: Traced) -> None:
    for raw in traced.graphs.values():
        assert b"site-packages" not in raw
        assert str(Path(__file__).parents[2]).encode() not in raw


def test_nodes_name_their_module_and_its_source(traced: Traced) -> None:
    source = re.compile(r"/node_\S+ \w+/[\w/]+\.py:\d+$")
    for raw in traced.graphs.values():
        names = [node.name for node in onnx_graph.parse(raw).graph.node]
        assert len(set(names)) == len(names)
        assert sum(bool(source.search(name)) for name in names) > 0.9 * len(names)
    names = [node.name for node in onnx_graph.parse(traced.graphs["image_encoder"]).graph.node]
    block = re.compile(r"encoder\.network\.blocks\.2\.norm1/\S+ rt_ris_train/\S+:\d+$")
    assert any(map(block.match, names))


def test_manifest_counts_and_provenance(traced: Traced) -> None:
    manifest = Bundle.open(traced.bundle).manifest
    assert manifest.graph() == traced.network.graph()
    assert {stage.spec.id: dict(stage.operators or {}) for stage in manifest.stages} == {
        "image_encoder": {},
        "text_encoder": {},
        "fusion": {"rt_ris::MaskedMutualAttention": (32,)},
        "decoder": {},
    }
    assert all(stage.multiply_adds > 0 and stage.parameters > 0 for stage in manifest.stages)
    assert manifest.provenance.licences["head"] == "seeded random weights, not trained"
    assert manifest.provenance.checkpoint_sha256 is None
    assert manifest.provenance.libraries["torch"]


def test_golden_vectors_replay(traced: Traced) -> None:
    content = np.load(io.BytesIO(Bundle.open(traced.bundle).read(GOLDEN)), allow_pickle=False)
    with Predictor.load(traced.bundle) as predictor:
        for number, sample in enumerate(shipped_samples()):
            np.testing.assert_array_equal(content[f"{number}/picture"], sample.picture)
            sentences = content[f"{number}/sentences"].tolist()
            assert sentences == list(sample.sentences)
            features = predictor.encode_image(content[f"{number}/picture"])
            found = predictor.session.segment(features, predictor.encode_text(sentences))
            np.testing.assert_allclose(found.logits, content[f"{number}/logits"], atol=1e-4)
    outer = {"picture", "sentences", *STORED} - {"existence"}
    assert {name[2:] for name in content.files if name.startswith("1/")} == outer
    inner = {name[2:] for name in content.files if name.startswith("0/")} - outer
    assert inner == {"z_v", "z_l", "f_lav", "f_val"}


def test_a_resealed_bundle_whose_sentences_are_all_tied_fails(
    traced: Traced, tmp_path: Path
) -> None:
    """Nothing that its record says about ties lets a bundle pass with another text encoder."""
    bundle = Bundle.open(traced.bundle)
    with np.load(io.BytesIO(bundle.read(GOLDEN)), allow_pickle=False) as stored:
        arrays = {name: stored[name] for name in stored.files}
    arrays["0/z_l"] = arrays["0/z_l"] * np.float32(3)
    stream = io.BytesIO()
    np.savez(stream, **arrays)  # type: ignore[arg-type]
    record = read_record(traced.bundle)
    tied = replace(record, masks=tuple(replace(mask, tied=True) for mask in record.masks))
    members: dict[str, bytes | Path] = {name: bundle.read(name) for name in bundle.manifest.members}
    members |= {GOLDEN: stream.getvalue(), PARITY: to_json(tied)}
    manifest = replace(bundle.manifest, members={})
    resealed = write_bundle(tmp_path / "resealed.bundle", manifest=manifest, members=members)
    with Predictor.load(resealed.path) as predictor:
        found = replay(resealed, predictor)
    assert found.first_miss is not None
    assert (found.first_miss.step, found.first_miss.name) == ("text_encoder", "z_l")


@pytest.mark.usefixtures("one_picture")
@pytest.mark.parametrize("stage", ["image_encoder", "text_encoder", "fusion", "decoder"])
def test_a_wrong_weight_is_found_and_named(traced: Traced, tmp_path: Path, stage: str) -> None:
    steps = traced.steps(**{stage: traced.perturbed(stage)})
    with pytest.raises(ParityError, match=f"Stage '{stage}' differs from PyTorch") as caught:
        export_bundle(_recipe(tmp_path / "a.bundle"), steps=steps)
    assert caught.value.stage == stage
    assert caught.value.error > 1e-4
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("one_picture")
@pytest.mark.usefixtures("one_picture")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_labels_of_the_shipped_pictures_are_compared(
    traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    """The cat is labelled and asked in both calls; weights said to be trained are judged."""
    trained = replace(traced, loaded=replace(traced.loaded, seeded=False))
    recipe = _recipe(tmp_path / "bundle", precision=precision)
    labels = read_record(export_bundle(recipe, steps=trained.steps())).labels
    assert labels is not None
    assert (labels.sentences, labels.limit) == (2, {"fp32": 0.1, "fp16": 0.5}[precision])
    assert labels.trained > 1
    assert abs(labels.exported - labels.trained) <= labels.limit
    assert read_record(traced.bundle).labels is None
    strict = {name: replace(limits, oiou=-1.0) for name, limits in LIMITS.items()}
    monkeypatch.setattr("rt_ris_export.recipe.LIMITS", strict)
    with pytest.raises(ParityError, match="oIoU on 2 labelled sentences changes from"):
        export_bundle(replace(recipe, out=tmp_path / "other"), steps=trained.steps())
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_a_wrong_weight_leaves_an_older_bundle_alone(traced: Traced, tmp_path: Path) -> None:
    out = tmp_path / "a.bundle"
    export_bundle(_recipe(out), steps=traced.steps())
    before = Bundle.open(out).sha256
    steps = traced.steps(decoder=traced.perturbed("decoder"))
    with pytest.raises(ParityError):
        export_bundle(_recipe(out, overwrite=True), steps=steps)
    assert Bundle.open(out).sha256 == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.bundle"]


class _FullDisk(io.FileIO):
    """A file on a disk with room for 10,000 bytes."""

    def write(self, content: object) -> int:
        assert isinstance(content, bytes)
        if self.tell() + len(content) > 10_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return super().write(content)


@pytest.mark.usefixtures("one_picture")
@pytest.mark.parametrize("suffix", [".export", ".partial"])
def test_a_full_disk_leaves_nothing(
    traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    real = Path.open

    def limited(path: Path, mode: str = "r", **options: Any) -> IO[Any]:  # noqa: ANN401
        if "r" not in mode and path.parent.suffix == suffix:
            return _FullDisk(path, mode.replace("b", ""))
        return real(path, mode, **options)

    monkeypatch.setattr(Path, "open", limited)
    with pytest.raises(StorageError, match="the disk is full"):
        export_bundle(_recipe(tmp_path / "a.bundle"), steps=traced.steps())
    assert not list(tmp_path.iterdir())


def test_an_interruption_leaves_nothing(
    traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("rt_ris_export.steps.parity.measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(_recipe(tmp_path / "a.bundle"), steps=traced.steps())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("changed", "kind", "sentence"),
    [
        ({"arch": "mars"}, RecipeError, "There is no architecture 'mars'; there are .*maris"),
        ({"variant": "huge"}, RecipeError, "maris has no variant 'huge'; it has"),
        ({"checkpoint": Path("no.safetensors")}, CheckpointError, "no checkpoint file"),
        ({"weights": {"sam": Path("no.pth")}}, CheckpointError, "no weight file 'no.pth'"),
        ({"weights": {"bert": Path("no.pth")}}, CheckpointError, "no weight file 'bert'"),
    ],
)
def test_wrong_names_are_refused(
    tmp_path: Path, changed: dict[str, object], kind: type[RtRisError], sentence: str
) -> None:
    with pytest.raises(kind, match=sentence):
        export_bundle(_recipe(tmp_path / "a.bundle", **changed))
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_another_network_is_refused(traced: Traced, tmp_path: Path) -> None:
    path = tmp_path / "lite.safetensors"
    said = metadata_of(architecture="maris", variant="lite", step=1, recipe={})
    save_checkpoint(path, traced.network, metadata=said)
    with pytest.raises(CheckpointError, match="is a checkpoint of maris lite; maris tiny was"):
        export_bundle(_recipe(tmp_path / "a.bundle", checkpoint=path))
    assert [entry.name for entry in tmp_path.iterdir()] == ["lite.safetensors"]


@pytest.mark.usefixtures("one_picture")
def test_an_existing_output_is_refused_before_any_work(traced: Traced, tmp_path: Path) -> None:
    out = tmp_path / "a.bundle"
    out.mkdir()
    with pytest.raises(OutputError, match="is not a bundle; it is left alone"):
        export_bundle(_recipe(out))
    with pytest.raises(OutputError, match="is not a bundle; it is left alone"):
        export_bundle(_recipe(out, overwrite=True), steps=traced.steps())
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.usefixtures("one_picture")
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_graph_beyond_one_file_has_its_weights_in_a_second(
    precision: str, traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SAM ViT-H in float32, 2.4 GiB; here the limit is made small instead."""
    monkeypatch.setattr(onnx_graph, "MAX_BYTES", 100 << 10)
    monkeypatch.setattr(onnx_graph, "_SET_ASIDE", 1 << 10)
    recipe = _recipe(tmp_path / "large.bundle", precision=precision)
    bundle = Bundle.open(export_bundle(recipe, steps=traced.steps()))
    second = {name for name in bundle.manifest.members if name.endswith(".data")}
    assert second >= {"image_encoder.onnx.data", "text_encoder.onnx.data"}
    assert second <= set(bundle.manifest.needed())
    whole = onnx_graph.parse(traced.graphs["image_encoder"])
    found = onnx_graph.load(bundle.path / "image_encoder.onnx")
    if precision == "fp32":
        assert found == whole
    moved = bundle.path.rename(tmp_path / "elsewhere.bundle")
    with Predictor.load(moved) as predictor:
        assert replay(Bundle.open(moved), predictor).first_miss is None
    (moved / "image_encoder.onnx.data").unlink()
    with pytest.raises(IntegrityError, match=r"lacks 'image_encoder\.onnx\.data'"):
        Predictor.load(moved)
