"""Last step: the runtime opens what was sealed, as a user will, and replays it.

The gate before this one ran graphs; this one runs the bundle: its manifest, its tokenizer, its
graphs as they lie on the disk. Only a bundle that passes is moved to its place.
"""

from __future__ import annotations

from collections.abc import Mapping

from rt_ris.build.replay import replay
from rt_ris.bundle import Bundle, check_target, put_in_place
from rt_ris.errors import ParityError
from rt_ris.manifest import Manifest
from rt_ris.predictor import Predictor
from rt_ris_export.artefacts import BUNDLE, MEASURED, NETWORK, SEALED
from rt_ris_export.step import Context, Step
from rt_ris_export.steps.precision import TYPED, TypedGraphs
from rt_ris_export.workspace import storage_error
from rt_ris_train.architecture import ReferringNetwork

MANIFEST = "manifest"
"""The stage that is named where the manifest says something else than the network."""


def check_declarations(manifest: Manifest, network: ReferringNetwork, graphs: TypedGraphs) -> None:
    """Compare what a manifest says of pictures, sentences, masks and stages with the network.

    Raises:
        ParityError: they differ; ``stage`` is ``manifest``.
    """
    stages = tuple(graphs.specs[stage.spec.id] for stage in network.stages())
    for name, said, truth in (
        ("image", manifest.image, network.image),
        ("text", manifest.text, network.text),
        ("mask", manifest.mask, network.mask),
        ("stages", tuple(stage.spec for stage in manifest.stages), stages),
    ):
        if said != truth:
            raise ParityError(
                f"The manifest says of '{name}': {said}; the network was trained with {truth}. "
                "No bundle was written.",
                stage=MANIFEST,
                error=1.0,
            )


def check_measured(manifest: Manifest, measured: Mapping[str, str]) -> None:
    """Compare the sealed graphs with those that the gate measured.

    Args:
        manifest: of the sealed bundle.
        measured: SHA-256 by file name.

    Raises:
        ParityError: they differ; ``stage`` is the first.
    """
    for stage in manifest.stages:
        for name in manifest.graph_files(stage):
            if manifest.members[name].sha256 != measured.get(name):
                raise ParityError(
                    f"The sealed '{name}' of stage '{stage.spec.id}' is not the file that was "
                    "measured. No bundle was written.",
                    stage=stage.spec.id,
                    error=1.0,
                )


def _replay(bundle: Bundle) -> None:
    with Predictor.load(bundle.path, backend="onnxruntime") as predictor:
        miss = replay(bundle, predictor).first_miss
    if miss is not None:
        raise ParityError(
            f"The sealed bundle does not compute what PyTorch computed: '{miss.step}' is the "
            f"first step that differs, {miss.name!r} of picture {miss.case} is off by "
            f"{miss.error:.2e} (limit {miss.limit:.0e}). No bundle was written.",
            stage=miss.step,
            error=miss.error,
        )


def _run(context: Context) -> None:
    artefacts, output = context.artefacts, context.output.absolute()
    context.say("the runtime replays the sealed bundle")
    sealed = Bundle.open(artefacts.get(SEALED))
    check_declarations(sealed.manifest, artefacts.get(NETWORK).network, artefacts.get(TYPED))
    check_measured(sealed.manifest, artefacts.get(MEASURED))
    _replay(sealed)
    check_target(output, overwrite=context.recipe.overwrite)
    try:
        put_in_place(sealed.path, output)
    except OSError as error:
        raise storage_error(output, error) from error
    artefacts.put(BUNDLE, output)


REPLAY = Step(name="replay", needs=(NETWORK, TYPED, MEASURED, SEALED), makes=(BUNDLE,), run=_run)
