"""``rt-ris import``: what it takes, what it writes, what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from rt_ris.cli import main
from rt_ris_train.architecture import ReferringNetwork, load
from rt_ris_train.checkpoint import load_network
from rt_ris_train.official import expected_shapes


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


def test_another_number_of_tokens_is_refused(tmp_path: Path) -> None:
    from rt_ris.errors import CheckpointError
    from rt_ris_train.checkpoint import save_checkpoint

    network = tiny("etris")
    path = tmp_path / "w.safetensors"
    metadata = {"architecture": "etris", "variant": "tiny", "tokens": "22"}
    save_checkpoint(path, network, metadata=metadata, whole=True)
    with pytest.raises(CheckpointError, match="22 tokens; etris tiny takes 17, and its results"):
        load_network("etris", "tiny", path)
