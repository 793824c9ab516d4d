"""The reader of RefCOCO's format, on a tiny data set that holds every trap."""

from __future__ import annotations

import json
import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from rt_ris.errors import DataError
from rt_ris_train.data import RefDataset
from rt_ris_train.data.masks import BoolMask, decode_segmentation, encode_mask
from rt_ris_train.data.refcoco import in_split
from rt_ris_train.data.unpickle import load_plain_pickle

H, W = 30, 40
# Two squares of 10 x 10 that share 5 x 10 pixels.
OVERLAPPING = [[5, 5, 15, 5, 15, 15, 5, 15], [10, 5, 20, 5, 20, 15, 10, 15]]


def _block(top: int, left: int, height: int, width: int) -> BoolMask:
    mask = np.zeros((H, W), dtype=np.bool_)
    mask[top : top + height, left : left + width] = True
    return mask


def _uncompressed(mask: BoolMask) -> dict[str, Any]:
    """COCO's counts: column by column, zeros first."""
    counts, value, run = [], False, 0
    for pixel in mask.flatten(order="F").tolist():
        if pixel != value:
            counts.append(run)
            value, run = pixel, 0
        run += 1
    return {"size": [H, W], "counts": [*counts, run]}


def _ref(ref_id: int, ann_id: object, split: str, **extra: object) -> dict[str, Any]:
    sentence = {"sent_id": ref_id * 10, "sent": "left thing", "raw": "Left thing.", "tokens": []}
    record = {"ref_id": ref_id, "ann_id": ann_id, "image_id": 7, "category_id": 1, "split": split}
    suffixed = {"file_name": "COCO_train2014_000000000007_1.jpg", "sentences": [sentence]}
    return {**record, **suffixed, "sent_ids": [ref_id * 10], **extra}


REFS = [
    _ref(1, 100, "train"),
    _ref(2, 101, "val"),
    _ref(3, [101, 102], "testA"),
    _ref(4, [-1], "testB"),
    _ref(5, [], "testB"),
    _ref(6, None, "test"),
    _ref(7, 100, "test", source="zero"),
    _ref(8, [102], "testAB"),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "refcoco"
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (H, W, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images" / "seven.png")
    segmentations = [
        OVERLAPPING,
        encode_mask(_block(2, 3, 4, 5)),
        _uncompressed(_block(20, 1, 5, 9)),
    ]
    annotations = [
        {"id": 100 + n, "image_id": 7, "category_id": 1, "segmentation": s, "iscrowd": 0}
        for n, s in enumerate(segmentations)
    ]
    images = [{"id": 7, "file_name": "seven.png", "height": H, "width": W}]
    instances = {"images": images, "annotations": annotations, "categories": []}
    (folder / "instances.json").write_text(json.dumps(instances))
    (folder / "refs(unc).p").write_bytes(pickle.dumps(REFS, protocol=2))
    return folder


def test_overlapping_polygons_are_united(root: Path) -> None:
    data = RefDataset.open(root, split="train")
    mask = data.mask(data[0])
    assert mask.dtype == np.bool_
    assert mask.shape == (H, W)
    assert mask[10, 12]
    assert mask.sum() == pytest.approx(150, abs=15)


def test_compressed_run_lengths_are_exact(root: Path) -> None:
    data = RefDataset.open(root, split="val")
    np.testing.assert_array_equal(data.mask(data[0]), _block(2, 3, 4, 5))


def test_a_list_of_annotations_is_united(root: Path) -> None:
    data = RefDataset.open(root, split="testA")
    expected = _block(2, 3, 4, 5) | _block(20, 1, 5, 9)
    assert data[0].ann_ids == (101, 102)
    np.testing.assert_array_equal(data.mask(data[0]), expected)


@pytest.mark.parametrize("ref_id", [4, 5, 6, 7])
def test_every_spelling_of_no_target_gives_an_empty_mask(root: Path, ref_id: int) -> None:
    data = RefDataset.open(root, split="test")
    ref = next(ref for ref in data if ref.ref_id == ref_id)
    assert ref.no_target
    assert ref.ann_ids == ()
    assert not data.mask(ref).any()


@pytest.mark.parametrize(
    ("split", "ids"),
    [
        ("train", [1]),
        ("val", [2]),
        ("testA", [3, 8]),
        ("testB", [4, 5, 8]),
        ("test", [3, 4, 5, 6, 7, 8]),
        ("testAB", [8]),
    ],
)
def test_splits_are_chosen_as_the_refer_api_does(root: Path, split: str, ids: list[int]) -> None:
    assert [ref.ref_id for ref in RefDataset.open(root, split=split)] == ids


def test_crowds_are_passed_over_in_grefcoco_alone(root: Path) -> None:
    path = root / "instances.json"
    instances = json.loads(path.read_text())
    instances["annotations"][1]["iscrowd"] = 1
    path.write_text(json.dumps(instances))
    refs = [_ref(1, [101, 102], "val"), _ref(2, [101], "val"), _ref(3, [-1], "val")]
    for name in ("refs(unc).p", "grefs(unc).p"):
        (root / "refs(unc).p").unlink(missing_ok=True)
        (root / name).write_bytes(pickle.dumps(refs, protocol=2))
        data = RefDataset.open(root, split="val")
        if name.startswith("refs"):
            assert [ref.ann_ids for ref in data] == [(101, 102), (101,), ()]
        else:
            assert [(ref.ref_id, ref.ann_ids, ref.no_target) for ref in data] == [
                (1, (102,), False),
                (3, (), True),
            ]
            np.testing.assert_array_equal(data.mask(data[0]), _block(20, 1, 5, 9))


def test_train_is_not_part_of_test_splits() -> None:
    assert not in_split("train", "test")
    assert not in_split("trainval", "train")


def test_sentences_images_and_samples(root: Path) -> None:
    data = RefDataset.open(root, split="train")
    ref, sentence = data.samples()[0]
    assert (sentence.sent_id, sentence.text, sentence.raw) == (10, "left thing", "Left thing.")
    assert sentence.kind is None
    assert ref.file_name == "seven.png"
    image = data.image(ref)
    assert image.shape == (H, W, 3)
    assert image.dtype == np.uint8
    assert data.size(ref) == (H, W)
    assert len(data) == 1


def test_json_serves_as_well(root: Path) -> None:
    (root / "refs(unc).p").unlink()
    (root / "refs(unc).json").write_text(json.dumps(REFS))
    assert len(RefDataset.open(root, split="testB", split_by="unc")) == 3


def test_an_unknown_split_names_those_there_are(root: Path) -> None:
    with pytest.raises(DataError, match=r"no ref in split 'dev'.*testA, testAB, testB, train, val"):
        RefDataset.open(root, split="dev")


def test_several_refs_files_need_a_choice(root: Path) -> None:
    (root / "refs(google).p").write_bytes(pickle.dumps(REFS[:1], protocol=2))
    with pytest.raises(DataError, match=r"refs\(google\)\.p, refs\(unc\)\.p"):
        RefDataset.open(root, split="train")
    assert len(RefDataset.open(root, split="train", split_by="google")) == 1


def test_a_missing_refs_file_lists_the_others(root: Path) -> None:
    with pytest.raises(DataError, match=r"no refs\(umd\)\.p or \.json.*refs\(unc\)\.p"):
        RefDataset.open(root, split="train", split_by="umd")


def test_a_folder_without_instances_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no instances.json"):
        RefDataset.open(tmp_path, split="train")


@pytest.mark.parametrize(
    "folder", ["images/train2014", "../images/mscoco/images/train2014", "../trainval2014"]
)
def test_images_are_found_in_the_usual_places(root: Path, folder: str) -> None:
    (root / folder).mkdir(parents=True)
    (root / "images" / "seven.png").rename(root / folder / "seven.png")
    data = RefDataset.open(root, split="train")
    assert data.image_path(data[0]).resolve() == (root / folder / "seven.png").resolve()


def test_a_missing_image_lists_the_places_tried(root: Path) -> None:
    (root / "images" / "seven.png").unlink()
    data = RefDataset.open(root, split="train")
    with pytest.raises(DataError, match=r"seven.png.*images/train2014.*trainval2014"):
        data.image(data[0])


def test_an_image_of_another_size_is_refused(root: Path) -> None:
    Image.new("RGB", (W + 1, H)).save(root / "images" / "seven.png")
    data = RefDataset.open(root, split="train")
    with pytest.raises(DataError, match=r"original size"):
        data.image(data[0])


def test_file_names_may_not_leave_the_folder(root: Path) -> None:
    path = root / "instances.json"
    path.write_text(path.read_text().replace("seven.png", "../../seven.png"))
    with pytest.raises(DataError, match=r"leaves the image folder"):
        RefDataset.open(root, split="train")


def test_annotations_must_exist_for_the_same_image(root: Path) -> None:
    (root / "refs(unc).p").write_bytes(pickle.dumps([_ref(1, 999, "train")], protocol=2))
    with pytest.raises(DataError, match=r"the first is 999"):
        RefDataset.open(root, split="train")


def test_a_ref_without_ann_id_is_an_error(root: Path) -> None:
    record = _ref(1, 100, "train")
    del record["ann_id"]
    (root / "refs(unc).p").write_bytes(pickle.dumps([record], protocol=2))
    with pytest.raises(DataError, match=r"ref 1 is not as expected.*ann_id"):
        RefDataset.open(root, split="train")


class _Hostile:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.marker,))


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_a_pickle_that_calls_something_is_refused_and_not_run(
    tmp_path: Path, protocol: int
) -> None:
    marker, path = tmp_path / "ran", tmp_path / "refs(unc).p"
    path.write_bytes(pickle.dumps([_Hostile(marker)], protocol=protocol))
    with pytest.raises(DataError, match=r"Refused to load"):
        load_plain_pickle(path)
    assert not marker.exists()


@pytest.mark.parametrize(
    "payload",
    [b"cos\nsystem\n(S'true'\ntR.", b"c__builtin__\neval\n(S'1'\ntR.", b"", b"\x80\x02]q"],
)
def test_hostile_and_damaged_pickles_are_refused(tmp_path: Path, payload: bytes) -> None:
    path = tmp_path / "refs(unc).p"
    path.write_bytes(payload)
    with pytest.raises(DataError, match=r"Refused to load"):
        load_plain_pickle(path)


def test_only_plain_containers_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "x.p"
    plain = [{"a": (1, 2.5, None, True)}, {3, 4}, frozenset({5}), "text", 10**20]
    path.write_bytes(pickle.dumps(plain, protocol=2))
    assert load_plain_pickle(path) == plain
    path.write_bytes(pickle.dumps([OrderedDict(a=1)], protocol=2))
    with pytest.raises(DataError, match=r"collections.OrderedDict"):
        load_plain_pickle(path)


def test_strings_of_python_2_are_read(tmp_path: Path) -> None:
    path = tmp_path / "x.p"
    path.write_bytes(b"\x80\x02]q\x00U\x05caf\xe9!q\x01a.")  # a str, not unicode, of Python 2
    assert load_plain_pickle(path) == ["caf\xe9!"]


@pytest.mark.parametrize(
    "segmentation",
    [
        {"size": [H, W], "counts": [5, 5]},
        {"size": [W, H], "counts": [H * W]},
        {"size": [H, W], "counts": "zz0"},
        {"size": [H, W]},
    ],
)
def test_run_lengths_that_do_not_fit_are_refused(segmentation: dict[str, Any]) -> None:
    with pytest.raises(DataError):
        decode_segmentation(segmentation, height=H, width=W)


def test_four_numbers_are_not_taken_for_a_box() -> None:
    assert not decode_segmentation([[1, 1, 20, 20]], height=H, width=W).any()


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_encoding_and_decoding_a_mask_is_exact(share: float) -> None:
    mask = np.random.default_rng(1).random((H, W)) < share
    np.testing.assert_array_equal(decode_segmentation(encode_mask(mask), height=H, width=W), mask)


@pytest.mark.parametrize(
    "segmentation",
    [
        None,
        3,
        [["a"] * 6],
        [[0, 0, 1e9, 0, 5, 5]],
        [[0, 0, float("inf"), 0, 5, 5]],
        [[0, 0, float("nan"), 0, 5, 5]],
        {"size": None, "counts": [0]},
        {"size": 3, "counts": [0]},
    ],
    ids=str,
)
def test_what_is_no_segmentation_is_refused(segmentation: object) -> None:
    with pytest.raises(DataError):
        decode_segmentation(segmentation, height=H, width=W)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "changed",
    [{"sentences": "x"}, {"sentences": []}, {"sentences": [3]}, {"image_id": [1]}],
    ids=str,
)
def test_refs_of_another_form_are_refused(root: Path, changed: dict[str, object]) -> None:
    (root / "refs(unc).p").write_bytes(
        pickle.dumps([_ref(1, 100, "train") | changed, _ref(2, 100, "val")], protocol=2)
    )
    with pytest.raises(DataError, match="ref 1 is not as expected"):
        RefDataset.open(root, split="train")
    assert len(RefDataset.open(root, split="val")) == 1


def test_the_digest_is_of_everything_but_the_pictures(root: Path) -> None:
    before = RefDataset.open(root, split="train").digest()
    assert RefDataset.open(root, split="train").digest() == before
    path = root / "instances.json"
    path.write_text(path.read_text().replace("[5, 5, 15,", "[5, 5, 16,", 1))
    assert RefDataset.open(root, split="train").digest() != before
