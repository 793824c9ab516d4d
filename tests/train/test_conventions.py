"""The two conventions in which scores are published, on the same predictions, worked out by hand.

Two pictures, each with one sentence, and a network with a 20 x 20 input whose logits say "the left
half". At the picture's own size that is the left half as well: the sign changes in the middle.

| picture | target | predicted | intersection | union | IoU |
|---|---|---|---|---|---|
| A, 40 x 80 | left 20 columns, 800 pixels | left 40 columns, 1600 | 800 | 1600 | 1/2 |
| B, 20 x 20 | left 10 columns, 200 pixels | left 10 columns, 200 | 200 | 200 | 1 |

On the 20 x 20 input A's target is its left 5 columns: 100 of 200 pixels; B is as it was.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from rt_ris.mask import Mask, Placement
from rt_ris.spec import MaskSpec
from rt_ris_train.data.refcoco import RefDataset
from rt_ris_train.evaluate import EvaluationOptions, evaluate

SIDE = 20
PICTURES = ((40, 80, 20), (20, 20, 10))
"""Height, width, columns of the target."""


class LeftHalf:
    """A network with a stretched input that answers "the left half" to everything."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.logits = np.full((SIDE, SIDE), -10.0, dtype=np.float32)
        self.logits[:, : SIDE // 2] = 10.0

    def set_image(self, image: npt.NDArray[np.uint8]) -> None:
        whole = Placement.on_input(SIDE)
        self.placement = Placement(side=SIDE, box=whole.box, size=image.shape[:2])

    def segment(self, sentences: Sequence[str]) -> list[Mask]:
        self.asked += sentences
        return [
            Mask(
                sentence=sentence,
                logits=self.logits,
                existence=None,
                truncated_after=None,
                placement=self.placement,
                spec=MaskSpec(size=SIDE),
            )
            for sentence in sentences
        ]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> RefDataset:
    root = tmp_path_factory.mktemp("two")
    (root / "images").mkdir()
    images, annotations, refs = [], [], []
    for index, (height, width, columns) in enumerate(PICTURES):
        Image.new("RGB", (width, height)).save(root / "images" / f"{index}.png")
        images.append({"id": index, "file_name": f"{index}.png", "height": height, "width": width})
        rest = height * width - columns * height
        runs = {"size": [height, width], "counts": [0, columns * height, rest]}
        annotations.append({"id": index, "image_id": index, "segmentation": runs})
        sentence = {"sent_id": index, "sent": "left thing", "raw": "Left thing!"}
        refs.append(
            {
                "ref_id": index,
                "ann_id": index,
                "image_id": index,
                "split": "test",
                "sentences": [sentence],
            }
        )
    (root / "instances.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    (root / "refs(synth).json").write_text(json.dumps(refs))
    return RefDataset.open(root, split="test")


def test_the_two_spaces_by_hand(data: RefDataset) -> None:
    original = evaluate(LeftHalf(), data)
    assert original["eval_space"] == "original"
    assert original["oIoU"] == pytest.approx(100 * (800 + 200) / (1600 + 200))  # 55.56
    assert original["mIoU"] == pytest.approx(100 * (1 / 2 + 1) / 2)  # 75
    stretched = evaluate(LeftHalf(), data, options=EvaluationOptions(input_side=SIDE))
    assert stretched["eval_space"] == "input 20 x 20"
    assert stretched["oIoU"] == pytest.approx(100 * (100 + 200) / (200 + 200))  # 75
    assert stretched["mIoU"] == pytest.approx(100 * (1 / 2 + 1) / 2)
    for found in (original, stretched):  # A reaches 0.5 exactly, and the bound includes itself
        assert found["Pr@0.5"] == 100.0
        assert found["Pr@0.6"] == 50.0


def test_small_masks_count_as_nothing_where_that_is_asked_for(data: RefDataset) -> None:
    # B's mask has 200 pixels: below 201 it is emptied. Then I = 800 and U = 1600 + 200.
    found = evaluate(LeftHalf(), data, options=EvaluationOptions(empty_below=201))
    assert found["oIoU"] == pytest.approx(100 * 800 / 1800)
    assert found["T_acc"] == 50.0
    assert found["empty_below"] == 201
    assert evaluate(LeftHalf(), data, options=EvaluationOptions(empty_below=200))["T_acc"] == 100.0


def test_the_text_is_the_one_the_network_was_trained_on(data: RefDataset) -> None:
    for field, text in (("sent", "left thing"), ("raw", "Left thing!")):
        network = LeftHalf()
        options = EvaluationOptions(field="raw" if field == "raw" else "sent")
        evaluate(network, data, options=options)
        assert network.asked == [text] * 2


def test_a_thin_target_is_one_on_a_small_input_too(tmp_path: Path) -> None:
    """One column of 80 is lost among the 20 of the input; the target is there all the same."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (80, 20)).save(tmp_path / "images" / "0.png")
    image = {"id": 0, "file_name": "0.png", "height": 20, "width": 80}
    runs = {"size": [20, 80], "counts": [0, 20, 79 * 20]}
    instances = {
        "images": [image],
        "annotations": [{"id": 0, "image_id": 0, "segmentation": runs}],
    }
    sentence = {"sent_id": 0, "sent": "the pole", "raw": "the pole"}
    ref = {"ref_id": 0, "ann_id": 0, "image_id": 0, "split": "test", "sentences": [sentence]}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    (tmp_path / "refs(synth).json").write_text(json.dumps([ref]))
    dataset = RefDataset.open(tmp_path, split="test")
    found = evaluate(LeftHalf(), dataset, options=EvaluationOptions(input_side=SIDE))
    assert (found["targeted"], found["no_target"], found["oIoU"]) == (1, 0, 0.0)


def test_precision_says_how_it_counts(data: RefDataset) -> None:
    found = evaluate(LeftHalf(), data, options=EvaluationOptions(strict_precision=True))
    assert found["precision_counts"] == "IoU > X"
    assert found["Pr@0.5"] == 50.0
    assert evaluate(LeftHalf(), data)["precision_counts"] == "IoU >= X"
