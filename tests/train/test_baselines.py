from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np

from rt_ris_train.baselines import GRID, FixedMask, baselines
from rt_ris_train.data.refcoco import RefDataset
from rt_ris_train.evaluate import evaluate


def overall(segmenter: FixedMask, dataset: RefDataset) -> float:
    found = evaluate(segmenter, dataset)["oIoU"]
    assert isinstance(found, float)
    return found


def test_each_is_measured_as_a_network_is(red_boxes: Path) -> None:
    # Every target is 40 x 40 of 90 x 120 pixels: all foreground has an IoU of 1600 / 10800.
    training = RefDataset.open(red_boxes, split="train")
    found = {name: overall(each, training) for name, each in baselines(training).items()}
    assert set(found) == {"all foreground", "centred box", "mean mask"}
    assert found["all foreground"] == 100 * 1600 / 10800
    assert found["all foreground"] < found["centred box"] <= 100
    assert found["all foreground"] < found["mean mask"] <= 100


def test_no_centred_box_measures_better_than_the_chosen_one(red_boxes: Path) -> None:
    training = RefDataset.open(red_boxes, split="train")
    box = baselines(training)["centred box"]
    assert isinstance(box, FixedMask)
    chosen = overall(box, training)
    for rows, columns in itertools.product(range(16, 49, 8), repeat=2):
        grid = np.zeros((GRID, GRID), dtype=np.bool_)
        top, left = (GRID - rows) // 2, (GRID - columns) // 2
        grid[top : top + rows, left : left + columns] = True
        # The choice is made on a grid and measured in pixels: half a point may lie between.
        assert overall(FixedMask(grid), training) <= chosen + 0.5


def test_a_fixed_mask_takes_any_picture_and_stays_the_same() -> None:
    grid = np.zeros((GRID, GRID), dtype=np.bool_)
    grid[: GRID // 2] = True
    fixed = FixedMask(grid)
    fixed.set_image(np.zeros((10, 30, 3), dtype=np.uint8))
    first, second = fixed.segment(["a", "b"])
    assert first.binary.shape == (10, 30)
    assert first.binary[:5].all()
    assert not first.binary[5:].any()
    assert first is second
