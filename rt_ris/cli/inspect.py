"""``rt-ris inspect``: what a bundle holds, without opening an engine."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rt_ris.bundle import Bundle
from rt_ris.cli.options import add_json, print_json
from rt_ris.manifest import Manifest, StageArtefact
from rt_ris.records import to_data
from rt_ris.spec import Dependency, StageGraph, TensorSpec


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    parser = subparsers.add_parser(
        "inspect",
        help="show what a bundle holds",
        description="Check a bundle's bytes and show its stages, what each depends on, what is "
        "cached per picture and per sentence, and where the bundle comes from.",
    )
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Check the bundle and print."""
    bundle = Bundle.open(args.bundle)
    bundle.verify()
    found = describe(bundle)
    if args.json:
        print_json(found)
    else:
        print("\n".join(_lines(bundle.manifest, found)))
    return 0


def describe(bundle: Bundle) -> dict[str, Any]:
    """What ``--json`` prints."""
    manifest = bundle.manifest
    graph = manifest.graph()
    return {
        "bundle": str(bundle.path),
        "sha256": bundle.sha256,
        "bytes": sum(member.bytes for member in manifest.members.values()),
        "architecture": manifest.architecture,
        "variant": manifest.variant,
        "stages": [_stage(stage, manifest, graph) for stage in manifest.stages],
        "cached_per_image": _cached(graph, Dependency.IMAGE),
        "cached_per_sentence": _cached(graph, Dependency.TEXT),
        "image": to_data(manifest.image),
        "text": to_data(manifest.text),
        "mask": to_data(manifest.mask),
        "parity": to_data(manifest.parity),
        "provenance": to_data(manifest.provenance),
    }


def _stage(stage: StageArtefact, manifest: Manifest, graph: StageGraph) -> dict[str, Any]:
    member = manifest.members[stage.file]
    return {
        "id": stage.spec.id,
        "role": stage.spec.role,
        "depends_on": graph.dependency(stage.spec.id).value,
        "file": stage.file,
        "bytes": member.bytes,
        "target": to_data(stage.target),
        "multiply_adds": stage.multiply_adds,
        "parameters": stage.parameters,
        "operators": to_data(stage.operators),
        "inputs": [str(spec) for spec in stage.spec.inputs],
        "outputs": [str(spec) for spec in stage.spec.outputs],
    }


def _cached(graph: StageGraph, dependency: Dependency) -> dict[str, Any]:
    """What a cache holds of one picture or one sentence; nothing where no stage can be skipped."""
    specs: tuple[TensorSpec, ...] = graph.held(dependency) if graph.of(dependency) else ()
    return {
        "tensors": [str(spec) for spec in specs],
        "bytes": sum(spec.nbytes() for spec in specs),
    }


def _lines(manifest: Manifest, found: dict[str, Any]) -> Iterator[str]:
    name = f"{manifest.architecture} ({manifest.variant})"
    yield f"{found['bundle']}: {name}, {_size(found['bytes'])}"
    yield f"sealed as {found['sha256']}"
    yield ""
    head = f"{'stage':<16}{'role':<15}{'depends on':<12}"
    yield head + f"{'multiply-adds':>14}{'parameters':>12}  file"
    for stage in found["stages"]:
        depends = {"both": "image, text"}.get(stage["depends_on"], stage["depends_on"])
        yield (
            f"{stage['id']:<16}{stage['role']:<15}{depends:<12}"
            f"{_count(stage['multiply_adds']):>14}{_count(stage['parameters']):>12}  "
            f"{stage['file']} ({stage['target']['format']}, {stage['target']['precision']}, "
            f"{_size(stage['bytes'])})"
        )
    yield ""
    for what in ("image", "sentence"):
        cached = found[f"cached_per_{what}"]
        names = ", ".join(cached["tensors"]) or "nothing: no stage depends on it alone"
        yield f"cached per {what}: {_size(cached['bytes'])}: {names}"
    yield from _spec_lines(manifest)


def _spec_lines(manifest: Manifest) -> Iterator[str]:
    image, text, mask = manifest.image, manifest.text, manifest.mask
    origin, parity = manifest.provenance, manifest.parity
    yield f"picture: {image.size} x {image.size}, {image.fit}, {image.resample}"
    yield f"sentence: at most {text.max_tokens} tokens, {text.length} positions"
    exists = mask.existence_threshold
    yield (
        f"mask: {mask.size} x {mask.size} {mask.interpolate}, above {mask.threshold}"
        + ("" if exists is None else f", empty below existence {exists}")
    )
    yield (
        f"parity with PyTorch: relative error {parity.relative_error:.1e} (limit "
        f"{parity.relative_error_limit:.0e}), mask IoU {parity.mask_iou:.4f} (limit "
        f"{parity.mask_iou_limit}), {parity.flips} flips in {parity.cases} masks"
    )
    yield f"made {origin.created} by rt-ris {origin.rt_ris}, opset {origin.opset}"
    yield f"checkpoint {origin.checkpoint_sha256 or 'none: seeded random weights'}"
    yield f"source: {origin.source}"
    for what, licence in origin.licences.items():
        yield f"licence of {what}: {licence}"


def _count(number: int) -> str:
    for unit, name in ((10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return str(number)


def _size(count: int) -> str:
    for unit, name in ((1 << 30, "GiB"), (1 << 20, "MiB"), (1 << 10, "KiB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"
