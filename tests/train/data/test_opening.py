"""What is trained on: one set, several as one, a share held out."""

from __future__ import annotations

import json
import logging
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rt_ris.errors import DataError
from rt_ris_train.data import open_training
from rt_ris_train.data.features import SplitTable

SIDE = 16


def make(
    folder: Path,
    refs: dict[int, str],
    *,
    by: str = "unc",
    images: str = "../train2014",
    shade: int = 0,
    name: str = "COCO_train2014_{:012}.jpg",
) -> Path:
    """A set with one ref of each picture, by the picture's number the split it is in."""
    (folder / images).mkdir(parents=True, exist_ok=True)
    pictures, annotations, records = [], [], []
    for number, split in refs.items():
        file = name.format(number)
        (folder / images / file).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (SIDE, SIDE), (shade, 0, 0)).save(folder / images / file)
        pictures.append({"id": number, "file_name": file, "height": SIDE, "width": SIDE})
        square = [[0, 0, 8, 0, 8, number % 8 + 1, 0, number % 8 + 1]]
        annotations.append({"id": number, "image_id": number, "segmentation": square})
        sentence: dict[str, Any] = {"sent_id": number, "sent": folder.name, "raw": folder.name}
        record = {"ref_id": number, "ann_id": number, "image_id": number, "split": split}
        records.append({**record, "sentences": [sentence]})
    (folder / "instances.json").write_text(
        json.dumps({"images": pictures, "annotations": annotations})
    )
    (folder / f"refs({by}).p").write_bytes(pickle.dumps(records, protocol=2))
    return folder


def test_several_sets_are_one_without_what_any_of_them_tests_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first = make(tmp_path / "refcoco", {1: "train", 2: "train", 3: "val", 4: "testA"})
    second = make(tmp_path / "refcocog", {1: "train", 2: "test", 3: "train", 5: "val"}, by="umd")
    with caplog.at_level(logging.WARNING):
        data = open_training([first, second], split_by=["unc", "umd"])
    assert "2 of 4 refs" in caplog.text  # picture 2 of the first set, 3 of the second
    assert [(ref.file_name[-5], ref.sentences[0].text) for ref in data.train] == [
        ("1", "refcoco"),
        ("1", "refcocog"),
    ]
    assert [(ref.file_name[-5], ref.sentences[0].text) for ref in data.val] == [
        ("3", "refcoco"),
        ("5", "refcocog"),
    ]
    assert len(SplitTable(data.train).by_image) == 1  # the picture of both is one
    for ref in data.train:
        assert data.train.mask(ref).sum() == 8 * 2
        assert data.train.image(ref).shape == (SIDE, SIDE, 3)
        assert data.train.size(ref) == (SIDE, SIDE)


def test_pictures_of_the_same_name_in_two_places_are_two(tmp_path: Path) -> None:
    sets = [
        make(tmp_path / name, {1: "train", 2: "val"}, images="images", shade=shade, name="{}.jpg")
        for name, shade in (("one", 10), ("two", 200))
    ]
    data = open_training(sets)
    assert [round(float(data.train.image(ref)[..., 0].mean()), -1) for ref in data.train] == [
        10,
        200,
    ]
    assert len(SplitTable(data.train).by_image) == 2


def test_one_set_keeps_pictures_that_its_own_splits_share(tmp_path: Path) -> None:
    """As the google split of RefCOCOg does, which divides objects."""
    root = make(tmp_path / "refcocog", {1: "train", 2: "val"}, by="google")
    records = pickle.loads((root / "refs(google).p").read_bytes())
    (root / "refs(google).p").write_bytes(
        pickle.dumps([*records, {**records[0], "split": "val"}], protocol=2)
    )
    data = open_training([root])
    assert [len(data.train), len(data.val)] == [1, 2]


def test_where_there_is_no_validation_split_a_share_is_held_out(tmp_path: Path) -> None:
    root = make(tmp_path / "ref-zom", {**dict.fromkeys(range(20), "train"), 20: "test"}, by="final")
    with pytest.raises(DataError, match=r"no ref in split 'val'.*--val-split.*--hold-out"):
        open_training([root])
    data = open_training([root], hold_out=0.1)
    train, val = ({ref.image_id for ref in part} for part in (data.train, data.val))
    assert (len(train), len(val)) == (18, 2)
    assert train | val == set(range(20))
    again = open_training([root], hold_out=0.1)
    assert {ref.image_id for ref in again.val} == val
    assert [ref.image_id for ref in open_training([root], val_split="test").val] == [20]
    with pytest.raises(DataError, match=r"share of 1\.5"):
        open_training([root], hold_out=1.5)


def test_a_folder_of_two_makers_needs_one_named(tmp_path: Path) -> None:
    root = make(tmp_path / "refcocog", {1: "train", 2: "val"}, by="umd")
    make(root, {1: "val", 2: "train"}, by="google")
    with pytest.raises(DataError, match="several refs files"):
        open_training([root])
    for by, picture in (("umd", 1), ("google", 2)):
        assert [ref.image_id for ref in open_training([root], split_by=[by]).train] == [picture]
    with pytest.raises(DataError, match="2 makers of splits were named for 1"):
        open_training([root], split_by=["umd", "google"])


def phrasecut(root: Path, pictures: dict[int, tuple[str, int | None]]) -> Path:
    """By a picture's number in Visual Genome its split and its number in COCO."""
    (root / "images").mkdir(parents=True)
    index = []
    tasks: dict[str, list[Any]] = {}
    for number, (split, coco) in pictures.items():
        Image.new("RGB", (SIDE, SIDE - 1)).save(root / "images" / f"{number}.jpg")
        index.append({"image_id": number, "width": SIDE, "height": SIDE - 1, "coco_id": coco})
        square = [[[[0, 0], [3, 0], [3, 3], [0, 3]]]]
        task = {"task_id": str(number), "image_id": number, "phrase": "x", "Polygons": square}
        tasks.setdefault(split, []).append(task)
    for split, listed in tasks.items():
        (root / f"refer_{split}.json").write_text(json.dumps(listed))
    (root / "image_data_split3000.json").write_text(json.dumps(index))
    return root


def test_phrasecut_joins_by_the_numbers_of_coco(tmp_path: Path) -> None:
    """Its pictures are Visual Genome's, of other names and sizes, and many of them COCO's."""
    root = phrasecut(
        tmp_path / "phrasecut",
        {901: ("train", None), 902: ("val", None), 903: ("train", 2), 904: ("val", 1)},
    )
    other = make(tmp_path / "refcoco", {1: "train", 2: "val", 3: "train"})
    data = open_training([other, root])
    assert [ref.file_name for ref in data.train] == ["COCO_train2014_000000000003.jpg", "901.jpg"]
    assert [int(np.count_nonzero(data.train.mask(ref))) for ref in data.train] == [32, 16]


def test_a_folder_in_a_name_hides_no_picture(tmp_path: Path) -> None:
    first = make(tmp_path / "a", {1: "train", 2: "val"})
    second = make(tmp_path / "b", {1: "val", 2: "train", 3: "train"}, name="sub/{:012}.jpg")
    data = open_training([first, second])
    assert [ref.file_name for ref in data.train] == ["sub/000000000003.jpg"]


def test_copies_of_a_picture_are_held_out_together(tmp_path: Path) -> None:
    numbers = dict.fromkeys(range(20), "train")
    sets = [make(tmp_path / name, numbers, images="images") for name in ("a", "b")]
    data = open_training(sets, hold_out=0.2)
    train, val = ({ref.file_name for ref in part} for part in (data.train, data.val))
    assert (len(train), len(val)) == (16, 4)
    assert not train & val
