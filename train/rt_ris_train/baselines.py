"""What can be had without looking at the picture or reading the sentence.

A network is worth its score above these: masks that are the same for every picture and sentence,
chosen on the training split. Each is a segmenter, so it is measured the same way as a network.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
from PIL import Image

from rt_ris_train.data.refcoco import RefDataset
from rt_ris_train.evaluate import Segmenter

GRID: Final = 64
"""Side of the grid on which fixed masks are chosen, stretched over a picture of any shape."""

Grid = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True, eq=False)
class FixedAnswer:
    """The same mask again, bool [H, W]."""

    binary: npt.NDArray[np.bool_]


class FixedMask:
    """Answers every sentence with one mask, stretched to the picture.

    Args:
        grid: bool [G, G].
    """

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self._answer = FixedAnswer(binary=grid)

    def set_image(self, image: npt.NDArray[np.uint8]) -> None:
        """Take the size of uint8 [H, W, 3]; nothing else of it is looked at."""
        height, width = image.shape[:2]
        stretched = Image.fromarray(self.grid).resize((width, height), Image.Resampling.NEAREST)
        self._answer = FixedAnswer(binary=np.asarray(stretched, dtype=np.bool_))

    def segment(self, sentences: Sequence[str]) -> list[FixedAnswer]:
        """The same mask for each sentence."""
        return [self._answer] * len(sentences)


def baselines(training: RefDataset) -> Mapping[str, Segmenter]:
    """All foreground, the best centred box and the best cut of the mean mask, by name.

    Args:
        training: the split on which box and cut are chosen, by overall IoU on the grid.
    """
    mean = _mean_mask(training)
    return {
        "all foreground": FixedMask(np.ones((GRID, GRID), dtype=np.bool_)),
        "centred box": FixedMask(_best(_boxes(), mean)),
        "mean mask": FixedMask(_best([mean >= cut for cut in np.unique(mean)], mean)),
    }


def _mean_mask(training: RefDataset) -> npt.NDArray[np.float64]:
    """How often each cell belongs to the target of a sentence, float64 [G, G] in 0..1."""
    total = np.zeros((GRID, GRID))
    count = 0
    for ref in training.refs:
        if ref.no_target:
            continue
        mask = Image.fromarray(training.mask(ref)).resize((GRID, GRID), Image.Resampling.NEAREST)
        total += np.asarray(mask) * len(ref.sentences)
        count += len(ref.sentences)
    return total / max(count, 1)


def _boxes() -> list[Grid]:
    """Centred boxes of every height and width of an even number of cells."""
    found = []
    for rows in range(2, GRID + 1, 2):
        for columns in range(2, GRID + 1, 2):
            grid = np.zeros((GRID, GRID), dtype=np.bool_)
            top, left = (GRID - rows) // 2, (GRID - columns) // 2
            grid[top : top + rows, left : left + columns] = True
            found.append(grid)
    return found


def _best(candidates: Sequence[Grid], mean: npt.NDArray[np.float64]) -> Grid:
    """The candidate with the greatest overall IoU: the mean mask is all that it depends on.

    The sum of intersections with T targets is T times the mean inside the candidate; the sum of
    unions is T times the candidate's area and what the mean has outside it.
    """
    inside = np.array([mean[grid].sum() for grid in candidates])
    area = np.array([grid.sum() for grid in candidates])
    return candidates[int(np.argmax(inside / (area + mean.sum() - inside)))]
