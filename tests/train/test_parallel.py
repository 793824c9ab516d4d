"""Two processes train and evaluate as one: gloo, on the processor."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from rt_ris.cli import main
from rt_ris_train import parallel
from rt_ris_train.data import open_training
from rt_ris_train.loop import Trainer, read_log
from rt_ris_train.parallel import (
    SharedBatchNorm,
    add_gradients,
    processes,
    rank,
    share_of,
    total,
)
from rt_ris_train.recipe import read_recipe

RECIPE = """
arch = "maris"
variant = "tiny"
steps = 5
images = 4
sentences = 2
learning_rate = 1e-3
warmup_steps = 1
grad_clip = 1.0
cache_features = {cache}
bfloat16 = {bfloat16}
validate_every = 5
validate_sentences = 5
[loss]
focal = 1.0
dice = 1.0
cross_entropy = 1.0
"""


def run_two(*words: str) -> str:
    """Run a verb in two processes on one core each; what the first of them printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--standalone", "-m", "rt_ris.cli", *words],
        check=True,
        capture_output=True,
        text=True,
        env=environment,
    )
    return done.stdout


@pytest.mark.parametrize("cache", ["true", "false"], ids=["stored features", "pixels"])
def test_two_processes_have_the_loss_of_one(red_boxes: Path, tmp_path: Path, cache: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(cache=cache, bfloat16="false"))
    alone = Trainer(read_recipe(path), data=open_training([red_boxes]), out=tmp_path / "one")
    alone.network.train()
    losses: list[float] = []
    while alone.step < alone.steps:
        losses.append(alone._one_step(_rows(alone))[0])
    words = ["train", "--recipe", str(path), "--data", str(red_boxes)]
    run_two(*words, "--out", str(tmp_path / "two"))
    (line,) = read_log(tmp_path / "two" / "log.jsonl")
    assert line["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    state = torch.load(tmp_path / "two" / "state.pt", weights_only=True)["network"]
    ours = alone.network.state_dict()
    for name, value in state.items():
        if value.is_floating_point():
            torch.testing.assert_close(value, ours[name], atol=2e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(("arch", "near"), [("maris", 1e-2), ("etris", 0.3)])
def test_in_bfloat16_as_well(red_boxes: Path, tmp_path: Path, arch: str, near: float) -> None:
    """As the published recipes train. Rounding differs with the share, and ETRIS drops at random.

    ETRIS brings what MARIS lacks: batch norms, whose moments are shared.
    """
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(cache="true", bfloat16="true").replace("maris", arch))
    words = ["train", "--recipe", str(path), "--data", str(red_boxes), "--out"]
    assert main([*words, str(tmp_path / "one")]) == 0
    run_two(*words, str(tmp_path / "two"))
    one, two = (read_log(tmp_path / name / "log.jsonl")[0]["loss"] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=near)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_shared_moments_are_those_of_one_batch_norm(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    plain, shared = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    shared.__class__ = SharedBatchNorm
    monkeypatch.setattr(parallel, "_summed", lambda value: value)
    features = (torch.randn(4, 3, 64, 64) + 8).to(dtype)
    expected = plain(features.float())
    found = shared(features)
    assert found.dtype == dtype
    atol = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found.float(), expected, atol=atol, rtol=0)
    torch.testing.assert_close(shared.running_mean, plain.running_mean)
    torch.testing.assert_close(shared.running_var, plain.running_var)


def _rows(trainer: Trainer) -> list[int]:
    from rt_ris_train.draws import rows_of

    return rows_of(trainer.recipe, trainer.train.table, trainer.step)


def test_each_sentence_is_evaluated_once_and_the_numbers_are_the_same(
    red_boxes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from rt_ris_train.architecture import load
    from rt_ris_train.checkpoint import save_checkpoint

    checkpoint = tmp_path / "tiny.safetensors"
    network = load("maris").variant("tiny").build()
    metadata = {"architecture": "maris", "variant": "tiny"}
    save_checkpoint(checkpoint, network, metadata=metadata, whole=True)
    words = ["evaluate", str(checkpoint), "--arch", "maris", "--variant", "tiny"]
    words += ["--data", str(red_boxes), "--split", "val", "--json", "--threads", "1"]
    assert main(words) == 0
    alone = json.loads(capsys.readouterr().out)
    both = json.loads(run_two(*words))
    assert alone["sentences"] == 13  # five pictures for two processes: none is counted twice
    for found in (alone, both):
        del found["cpu_seconds"]
    assert both == alone


def test_alone_nothing_is_shared() -> None:
    assert (rank(), processes()) == (0, 1)
    assert share_of([1, 2, 3]) == [1, 2, 3]
    value = torch.tensor(3.0)
    assert total(value) is value
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    add_gradients([weight])
    assert torch.equal(weight.grad, torch.ones(2))
