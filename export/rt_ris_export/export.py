"""The whole export."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rt_ris_export.artefacts import BUNDLE
from rt_ris_export.recipe import ExportRecipe
from rt_ris_export.step import Artefacts, Context, Progress, Step, plan, run
from rt_ris_export.steps import STEPS
from rt_ris_export.workspace import workspace
from rt_ris_train import architecture


def export_bundle(
    recipe: ExportRecipe,
    *,
    progress: Callable[[Progress], None] | None = None,
    steps: Sequence[Step] = STEPS,
) -> Path:
    """Export a network into a bundle that has passed the gate, or leave nothing behind.

    Args:
        recipe: what to export.
        progress: takes news from the steps.
        steps: the table to plan from.

    Returns:
        The bundle's folder.

    Raises:
        RecipeError: there is no such architecture or variant.
        OutputError: the output exists or its folder does not.
        CheckpointError: the checkpoint's weights do not fit.
        PlanError: a stage cannot be traced or is not valid ONNX.
        PluginError: a stage uses an operator that no kernel defines.
        ParityError: a stage or a mask is not what PyTorch computes.
        StorageError: writing failed, such as on a full disk.
    """
    ordered = plan(steps, goal=BUNDLE)
    chosen = architecture.load(recipe.arch)
    chosen.variant(recipe.variant)
    output = recipe.output(recipe.variant or chosen.default)
    artefacts = Artefacts()
    with workspace(output, overwrite=recipe.overwrite) as folder:
        context = Context(
            recipe=recipe,
            output=output,
            workspace=folder,
            artefacts=artefacts,
            say=lambda _: None,
        )
        run(ordered, context, progress=progress or (lambda _: None))
    return artefacts.get(BUNDLE)
