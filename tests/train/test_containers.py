"""Files in every form that authors publish, read without running what they name."""

from __future__ import annotations

import argparse
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rt_ris.errors import CheckpointError
from rt_ris_train.containers import Pending, loaded, read_tree, tensors_of

LEGACY = {"_use_new_zipfile_serialization": False}
FORMS = pytest.mark.parametrize("form", [{}, LEGACY], ids=["zip", "legacy"])


class Runs:
    """Would make a file if a reader ran it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.mark}",)


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1, bias=False))


def tensors(path: Path, *containers: str) -> dict[str, Tensor]:
    found = tensors_of(read_tree(path), path, containers)
    return {name: loaded(value, name, weights=False) for name, value in found.items()}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


@FORMS
@pytest.mark.parametrize("container", [None, "state_dict", "model", "module"])
def test_a_state_dict_alone_or_in_its_container(
    tmp_path: Path, form: dict[str, Any], container: str | None
) -> None:
    state = module().state_dict()  # an OrderedDict with notes of its own
    path = tmp_path / "weights.pth"
    wrapped = {f"module.{name}": value for name, value in state.items()}
    torch.save(state if container is None else {container: wrapped, "epoch": 3}, path, **form)
    assert_equal(tensors(path), state)


@FORMS
def test_what_a_training_left_beside_the_weights(tmp_path: Path, form: dict[str, Any]) -> None:
    network, mark = module(), tmp_path / "ran"
    optimiser = torch.optim.Adam(network.parameters())
    path = tmp_path / "etris.pth"
    content = {
        "epoch": 7,
        "cur_iou": np.float64(0.5),
        "prec": {"Pr@50": np.float32(0.6)},
        "args": argparse.Namespace(lr=1e-4, hook=Runs(mark)),
        "state_dict": network.state_dict(),
        "optimizer": optimiser.state_dict(),
    }
    torch.save(content, path, **form)
    assert_equal(tensors(path), network.state_dict())
    assert not mark.exists()


@FORMS
def test_two_state_dicts_of_one_file_keep_their_keys_apart(
    tmp_path: Path, form: dict[str, Any]
) -> None:
    path = tmp_path / "dmmi.pth"
    torch.save({"model": {"a": torch.ones(2)}, "bert_model": {"a": torch.zeros(3)}}, path, **form)
    wanted = {"model.a": torch.ones(2), "bert_model.a": torch.zeros(3)}
    assert_equal(tensors(path, "model", "bert_model"), wanted)


def test_a_scripted_archive_in_half_precision(tmp_path: Path) -> None:
    network = module().half()
    path = tmp_path / "clip.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # scripting is deprecated; the files stay
        torch.jit.script(network).save(str(path))
    assert_equal(tensors(path), network.state_dict())


def test_views_parameters_and_scalars(tmp_path: Path) -> None:
    base = torch.arange(12.0)
    state = {"view": base[2:8].reshape(2, 3).T, "half": base[6:], "one": nn.Parameter(base[:1])}
    state |= {"scalar": torch.tensor(5), "none": torch.zeros(0, 4)}
    path = tmp_path / "views.pth"
    torch.save(state, path)
    assert_equal(tensors(path), state)


@FORMS
def test_a_call_among_the_weights_is_refused_and_never_made(
    tmp_path: Path, form: dict[str, Any]
) -> None:
    mark, path = tmp_path / "ran", tmp_path / "hostile.pth"
    torch.save({"state_dict": {"weight": Runs(mark)}}, path, **form)
    with pytest.raises(CheckpointError, match=r"'weight' asks for (posix|nt)\.system"):
        tensors(path)
    assert not mark.exists()


def test_a_file_that_calls_as_it_ends_is_refused(tmp_path: Path) -> None:
    mark, path = tmp_path / "ran", tmp_path / "hostile.pth"
    torch.save(Runs(mark), path)
    with pytest.raises(CheckpointError, match="no state dict"):
        tensors(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html><html>quota exceeded</html>", "It is a web page"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "pointer of git-lfs"),
        (b"", "cannot be read"),
    ],
)
def test_what_downloads_leave_behind_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=said):
        tensors(path)


@FORMS
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.999])
def test_half_a_download_is_refused(tmp_path: Path, form: dict[str, Any], share: float) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.randn(100, 100), "last": torch.randn(50, 50)}, path, **form)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError):
        tensors(path)


def test_half_an_archive_is_called_that(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.zeros(3)}, path)
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(CheckpointError, match=r"end is missing: half a download\?"):
        tensors(path)


def test_numbers_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.tensor([1.0, float("nan")])}, path)
    with pytest.raises(CheckpointError, match="'weight' holds NaN"):
        tensors(path)


def test_sparse_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.eye(3).to_sparse()}, path)
    with pytest.raises(CheckpointError, match=r"'weight' asks for torch\._utils\._rebuild_sparse"):
        tensors(path)


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"weight": torch.ones(3)}, path)
    found = tensors_of(read_tree(path), path)
    assert isinstance(found["weight"], Pending)
