"""Which sentences each step trains on: decided by the seed and the step alone, so runs resume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rt_ris_train.parallel import share_of

if TYPE_CHECKING:
    from rt_ris_train.data.features import SplitTable
    from rt_ris_train.recipe import TrainRecipe


def steps_per_epoch(recipe: TrainRecipe, table: SplitTable) -> int:
    """How many steps see every picture, ref or sentence about once, as the recipe counts."""
    return max(_units(recipe, table) // recipe.images, 1)


def total_steps(recipe: TrainRecipe, table: SplitTable) -> int:
    """Steps of the whole run."""
    if recipe.epochs is not None:
        return recipe.epochs * steps_per_epoch(recipe, table)
    assert recipe.steps is not None
    return recipe.steps


def rows_of(recipe: TrainRecipe, table: SplitTable, step: int) -> list[int]:
    """This process's sentences of a step, as rows of the table.

    A step of ``picture`` units draws some sentences of each picture, one of ``ref`` units one
    sentence of each ref, one of ``sentence`` units is some sentences in random order.
    """
    epoch, place = divmod(step, steps_per_epoch(recipe, table))
    order = np.random.default_rng([recipe.seed, 1, epoch]).permutation(_units(recipe, table))
    chosen = order[place * recipe.images :][: recipe.images].tolist()
    draw = np.random.default_rng([recipe.seed, 2, step])
    if recipe.unit == "sentence":
        return share_of(chosen)
    groups: Sequence[Sequence[int]] = table.by_image
    if recipe.unit == "ref":
        groups = table.by_ref
    many = recipe.sentences if recipe.unit == "picture" else 1
    drawn = [draw.permutation(groups[unit])[:many].tolist() for unit in chosen]
    return [row for rows in share_of(drawn) for row in rows]


def _units(recipe: TrainRecipe, table: SplitTable) -> int:
    counts = {
        "picture": len(table.by_image),
        "ref": len(table.by_ref),
        "sentence": len(table.entries),
    }
    return counts[recipe.unit]
