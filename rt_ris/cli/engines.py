"""What doctor says of a folder of engines: which are there, for what, and whether they may run.

For each stage it judges the engine that the runtime would choose, by the runtime's own checks.
Where no GPU or no library is here, records and bytes are looked at and nothing is called ``ok``.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rt_ris.backends import BACKENDS
from rt_ris.backends.cuda import dotted
from rt_ris.backends.tensorrt import here
from rt_ris.build.find import find_engine, read_engine, read_record
from rt_ris.build.gate import check_gate
from rt_ris.build.record import (
    LOCAL,
    EngineRecord,
    Here,
    build_command,
    engine_name,
    gate_name,
    verify_command,
)
from rt_ris.build.request import MODULES, Target
from rt_ris.build.trust import check_folder
from rt_ris.bundle import Bundle
from rt_ris.cli.probe import engine
from rt_ris.cli.requirements import Row
from rt_ris.errors import IntegrityError, RtRisError, TargetMismatchError
from rt_ris.manifest import StageArtefact


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where engines of one target would run.

    Attributes:
        target: which library runs them.
        here: the library and the GPU; None where one of them is missing.
        why_not: what is missing.
    """

    target: Target
    here: Here | None
    why_not: str = ""


def look_at_engines(bundle: Bundle, folder: Path) -> tuple[Row, ...]:
    """All rows, by targets of which the folder has engines."""
    found = targets(bundle, folder)
    if not found:
        return (_nothing_there(bundle, folder),)
    return tuple(row for target in found for row in _rows(bundle, folder, _place(target)))


def targets(bundle: Bundle, folder: Path) -> tuple[Target, ...]:
    """Those of which the folder has an engine of some stage."""
    stages = bundle.manifest.stages
    return tuple(one for one in MODULES if any(_names(folder, stage, one) for stage in stages))


def _place(target: Target) -> Place:
    """What is here of a target; a library that may crash is imported elsewhere first."""
    entry = BACKENDS[target]
    fault = engine(MODULES[target]).fault
    if fault:
        return Place(target=target, here=None, why_not=f"{entry.engine} is broken: {fault}")
    if not entry.installed():
        why_not = f"{entry.engine} is not installed; run: {entry.pip_line()}"
        return Place(target=target, here=None, why_not=why_not)
    try:
        return Place(target=target, here=here(target))
    except (RtRisError, ImportError, OSError) as error:
        return Place(target=target, here=None, why_not=str(error))


def _nothing_there(bundle: Bundle, folder: Path) -> Row:
    """The row of a folder that has no engine of a bundle, or is not there."""
    rtx_alone = BACKENDS["tensorrt-rtx"].installed() and not BACKENDS["tensorrt"].installed()
    target: Target = "tensorrt-rtx" if rtx_alone else "tensorrt"
    return Row(
        need="engines",
        expected=str(folder),
        found="no engine of this bundle" if folder.is_dir() else "no such folder",
        consequence="the bundle runs on the processor alone; engines for a GPU of this machine are "
        f"built with: {build_command(bundle, folder, target)}",
        verdict="absent",
    )


def _rows(bundle: Bundle, folder: Path, place: Place) -> tuple[Row, ...]:
    """A row for the engine of each stage, and one for the gate."""
    try:
        check_folder(folder)
    except RtRisError as error:
        return (_fails(f"{place.target} folder", error, expected="your own", found=str(folder)),)
    records: dict[str, EngineRecord] = {}
    rows = [_stage_row(bundle, folder, place, stage, records) for stage in bundle.manifest.stages]
    return (*rows, _gate_row(bundle, folder, place, records))


def _stage_row(
    bundle: Bundle,
    folder: Path,
    place: Place,
    stage: StageArtefact,
    records: dict[str, EngineRecord],
) -> Row:
    """Judge the engine of one stage; where it may be run, its record is put into ``records``."""
    need, names = f"{place.target} {stage.spec.id}", _names(folder, stage, place.target)
    expected = _told(place)
    if not names:
        command = build_command(bundle, folder, place.target)
        text = f"there is none, so the bundle's engines do not run; build them with: {command}"
        return Row(need=need, expected=expected, found="none", consequence=text, verdict="absent")
    try:
        if place.here is None:
            there = "; ".join(_described(_whole(folder, name)) for name in names)
            text = f"as they were built, for which GPU is said; not judged here: {place.why_not}"
            return Row(
                need=need, expected=expected, found=there, consequence=text, verdict="unknown"
            )
        record = find_engine(folder, bundle, place.here, stage)
        read_engine(folder, record)
    except (IntegrityError, TargetMismatchError) as error:
        return _fails(need, error, expected=expected, found=", ".join(names))
    records[stage.spec.id] = record
    text = "of this bundle, for this version and GPU, and as it was built"
    return Row(
        need=need, expected=expected, found=_described(record), consequence=text, verdict="ok"
    )


def _gate_row(bundle: Bundle, folder: Path, place: Place, records: dict[str, EngineRecord]) -> Row:
    need, command = f"{place.target} gate", verify_command(bundle, folder, place.target)
    there = ", ".join(sorted(path.name for path in folder.glob("verified.*.json"))) or "none"
    if place.here is None:
        text = f"a gate counts where it passed; where these engines shall run: {command}"
        return Row(
            need=need, expected=_told(place), found=there, consequence=text, verdict="unknown"
        )
    expected = gate_name(place.here.gpu)
    if len(records) < len(bundle.manifest.stages):
        text = f"no gate counts before every engine above is ok; then: {command}"
        return Row(need=need, expected=expected, found=there, consequence=text, verdict="unknown")
    try:
        gate = check_gate(folder, bundle, place.here, records)
    except (IntegrityError, TargetMismatchError) as error:
        return _fails(need, error, expected=expected, found=there)
    return Row(
        need=need,
        expected=expected,
        found=f"passed on {gate.created}: relative error {gate.relative_error:.1e} (limit "
        f"{gate.relative_error_limit:.0e}), mask IoU {gate.mask_iou:.4f} (limit "
        f"{gate.mask_iou_limit})",
        consequence=f"verified on this GPU; --backend {place.target} runs them",
        verdict="ok",
    )


def _names(folder: Path, stage: StageArtefact, target: Target) -> Sequence[str]:
    """Names of a stage's engines for any device, also of those that lack a record."""
    name = re.escape(engine_name(stage, target, "DEVICE")).replace("DEVICE", rf"({LOCAL}|sm\d+)")
    files = (path.name.removesuffix(".json") for path in folder.glob("*.engine*"))
    return sorted({file for file in files if re.fullmatch(name, file)})


def _whole(folder: Path, name: str) -> EngineRecord:
    """The record of an engine whose bytes are those that were built."""
    record = read_record(folder / f"{name}.json")
    read_engine(folder, record)
    return record


def _described(record: EngineRecord) -> str:
    gpu = "" if record.gpu is None else f" on {record.gpu.name}"
    return (
        f"{record.engine}, {record.bytes / 2**20:.1f} MiB, built by {record.version}{gpu} for "
        f"compute capability {dotted(record.sm)}"
    )


def _told(place: Place) -> str:
    """What engines would be run by and on."""
    if place.here is None:
        return f"{place.target} and a GPU"
    gpu = place.here.gpu
    return f"{place.target} {place.here.version} on {gpu.name}, compute capability {dotted(gpu.sm)}"


def _fails(need: str, error: RtRisError, *, expected: str, found: str) -> Row:
    return Row(need=need, expected=expected, found=found, consequence=str(error), verdict="fails")
