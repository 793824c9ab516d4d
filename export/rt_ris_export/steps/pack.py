"""Seal everything into a bundle, in the workspace."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Sequence

import rt_ris
from rt_ris.bundle import write_bundle
from rt_ris.manifest import GOLDEN as GOLDEN_FILE
from rt_ris.manifest import PARITY as PARITY_FILE
from rt_ris.manifest import TOKENIZER, Manifest, Provenance, StageArtefact
from rt_ris.records import to_json
from rt_ris.spec import TargetSpec
from rt_ris_export.artefacts import GOLDEN, NETWORK, PARITY, SEALED, WEIGHTS
from rt_ris_export.parity_record import ParityRecord
from rt_ris_export.rounding import RANGES
from rt_ris_export.step import Context, Step
from rt_ris_export.steps.precision import TYPED, TypedGraphs
from rt_ris_export.steps.trace import OPSET
from rt_ris_train.checkpoint import LoadedNetwork
from rt_ris_train.official import Imported

RANGES_FILE = "ranges.json"
LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow", "tokenizers")


def draft_manifest(
    loaded: LoadedNetwork,
    graphs: TypedGraphs,
    *,
    parity: ParityRecord,
    weights: Sequence[Imported] = (),
) -> Manifest:
    """The manifest of a bundle that is about to be written.

    Args:
        loaded: the network.
        graphs: its ONNX files.
        parity: the gate's record.
        weights: published files that filled frozen encoders.
    """
    network = loaded.network
    return Manifest(
        architecture=loaded.architecture.name,
        variant=loaded.variant_name,
        stages=tuple(_artefact(graphs, stage.spec.id) for stage in network.stages()),
        image=network.image,
        text=network.text,
        mask=network.mask,
        provenance=_provenance(loaded, weights),
        parity=parity.summary(),
    )


def _artefact(graphs: TypedGraphs, stage: str) -> StageArtefact:
    share = graphs.shares[stage]
    return StageArtefact(
        spec=graphs.specs[stage],
        file=graphs.files[stage].name,
        target=TargetSpec(format=graphs.formats[stage], precision=graphs.precision(stage)),
        multiply_adds=share.spent,
        parameters=share.stored,
        half_weights=share.weights,
        half_multiply_adds=share.multiply_adds,
        operators=graphs.operators[stage],
    )


def _provenance(loaded: LoadedNetwork, weights: Sequence[Imported]) -> Provenance:
    architecture = loaded.architecture
    licence = architecture.variant(loaded.variant_name).weights_licence
    head = "seeded random weights, not trained" if loaded.seeded else "as its checkpoint"
    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    versions |= {f"weights {file.label}": f"sha256 {file.sha256}" for file in weights}
    now = datetime.datetime.now(datetime.timezone.utc)
    return Provenance(
        rt_ris=rt_ris.__version__,
        created=now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        checkpoint_sha256=loaded.checkpoint_sha256,
        source=architecture.source,
        licences={"frozen weights": licence, "head": head},
        opset=OPSET,
        libraries=versions,
    )


def _run(context: Context) -> None:
    artefacts = context.artefacts
    loaded, graphs = artefacts.get(NETWORK), artefacts.get(TYPED)
    parity, weights = artefacts.get(PARITY), artefacts.get(WEIGHTS)
    any_half = any(artefacts.get(RANGES).values())
    context.say("sealing")
    bundle = write_bundle(
        context.workspace.folder / "sealed",
        manifest=draft_manifest(loaded, graphs, parity=parity, weights=weights),
        members={
            TOKENIZER: loaded.network.tokenizer_json().encode(),
            PARITY_FILE: to_json(parity),
            GOLDEN_FILE: artefacts.get(GOLDEN),
            **({RANGES_FILE: to_json(artefacts.get(RANGES))} if any_half else {}),
            **{path.name: path for stage in graphs.files for path in graphs.written(stage)},
        },
    )
    artefacts.put(SEALED, bundle.path)


PACK = Step(
    name="pack",
    needs=(NETWORK, WEIGHTS, TYPED, PARITY, GOLDEN, RANGES),
    makes=(SEALED,),
    run=_run,
)
