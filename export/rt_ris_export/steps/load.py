"""First step: the trained network."""

from __future__ import annotations

from rt_ris_export.artefacts import NETWORK, WEIGHTS
from rt_ris_export.step import Context, Step
from rt_ris_train.checkpoint import load_network


def _run(context: Context) -> None:
    recipe = context.recipe
    context.say(f"building {recipe.arch}")
    loaded = load_network(recipe.arch, recipe.variant, recipe.checkpoint, weights=recipe.weights)
    loaded.network.requires_grad_(False)
    weights = (
        "seeded random weights, not trained"
        if loaded.checkpoint_sha256 is None
        else f"checkpoint {loaded.checkpoint_sha256[:12]}"
    )
    context.say(f"{recipe.arch} {loaded.variant_name} with {weights}")
    for file in loaded.imported:
        context.say(f"{file.taken} tensors from {file.label} {file.sha256[:12]}")
    context.artefacts.put(NETWORK, loaded)
    context.artefacts.put(WEIGHTS, loaded.imported)


LOAD = Step(name="load", makes=(NETWORK, WEIGHTS), run=_run)
