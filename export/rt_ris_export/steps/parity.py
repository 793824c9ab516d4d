"""The gate: what was exported must compute what PyTorch computes, from uint8 pixels on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Final

from rt_ris.errors import ParityError
from rt_ris.records import to_data
from rt_ris_export.artefacts import GOLDEN, MEASURED, NETWORK, PARITY
from rt_ris_export.gate_data import (
    GateSample,
    samples_of,
    shipped_samples,
    sideways_sample,
)
from rt_ris_export.golden import pack_golden
from rt_ris_export.judge import judge_proof
from rt_ris_export.limits import LIMITS
from rt_ris_export.measure import measure
from rt_ris_export.parity_record import StageParity
from rt_ris_export.recipe import ExportRecipe
from rt_ris_export.rounding import RANGES, RememberingRunner
from rt_ris_export.step import Context, Step
from rt_ris_export.steps.precision import TYPED
from rt_ris_export.third_party import check_conventions
from rt_ris_export.truth import Observation, observe

PLAIN_PICTURES: Final = 2
"""Pictures, and the one on its side, on which halves are compared without their rounding."""


def _samples(recipe: ExportRecipe) -> tuple[GateSample, ...]:
    if recipe.gate is None:
        return shipped_samples()
    return samples_of(recipe.gate, split=recipe.gate_split)


def _run(context: Context) -> None:
    recipe, loaded = context.recipe, context.artefacts.get(NETWORK)
    context.say("pictures and masks, beside what others make of them")
    check_conventions()
    graphs = context.artefacts.get(TYPED)
    half = recipe.precision == "fp16"
    observed = observe(loaded.network, _samples(recipe), say=context.say)
    sideways = observe(loaded.network, [sideways_sample()], say=context.say)
    few = [*observed[: 2 * PLAIN_PICTURES], *sideways]  # two calls on each picture
    if not loaded.seeded:
        judge_proof(observed, loaded.network.mask)
    plain: tuple[StageParity, ...] = ()
    if half:
        context.say("the graphs in exact arithmetic first: a fault there is none of rounding")
        plain = _in_exact_arithmetic(context, few)
    rounding = partial(RememberingRunner, memory={})
    while True:
        try:
            measured = measure(
                loaded.network,
                graphs.files,
                observed=observed if half else [*observed, *sideways],
                limits=recipe.limits(),
                specs=graphs.specs,
                opened=rounding if half else None,
                settled=graphs.settled(),
                seeded=loaded.seeded,
                say=context.say,
            )
            break
        except ParityError as error:
            if recipe.remedy == "none" or not graphs.climb(error.cause):
                raise _advised(error, recipe, graphs.steps, plain) from error
            context.say(f"{error} Remedy: {graphs.steps[-1]}")
    if graphs.steps:
        context.say("what the remedies made, in exact arithmetic")
        plain = _in_exact_arithmetic(context, few)
    context.artefacts.put(
        PARITY, replace(measured.record, remedies=tuple(graphs.steps), plain=plain)
    )
    context.artefacts.put(MEASURED, graphs.sha256())
    context.artefacts.put(GOLDEN, pack_golden(measured.golden))
    context.artefacts.put(RANGES, measured.ranges)


def _in_exact_arithmetic(
    context: Context, observed: Sequence[Observation]
) -> tuple[StageParity, ...]:
    """Graphs in half precision without its rounding, judged by the limits of float32."""
    measured = measure(
        context.artefacts.get(NETWORK).network,
        context.artefacts.get(TYPED).widened(),
        observed=observed,
        limits=LIMITS["fp32"],
        say=context.say,
    )
    return measured.record.stages


def _advised(
    error: ParityError, recipe: ExportRecipe, tried: Sequence[str], plain: Sequence[StageParity]
) -> ParityError:
    """A miss with what may help, or what was tried."""
    if recipe.precision == "fp32":
        return error
    advice = "--remedy auto computes more of it in float32, --precision fp32 all."
    if recipe.remedy == "auto":
        advice = f"Tried: {'; '.join(tried) or 'nothing that would help'}. Use --precision fp32."
    return ParityError(
        f"{error} {advice}",
        stage=error.stage,
        cause=error.cause,
        error=error.error,
        measured={**error.measured, "plain": to_data(plain), "remedies": list(tried)},
    )


PARITY_GATE = Step(
    name="parity",
    needs=(NETWORK, TYPED),
    makes=(PARITY, GOLDEN, RANGES, MEASURED),
    run=_run,
)
