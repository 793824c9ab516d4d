"""Last step: seal everything into a bundle."""

from __future__ import annotations

import datetime
import importlib.metadata
from collections.abc import Mapping, Sequence
from pathlib import Path

import rt_ris
from rt_ris.bundle import write_bundle
from rt_ris.manifest import GOLDEN as GOLDEN_FILE
from rt_ris.manifest import PARITY as PARITY_FILE
from rt_ris.manifest import TOKENIZER, Manifest, Provenance, StageArtefact
from rt_ris.records import to_json
from rt_ris.spec import StageSpec, TargetSpec
from rt_ris_export import onnx_graph
from rt_ris_export.artefacts import BUNDLE, GOLDEN, GRAPHS, NETWORK, PARITY, WEIGHTS
from rt_ris_export.parity_record import ParityRecord
from rt_ris_export.step import Context, Step
from rt_ris_export.steps.trace import OPSET
from rt_ris_train.checkpoint import LoadedNetwork
from rt_ris_train.official import Imported

LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy", "pillow", "tokenizers")


def draft_manifest(
    loaded: LoadedNetwork,
    graphs: Mapping[str, Path],
    *,
    parity: ParityRecord,
    weights: Sequence[Imported] = (),
) -> Manifest:
    """The manifest of a bundle that is about to be written.

    Args:
        loaded: the network.
        graphs: its ONNX files by stage id.
        parity: the gate's record.
        weights: published files that filled frozen encoders.
    """
    network = loaded.network
    return Manifest(
        architecture=loaded.architecture.name,
        variant=loaded.variant_name,
        stages=tuple(_artefact(stage.spec, graphs[stage.spec.id]) for stage in network.stages()),
        image=network.image,
        text=network.text,
        mask=network.mask,
        provenance=_provenance(loaded, weights),
        parity=parity.summary(),
    )


def _artefact(spec: StageSpec, path: Path) -> StageArtefact:
    model = onnx_graph.parse(path.read_bytes())
    return StageArtefact(
        spec=spec,
        file=path.name,
        target=TargetSpec(format="onnx", precision="fp32"),
        multiply_adds=onnx_graph.multiply_adds(model),
        parameters=onnx_graph.parameters(model),
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
    artefacts, output = context.artefacts, context.output
    loaded, graphs = artefacts.get(NETWORK), artefacts.get(GRAPHS)
    parity, weights = artefacts.get(PARITY), artefacts.get(WEIGHTS)
    context.say(f"sealing {output}")
    bundle = write_bundle(
        output,
        manifest=draft_manifest(loaded, graphs, parity=parity, weights=weights),
        members={
            TOKENIZER: loaded.network.tokenizer_json().encode(),
            PARITY_FILE: to_json(parity),
            GOLDEN_FILE: artefacts.get(GOLDEN),
            **{path.name: path for path in graphs.values()},
        },
        overwrite=context.recipe.overwrite,
    )
    artefacts.put(BUNDLE, bundle.path)


PACK = Step(
    name="pack",
    needs=(NETWORK, WEIGHTS, GRAPHS, PARITY, GOLDEN),
    makes=(BUNDLE,),
    run=_run,
)
