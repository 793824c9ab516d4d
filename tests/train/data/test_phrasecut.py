"""PhraseCut's format on a fixture of our own, and the choice of the reader."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from rt_ris.errors import DataError
from rt_ris_train.data import open_dataset
from rt_ris_train.data.phrasecut import PhraseCut
from rt_ris_train.evaluate import evaluate

SQUARE = [[2.9, 3.9], [8.2, 3.1], [8.9, 9.9], [2.0, 9.0]]
LINE = [[12.0, 1.0], [15.0, 1.0]]
DOT = [[1.0, 1.0]]


def task(image_id: int, phrase: str, polygons: object) -> dict[str, Any]:
    return {
        "task_id": f"{image_id}__7",
        "image_id": image_id,
        "ann_ids": [7],
        "phrase": phrase,
        "Polygons": polygons,
        "instance_boxes": [],
        "phrase_structure": {"name": "thing", "attributes": [], "type": "name"},
    }


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    index = []
    for image_id in (1, 2):
        Image.new("RGB", (20, 12)).save(tmp_path / "images" / f"{image_id}.jpg")
        index.append({"image_id": image_id, "width": 20, "height": 12, "split": "val"})
    (tmp_path / "image_data_split3000.json").write_text(json.dumps(index))
    val = [task(1, "a square", [[SQUARE]]), task(1, "both", [[SQUARE, DOT], [LINE]])]
    (tmp_path / "refer_val.json").write_text(json.dumps(val))
    (tmp_path / "refer_miniv.json").write_text(json.dumps([task(2, "a line", [[LINE]])]))
    return tmp_path


def test_points_are_cut_to_whole_pixels_and_outlines_belong_to_the_mask(root: Path) -> None:
    dataset = open_dataset(root, split="val")
    drawn = dataset.mask(dataset.refs[0])
    canvas = Image.new("L", (20, 12))
    ImageDraw.Draw(canvas).polygon([(2, 3), (8, 3), (8, 9), (2, 9)], outline=1, fill=1)
    assert (drawn == (np.asarray(canvas) > 0)).all()
    assert drawn.sum() == 7 * 7


def test_instances_are_united_and_single_points_left_out(root: Path) -> None:
    dataset = open_dataset(root, split="val")
    assert isinstance(dataset, PhraseCut)
    square, both = (dataset.mask(ref) for ref in dataset.refs)
    assert both.sum() == square.sum() + 4
    assert not both[1, 1]
    assert [sentence.text for _, sentence in dataset.samples()] == ["a square", "both"]


def test_val_leaves_out_miniv_unless_both_are_asked_for(root: Path) -> None:
    assert len(open_dataset(root, split="val")) == 2
    assert len(open_dataset(root, split="miniv")) == 1
    assert len(open_dataset(root, split="val_miniv")) == 3
    with pytest.raises(DataError, match=r"no split 'test'.*miniv, val"):
        open_dataset(root, split="test")


def test_it_is_evaluated_like_any_other(root: Path) -> None:
    class Nothing:
        def set_image(self, image: np.ndarray) -> None:
            self.shape = image.shape[:2]

        def segment(self, sentences: list[str]) -> list[Any]:
            class Answer:
                binary = np.zeros(self.shape, dtype=np.bool_)

            return [Answer()] * len(sentences)

    found = evaluate(Nothing(), open_dataset(root, split="val_miniv"))
    assert found["sentences"] == 3
    assert found["oIoU"] == 0.0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("refer_val.json", "[{}]", "not as expected"),
        ("refer_val.json", "{}", "no list of tasks"),
        ("refer_val.json", "[1]", "no list of tasks"),
        ("image_data_split3000.json", "{}", "holds a dict; a list"),
        ("refer_val.json", "[", "not valid JSON"),
        ("image_data_split3000.json", "[{}]", "no list of PhraseCut's pictures"),
    ],
)
def test_damaged_files_are_named(root: Path, name: str, content: str, said: str) -> None:
    (root / name).write_text(content)
    with pytest.raises(DataError, match=said):
        open_dataset(root, split="val")


def test_a_task_of_an_unknown_picture_is_refused(root: Path) -> None:
    (root / "refer_val.json").write_text(json.dumps([task(99, "a square", [[SQUARE]])]))
    with pytest.raises(DataError, match="unknown picture"):
        open_dataset(root, split="val")


@pytest.mark.parametrize(
    "polygons",
    [3, [3], [[3]], [[[3]]], [[["a", "b"]]], [[[1]]], [[[[1, 2, 3]]]], [[[[1, None]]]]],
    ids=str,
)
def test_polygons_that_are_none_are_refused_at_opening(root: Path, polygons: object) -> None:
    (root / "refer_val.json").write_text(json.dumps([task(1, "a square", polygons)]))
    with pytest.raises(DataError, match=r"not as expected|no lists of x and y"):
        open_dataset(root, split="val")


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_points_that_are_nowhere_are_refused(root: Path, number: str) -> None:
    text = json.dumps([task(1, "a square", [[SQUARE]])]).replace("2.9", number)
    (root / "refer_val.json").write_text(text)
    with pytest.raises(DataError, match="no lists of x and y"):
        open_dataset(root, split="val")
