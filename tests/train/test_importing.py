"""``rt-ris import``: what it takes, what it writes, what it says."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from rt_ris.cli import main
from rt_ris.errors import CheckpointError
from rt_ris_train.architecture import ReferringNetwork, load
from rt_ris_train.architectures import shared_ris
from rt_ris_train.architectures.shared_ris import TINY, SharedConfig, SharedRis, toy_tokenizer
from rt_ris_train.checkpoint import load_network, save_checkpoint, start_from, trained_state
from rt_ris_train.data import open_training
from rt_ris_train.loop import Trainer
from rt_ris_train.official import check_complete, expected_shapes
from rt_ris_train.recipe import find_recipe, read_recipe


def released(network: ReferringNetwork, label: str, *, seed: int = 0) -> dict[str, Tensor]:
    """Seeded tensors under the published names and shapes."""
    generator = torch.Generator().manual_seed(seed)
    wanted = network.official_keys()[label]
    state = network.state_dict()
    shapes = expected_shapes(wanted, {own: tuple(state[own].shape) for own in wanted.keys})
    return {
        name: torch.rand(shape, generator=generator) * 0.1 + 0.5 for name, shape in shapes.items()
    }


def tiny(arch: str) -> ReferringNetwork:
    return load(arch).variant("tiny").build()


def imported(arch: str, *words: str) -> int:
    return main(["import", "--arch", arch, "--variant", "tiny", *words])


def test_a_fine_tuned_file_becomes_a_whole_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, path, out = tiny("etris"), tmp_path / "best.pth", tmp_path / "etris.safetensors"
    tensors = released(network, "etris") | {"backbone.logit_scale": torch.zeros(())}
    content = {f"module.{name}": value for name, value in tensors.items()}
    torch.save({"state_dict": content, "epoch": 3}, path)
    assert imported("etris", "--from", str(path), "--out", str(out), "--json") == 0
    (file,) = json.loads(capsys.readouterr().out)["files"]
    assert file["label"] == "etris"
    assert file["whole"]
    assert [(d["pattern"], d["tensors"]) for d in file["dropped"]] == [("backbone.logit_scale", 1)]
    loaded = load_network("etris", "tiny", out)
    assert not loaded.seeded
    state = loaded.network.state_dict()
    torch.testing.assert_close(state["proj.txt.weight"], tensors["proj.txt.weight"])
    packed = tensors["neck.fusion3.multihead_attn.in_proj_weight"]
    torch.testing.assert_close(state["neck.fusion3.value.weight"], packed[128:])


def test_encoders_alone_leave_a_head_to_train(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    network, out = tiny("haris"), tmp_path / "haris.safetensors"
    words = []
    for label in ("sam", "clip"):
        path = tmp_path / f"{label}.pth"
        torch.save(released(network, label), path)
        words += ["--from", str(path)]
    assert imported("haris", *words, "--out", str(out)) == 0
    said = capsys.readouterr().out
    assert "sam: " in said
    assert "clip: " in said
    assert "train it" in said
    assert load_network("haris", "tiny", out).seeded
    with safe_open(out, framework="pt") as file:
        assert file.metadata()["contents"] == "whole"
        names = set(file.keys())
    assert "image_encoder.network.pos_embed" in names


def test_a_missing_encoder_of_a_published_size_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["import", "--arch", "dmmi", "--variant", "tiny", "--from", str(tmp_path / "no.pth")]
    assert main([*words, "--out", str(tmp_path / "x")]) == 2
    assert "no weight file" in capsys.readouterr().err


def test_another_variants_file_says_which_one_it_fits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with torch.device("meta"):
        network = load("etris").variant("r50").build()
    wanted = network.official_keys()["clip"]
    state = network.state_dict()
    shapes = expected_shapes(wanted, {own: tuple(state[own].shape) for own in wanted.keys})
    path, out = tmp_path / "rn50.pth", tmp_path / "out.safetensors"
    torch.save({name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}, path)
    words = ["import", "--arch", "etris", "--variant", "tiny", "--from", str(path)]
    assert main([*words, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "missing" in error or "of another shape" in error
    assert "It fits etris --variant r50" in error
    assert not out.exists()


def test_one_tensor_of_another_shape_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = released(tiny("shared_ris"), "beit3")
    tensors["beit3.encoder.layers.1.ffn.B.fc1.weight"] = torch.zeros(3, 64)
    path = tmp_path / "beit3.pth"
    torch.save({"model": tensors}, path)
    assert imported("shared_ris", "--from", str(path), "--out", str(tmp_path / "o")) == 2
    said = capsys.readouterr().err
    assert "layers.1.ffn.B.fc1.weight is (3, 64), expected (256, 64)" in said


def test_a_file_of_something_else_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.pth"
    torch.save({"conv.weight": torch.zeros(2)}, path)
    assert imported("etris", "--from", str(path), "--out", str(tmp_path / "o")) == 2
    assert "No tensor in" in capsys.readouterr().err


def test_the_vocabulary_is_asked_for_and_refused_where_it_has_no_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "w.pth"
    torch.save(released(tiny("etris"), "etris"), path)
    spm = tmp_path / "beit3.spm"
    spm.write_bytes(b"x")
    words = ["--from", str(path), "--out", str(tmp_path / "o"), "--tokenizer", str(spm)]
    assert imported("etris", *words) == 2
    assert "brings its own tokenizer" in capsys.readouterr().err


def test_nothing_is_overwritten_unasked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "w.pth", tmp_path / "out.safetensors"
    torch.save(released(tiny("etris"), "etris"), path)
    out.write_bytes(b"mine")
    assert imported("etris", "--from", str(path), "--out", str(out)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert out.read_bytes() == b"mine"
    assert imported("etris", "--from", str(path), "--out", str(out), "--overwrite") == 0


def test_the_length_of_sentences_is_said_and_stays_with_the_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """No published file tells it, and results depend on it."""
    path, out = tmp_path / "w.pth", tmp_path / "out.safetensors"
    torch.save(released(tiny("etris"), "etris"), path)
    assert imported("etris", "--from", str(path), "--out", str(out)) == 0
    assert "Sentences have 17 tokens, on which results depend" in capsys.readouterr().out
    assert load_network("etris", "tiny", out).network.text.max_tokens == 17
    words = ["--from", str(path), "--out", str(out), "--overwrite", "--json", "--tokens", "22"]
    assert imported("etris", *words) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] == 22
    assert load_network("etris", "tiny", out).network.text.max_tokens == 22


def test_a_network_of_another_length_refuses_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    metadata = {"architecture": "etris", "variant": "tiny"}
    save_checkpoint(path, load("etris").variant("tiny").network(tokens=22), metadata=metadata)
    with pytest.raises(CheckpointError, match="22 tokens; etris tiny takes 17, and its results"):
        start_from(tiny("etris"), path, arch="etris", variant="tiny")


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64], ids=str
)
def test_other_numbers_than_real_ones_are_no_weights(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype
) -> None:
    tensors = released(tiny("etris"), "etris")
    tensors["proj.txt.weight"] = tensors["proj.txt.weight"].to(dtype)
    path, out = tmp_path / "w.pth", tmp_path / "out.safetensors"
    torch.save({"state_dict": tensors}, path)
    assert imported("etris", "--from", str(path), "--out", str(out)) == 2
    said = capsys.readouterr().err
    assert "'proj.txt.weight' is of" in said
    assert "real numbers are expected" in said
    assert not out.exists()


@pytest.fixture
def published_shared(monkeypatch: pytest.MonkeyPatch) -> Callable[[], ReferringNetwork]:
    """Shared-RIS at toy size as a published one: it asks for its file and its vocabulary."""
    config = replace(TINY, tokenizer=None)

    def build(config: SharedConfig, tokens: int = TINY.tokens) -> SharedRis:
        return SharedRis(replace(config, tokens=tokens))

    variant = replace(
        load("shared_ris").variant("tiny"), build=partial(build, config), published=True
    )
    monkeypatch.setitem(shared_ris.ARCHITECTURE.variants, "tiny", variant)  # type: ignore[arg-type]
    return partial(SharedRis, config)


def test_what_was_imported_can_be_trained_and_what_was_trained_used(
    tmp_path: Path, red_boxes: Path, published_shared: Callable[[], ReferringNetwork]
) -> None:
    """A training keeps the vocabulary; all of Shared-RIS trains, so nothing is asked for again."""
    network = published_shared()
    network.use_tokenizer(toy_tokenizer())
    start = tmp_path / "import.safetensors"
    metadata = {"architecture": "shared_ris", "variant": "tiny"}
    save_checkpoint(start, network, metadata=metadata, whole=True)
    recipe = replace(read_recipe(find_recipe("shared-ris-tiny")), steps=1, save_every=1)
    run = Trainer(recipe, data=open_training([red_boxes]), out=tmp_path / "run", init=start)
    trained = load_network("shared_ris", "tiny", run.run())
    assert trained.network.tokenizer_json() == toy_tokenizer()


def test_only_files_whose_weights_stay_frozen_are_asked_for() -> None:
    """DMMI trains its trunk and ten layers of BERT; the rest of BERT is in no checkpoint of it."""
    with torch.device("meta"):
        network = load("dmmi").variant("swin").build()
    filled = trained_state(network).keys()
    with pytest.raises(CheckpointError) as raised:
        check_complete(network, {}, published=True, filled=filled)
    assert raised.value.keys == ("bert",)
    check_complete(network, {"bert"}, published=True, filled=filled)
    with pytest.raises(CheckpointError) as raised:
        check_complete(network, {}, published=True)
    assert set(raised.value.keys) == {"swin", "bert"}


def test_a_vocabulary_of_more_tokens_than_rows_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    small = replace(TINY, tokenizer=None, encoder=replace(TINY.encoder, vocabulary=100))
    with pytest.raises(CheckpointError, match=r"table has 100 rows.*beit3\.spm"):
        SharedRis(small).use_tokenizer(toy_tokenizer())
    SharedRis(replace(TINY, tokenizer=None)).use_tokenizer(toy_tokenizer())
    assert "is it beit3.spm?" in caplog.text
