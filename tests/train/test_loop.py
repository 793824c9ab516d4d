from __future__ import annotations

import errno
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional

from rt_ris.cli import main
from rt_ris.errors import CheckpointError, DataError, OutputError, RecipeError, StorageError
from rt_ris_train import draws
from rt_ris_train.architecture import load
from rt_ris_train.checkpoint import (
    SEEDED_HEAD,
    load_network,
    save_checkpoint,
    trained_state,
    write_atomically,
)
from rt_ris_train.data import open_training
from rt_ris_train.data.features import SplitTable, target_grid
from rt_ris_train.draws import rows_of, steps_per_epoch, validation_rows
from rt_ris_train.loop import Report, Trainer, _optimizer, learning_rate, read_log
from rt_ris_train.losses import LossWeights, total_loss
from rt_ris_train.recipe import TrainRecipe, find_recipe, read_recipe, shipped_recipes
from rt_ris_train.runner import predictor_of

RECIPE = TrainRecipe(
    arch="maris",
    variant="tiny",
    steps=6,
    images=2,
    sentences=2,
    learning_rate=1e-3,
    warmup_steps=2,
    loss=LossWeights(focal=1.0, dice=1.0, cross_entropy=1.0),
    save_every=2,
    validate_every=3,
    validate_sentences=5,
)

OPENCV = [
    [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 120, 120, 120, 0, 0, 0, 0, 0, 0],
    [0, 0, 0, 239, 255, 255, 255, 255, 255, 239, 0, 0, 0, 0],
    [0, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0],
    [0, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0],
    [0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0],
    [0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0],
    [0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0],
    [0, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0],
    [0, 0, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0],
    [0, 0, 0, 255, 255, 255, 255, 255, 255, 255, 0, 0, 0, 0],
    [0, 0, 0, 0, 0, 239, 239, 239, 0, 0, 0, 0, 0, 0],
]


class Killed(Exception):
    """Stands for a kill in the middle of a run."""


def kill_at(step: int) -> object:
    def report(said: Report) -> None:
        if said.step >= step:
            raise Killed

    return report


def test_a_killed_run_ends_as_an_unbroken_one(red_boxes: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    whole = Trainer(RECIPE, data=open_training([red_boxes]), out=tmp_path / "whole", cache=cache)
    whole.run()
    broken = Trainer(RECIPE, data=open_training([red_boxes]), out=tmp_path / "broken", cache=cache)
    with pytest.raises(Killed):
        broken.run(kill_at(3))  # type: ignore[arg-type]
    resumed = Trainer(RECIPE, data=open_training([red_boxes]), out=tmp_path / "broken", cache=cache)
    assert resumed.step == 2  # the last multiple of save_every
    resumed.run()
    expected = trained_state(whole.network)
    found = trained_state(resumed.network)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-4, atol=1e-5)
    assert [line["step"] for line in read_log(tmp_path / "broken" / "log.jsonl")] == [3, 6]


def test_training_lowers_the_loss(red_boxes: Path, tmp_path: Path) -> None:
    said: list[Report] = []
    recipe = replace(RECIPE, steps=60, validate_every=60, learning_rate=3e-3)
    Trainer(recipe, data=open_training([red_boxes]), out=tmp_path / "run").run(said.append)
    assert said[-1].loss < 0.8 * said[0].loss


def test_a_checkpoint_holds_what_was_trained_and_nothing_frozen(
    red_boxes: Path, tmp_path: Path
) -> None:
    run = Trainer(RECIPE, data=open_training([red_boxes]), out=tmp_path / "run")
    path = run.run()
    loaded = load_network("maris", "tiny", path)
    assert not loaded.seeded
    assert loaded.metadata["step"] == "6"
    names = set(trained_state(loaded.network))
    assert not any("encoder." in name for name in names)
    for name, tensor in trained_state(run.network).items():
        torch.testing.assert_close(trained_state(loaded.network)[name], tensor)


def test_another_variant_refuses_the_checkpoint(red_boxes: Path, tmp_path: Path) -> None:
    path = Trainer(RECIPE, data=open_training([red_boxes]), out=tmp_path / "run").run()
    with pytest.raises(CheckpointError, match="checkpoint of maris tiny; maris lite") as raised:
        load_network("maris", "lite", path)
    assert raised.value.keys


def test_a_folder_keeps_to_its_recipe(red_boxes: Path, tmp_path: Path) -> None:
    Trainer(RECIPE, data=open_training([red_boxes]), out=tmp_path / "run")
    with pytest.raises(RecipeError, match="another recipe"):
        Trainer(replace(RECIPE, seed=1), data=open_training([red_boxes]), out=tmp_path / "run")


def test_nothing_is_written_where_the_data_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError):
        Trainer(RECIPE, data=open_training([tmp_path / "no-data"]), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "damage",
    [lambda whole: whole[:100], lambda whole: bytes(reversed(whole[:100])), lambda _: b""],
    ids=["cut", "garbled", "empty"],
)
def test_a_damaged_state_is_named(
    red_boxes: Path, tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    out = tmp_path / "run"
    Trainer(RECIPE, data=open_training([red_boxes]), out=out).run()
    (out / "state.pt").write_bytes(damage((out / "state.pt").read_bytes()))
    with pytest.raises(CheckpointError, match="cannot be resumed"):
        Trainer(RECIPE, data=open_training([red_boxes]), out=out)


def test_stored_and_computed_features_train_alike(red_boxes: Path, tmp_path: Path) -> None:
    said: dict[bool, list[Report]] = {True: [], False: []}
    for stored, reports in said.items():
        recipe = replace(RECIPE, cache_features=stored)
        Trainer(recipe, data=open_training([red_boxes]), out=tmp_path / str(stored)).run(
            reports.append
        )
    for first, second in zip(said[True], said[False], strict=True):
        assert first.loss == pytest.approx(second.loss, rel=1e-2)  # stored in half precision


def test_a_torn_line_of_the_log_is_passed_over(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert [line["step"] for line in read_log(log)] == [1]


def test_a_folder_that_cannot_be_made_is_named(red_boxes: Path, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file, not a folder")
    with pytest.raises(OutputError, match="cannot be made"):
        Trainer(RECIPE, data=open_training([red_boxes]), out=tmp_path / "run")


def test_a_full_disk_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.pt"
    write_atomically(path, b"old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [item.name for item in tmp_path.iterdir()] == ["state.pt"]


def test_learning_rate_rises_and_falls() -> None:
    recipe = replace(RECIPE, steps=100, warmup_steps=10, schedule="cosine")
    rates = [learning_rate(recipe, step, steps=100) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert max(rates) == rates[9]
    assert rates[-1] < 1e-6
    stepped = replace(recipe, schedule="step")
    before, after = (learning_rate(stepped, step, steps=100) for step in (59, 60))
    assert before == pytest.approx(10 * after)
    poly = replace(recipe, schedule="poly", warmup_steps=0)
    assert learning_rate(poly, 75, steps=100) == pytest.approx(1e-3 * 0.25**0.9)


@pytest.mark.parametrize("path", shipped_recipes(), ids=lambda path: path.stem)
def test_shipped_recipes_are_valid(path: Path) -> None:
    recipe = read_recipe(path)
    assert recipe.variant in load(recipe.arch).variants


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("arch = 'maris'\nvariant = 'tiny'\nsteps = 1\nstep = 2\n", "step"),
        ("arch = 'maris'\nvariant = 'tiny'\n", "steps"),
        ("arch = 'maris'\nvariant = 'tiny'\nsteps = 'many'\n", "steps"),
        ("arch = 'maris'\nvariant = 'tiny'\nsteps = 0\n", "at least 1"),
        ("arch = [", "TOML"),
    ],
)
def test_a_wrong_recipe_is_refused_by_name(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "recipe.toml"
    path.write_text(text)
    with pytest.raises(RecipeError, match=said):
        read_recipe(path)


def test_a_missing_recipe_names_the_shipped_ones() -> None:
    with pytest.raises(RecipeError, match="maris-lite"):
        read_recipe(find_recipe("no-such-recipe"))


def test_the_log_is_lines_of_json(red_boxes: Path, tmp_path: Path) -> None:
    Trainer(RECIPE, data=open_training([red_boxes]), out=tmp_path / "run").run()
    text = (tmp_path / "run" / "log.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    assert lines[-1]["validation"].keys() >= {"oIoU", "mIoU"}


def test_the_state_knows_the_best_of_the_validation_before_it(
    red_boxes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "validate", lambda self: {"oIoU": 10.0 + self.step})
    recipe = replace(RECIPE, save_every=3, best="oIoU")
    run = Trainer(recipe, data=open_training([red_boxes]), out=tmp_path / "run")
    with pytest.raises(Killed):
        run.run(kill_at(3))  # type: ignore[arg-type]
    resumed = Trainer(recipe, data=open_training([red_boxes]), out=tmp_path / "run")
    assert (resumed.step, resumed.best) == (3, 13.0)


def test_decay_of_the_authors_of_dmmi_reaches_all_but_swins_norms() -> None:
    """They tell by the names in their own files which parameters of the backbone are exempt."""
    for variant in ("swin", "r101"):
        recipe = read_recipe(find_recipe(f"dmmi-{variant}"))
        with torch.device("meta"):
            network = load("dmmi").variant(variant).build()
        names = {id(value): name for name, value in network.named_parameters()}
        groups = _optimizer(network, recipe).param_groups
        found = {names[id(v)] for g in groups if g["weight_decay"] == 0 for v in g["params"]}
        theirs = network.official_keys()["dmmi"].keys
        exempt = ("norm", "absolute_pos_embed", "relative_position_bias_table")
        assert found == {
            name
            for name in names.values()
            if theirs.get(name, "").startswith("model.backbone.")
            and any(part in theirs[name] for part in exempt)
        }
        assert bool(found) == (variant == "swin")


def test_sentences_without_a_target_are_spread(red_boxes: Path) -> None:
    table = SplitTable(open_training([red_boxes]).train)
    recipe = replace(RECIPE, unit="sentence", images=1, spread_absent=True)
    present = [
        table.entries[row].present
        for step in range(steps_per_epoch(recipe, table))
        for row in rows_of(recipe, table, step)
    ]
    absent = [index for index, there in enumerate(present) if not there]
    assert len(absent) > 1
    gaps = {after - before for before, after in itertools.pairwise(absent)}
    assert max(gaps) - min(gaps) <= 1
    plain = replace(recipe, spread_absent=False)
    count = len(table.entries)
    both = [sorted(r for s in range(count) for r in rows_of(x, table, s)) for x in (recipe, plain)]
    assert both[0] == both[1] == list(range(count))


def test_a_validation_may_take_first_sentences_only(red_boxes: Path) -> None:
    table = SplitTable(open_training([red_boxes]).val)
    every = validation_rows(replace(RECIPE, validate_sentences=99), table)
    first = validation_rows(replace(RECIPE, validate_sentences=99, validate_first=True), table)
    assert every == list(range(len(table.entries)))
    assert first == [group[0] for group in table.by_ref]
    assert len(first) < len(every)
    assert len(validation_rows(replace(RECIPE, validate_sentences=3), table)) == 3


def test_the_length_of_sentences_can_be_chosen_and_is_kept(red_boxes: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, arch="etris", tokens=22, steps=1)
    path = Trainer(recipe, data=open_training([red_boxes]), out=tmp_path / "run").run()
    assert load_network("etris", "tiny", path).network.text.max_tokens == 22
    other = replace(recipe, tokens=None)
    with pytest.raises(CheckpointError, match="22 tokens; etris tiny takes 17"):
        Trainer(other, data=open_training([red_boxes]), out=tmp_path / "other", init=path)
    for tokens, accepted in ((2, "3 to 77"), (78, "3 to 77")):
        with pytest.raises(RecipeError, match=f"Sentences of {tokens} tokens.*{accepted}"):
            load("etris").variant("tiny").network(tokens=tokens)
    with pytest.raises(RecipeError, match="accepted are 24 to 24"):
        load("maris").variant("lite").network(tokens=25)


@pytest.mark.parametrize("arch", ["maris", "haris", "etris", "dmmi", "shared_ris"])
def test_the_longest_sentence_has_positions(arch: str) -> None:
    longest = load(arch).variant("tiny").longest
    assert longest is not None
    if arch == "shared_ris":
        longest = 300  # 1,022 words on 901 cells take a while
    predictor = predictor_of(load(arch).variant("tiny").network(tokens=longest))
    predictor.set_image(np.zeros((40, 40, 3), dtype=np.uint8))
    (mask,) = predictor.segment([" ".join(["red"] * (longest - 2))])
    assert np.isfinite(mask.logits).all()


def test_the_loss_of_etris_is_a_mean_over_all_cells(red_boxes: Path, tmp_path: Path) -> None:
    recipe = replace(RECIPE, arch="etris", loss=LossWeights(focal=0.0, dice=0.0, cross_entropy=1.0))
    run = Trainer(recipe, data=open_training([red_boxes]), out=tmp_path / "run")
    outputs, target, _ = run._forward(run.train, [0, 1, 2], training=False)
    assert 0 < target.valid.mean() < 1  # the pictures are not square
    found = total_loss(outputs, run._supervised(target), weights=recipe.loss)
    theirs = functional.binary_cross_entropy_with_logits(outputs.logits.float(), target.share)
    torch.testing.assert_close(found, theirs)


def test_the_command_takes_data_and_length(red_boxes: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        'arch = "etris"\nvariant = "tiny"\nsteps = 1\nimages = 2\nsentences = 1\n'
        "cache_features = false\nvalidate_every = 1\n"
    )
    words = ["train", "--recipe", str(recipe), "--data", str(red_boxes), "--split-by", "synth"]
    words += ["--split", "train", "--hold-out", "0.2", "--tokens", "9"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    path = tmp_path / "run" / "checkpoint.safetensors"
    assert load_network("etris", "tiny", path).network.text.max_tokens == 9
    assert main([*words, "--val-split", "train", "--out", str(tmp_path / "other")]) == 2
    assert not (tmp_path / "other").exists()


def test_a_folder_keeps_to_its_data(red_boxes: Path, tmp_path: Path) -> None:
    Trainer(RECIPE, data=open_training([red_boxes]), out=tmp_path / "run")
    with pytest.raises(RecipeError, match="another data"):
        Trainer(RECIPE, data=open_training([red_boxes], hold_out=0.2), out=tmp_path / "run")


def test_encoders_alone_know_no_length_of_sentences(red_boxes: Path, tmp_path: Path) -> None:
    start = tmp_path / "clip.safetensors"
    metadata = {"architecture": "etris", "variant": "tiny", "head": SEEDED_HEAD}
    save_checkpoint(start, load("etris").variant("tiny").build(), metadata=metadata, whole=True)
    recipe = replace(RECIPE, arch="etris", tokens=22)
    run = Trainer(recipe, data=open_training([red_boxes]), out=tmp_path / "run", init=start)
    assert run.network.text.max_tokens == 22


def test_a_step_has_something_for_every_process(
    red_boxes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = SplitTable(open_training([red_boxes]).train)
    monkeypatch.setattr(draws, "processes", lambda: 3)
    draws.check_shares(replace(RECIPE, images=3), table)
    with pytest.raises(RecipeError, match="2 of unit 'picture' for 3 processes"):
        draws.check_shares(replace(RECIPE, images=2), table)
    monkeypatch.setattr(draws, "processes", lambda: 11)
    with pytest.raises(RecipeError, match="10 of unit 'picture' for 11 processes"):
        draws.check_shares(replace(RECIPE, images=20), table)


def test_a_mask_takes_opencvs_linear_warp() -> None:
    """Values of OpenCV 4.10 (``warpAffine``, ``INTER_LINEAR``) of an ellipse, 90 x 120 to 416."""
    rows, columns = np.mgrid[:90, :120]
    inside = ((rows - 36.0) ** 2 / 18.0**2 + (columns - 66.0) ** 2 / 36.0**2) < 1
    spec = load("etris").variant("r101")
    with torch.device("meta"):
        image = spec.build().image
    found = target_grid(inside, image, 104, nearest=True)
    np.testing.assert_array_equal(found[26:60:3, 21:100:6], OPENCV)
