"""Which sentences each step trains on: decided by the seed and the step alone, so runs resume."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from rt_ris.errors import RecipeError
from rt_ris_train.parallel import processes, share_of

if TYPE_CHECKING:
    from rt_ris_train.data.features import SplitTable
    from rt_ris_train.recipe import TrainRecipe

Rows = npt.NDArray[np.int64]


def steps_per_epoch(recipe: TrainRecipe, table: SplitTable) -> int:
    """How many steps see every picture, ref or sentence about once, as the recipe counts."""
    return max(_units(recipe, table) // recipe.images, 1)


def total_steps(recipe: TrainRecipe, table: SplitTable) -> int:
    """Steps of the whole run."""
    if recipe.epochs is not None:
        return recipe.epochs * steps_per_epoch(recipe, table)
    assert recipe.steps is not None
    return recipe.steps


def check_shares(recipe: TrainRecipe, table: SplitTable) -> None:
    """Refuse more processes than a step has units for.

    Raises:
        RecipeError: some process would have nothing to do.
    """
    units = min(recipe.images, _units(recipe, table))
    if processes() > units:
        raise RecipeError(
            f"A step has {units} of unit '{recipe.unit}' for {processes()} processes; start at "
            "most as many (--nproc-per-node), or raise images in the recipe."
        )


def rows_of(recipe: TrainRecipe, table: SplitTable, step: int) -> list[int]:
    """This process's sentences of a step, as rows of the table.

    A step of ``picture`` units draws some sentences of each picture, one of ``ref`` units one
    sentence of each ref, one of ``sentence`` units is some sentences in random order.
    """
    epoch, place = divmod(step, steps_per_epoch(recipe, table))
    order = np.random.default_rng([recipe.seed, 1, epoch]).permutation(_units(recipe, table))
    if recipe.spread_absent:
        order = _spread_absent(order, table)
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


def validation_rows(recipe: TrainRecipe, table: SplitTable) -> list[int]:
    """The sentences of a validation, as rows of the table, evenly spread where not all are used."""
    rows = list(range(len(table.entries)))
    if recipe.validate_first:
        rows = [group[0] for group in table.by_ref]
    wanted = recipe.validate_sentences
    if len(rows) <= wanted:
        return rows
    step = (len(rows) - 1) / max(wanted - 1, 1)
    return [rows[round(place * step)] for place in range(wanted)]


def _spread_absent(order: Rows, table: SplitTable) -> Rows:
    """The same sentences, those without a target as far from each other as they can be."""
    present = np.array([table.entries[row].present for row in order])
    absent, others = order[~present], order[present]
    places = ((np.arange(len(absent)) + 0.5) * len(order) / max(len(absent), 1)).astype(int)
    spread = np.empty_like(order)
    taken = np.zeros(len(order), dtype=bool)
    taken[places] = True
    spread[taken], spread[~taken] = absent, others
    return spread


def _units(recipe: TrainRecipe, table: SplitTable) -> int:
    counts = {
        "picture": len(table.by_image),
        "ref": len(table.by_ref),
        "sentence": len(table.entries),
    }
    return counts[recipe.unit]
