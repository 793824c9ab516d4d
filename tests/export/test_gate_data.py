"""Which pictures of a data set the gate takes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from rt_ris.errors import DataError
from rt_ris_export.gate_data import samples_of, shipped_samples


def write(root: Path, sides: list[int], *, sentences: int = 2) -> None:
    """A picture of 100 x 100 with one square of each side, all in split test."""
    (root / "images").mkdir(parents=True)
    images, annotations, refs = [], [], []
    for index, side in enumerate(sides):
        name = f"{index}.png"
        Image.fromarray(np.full((100, 100, 3), index, dtype=np.uint8)).save(root / "images" / name)
        images.append({"id": index, "file_name": name, "height": 100, "width": 100})
        corners = [0, 0, side, 0, side, side, 0, side]
        annotations.append({"id": index, "image_id": index, "segmentation": [corners]})
        texts = [f"square {index} {number}" for number in range(sentences)]
        refs.append(
            {
                "ref_id": index,
                "ann_id": index,
                "image_id": index,
                "split": "test",
                "sentences": [{"sent_id": 0, "sent": text, "raw": text} for text in texts],
            }
        )
    document = {"images": images, "annotations": annotations, "categories": []}
    (root / "instances.json").write_text(json.dumps(document))
    (root / "refs(synth).json").write_text(json.dumps(refs))


def test_masks_that_prove_nothing_are_passed_over(tmp_path: Path) -> None:
    write(tmp_path / "data", [5, 60, 100, 40])
    found = samples_of(tmp_path / "data", split="test")
    assert [sample.name for sample in found] == ["1.png", "3.png"]
    assert found[0].sentences == ("square 1 0", "square 1 1")
    assert [int(target.sum()) for target in found[0].targets] == [3600, 3600]


def test_pictures_are_spread_over_the_split(tmp_path: Path) -> None:
    write(tmp_path / "data", [50] * 23)
    found = samples_of(tmp_path / "data", split="test")
    assert [sample.name for sample in found] == [f"{index}.png" for index in (0, 4, 8, 12, 16)]


@pytest.mark.parametrize(("sides", "sentences"), [([5, 100], 2), ([50], 1)])
def test_data_that_cannot_prove_anything_are_refused(
    tmp_path: Path, sides: list[int], sentences: int
) -> None:
    write(tmp_path / "data", sides, sentences=sentences)
    with pytest.raises(DataError, match="two sentences whose targets cover"):
        samples_of(tmp_path / "data", split="test")


def test_every_shipped_picture_has_several_sentences() -> None:
    assert all(len(sample.sentences) > 1 for sample in shipped_samples())
