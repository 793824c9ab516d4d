"""From a bundle to the engines of its stages, each checked before any parser sees it.

The order is the point: whose folder it is, what the records say, whether a gate passed here, and
only then the engine's bytes against their hash.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, NoReturn

from rt_ris.backends.cuda import dotted
from rt_ris.build.record import (
    LOCAL,
    EngineRecord,
    Here,
    build_command,
    engine_name,
    this_platform,
)
from rt_ris.build.trust import check_folder, read_trusted
from rt_ris.bundle import Bundle
from rt_ris.errors import IntegrityError, ManifestError, TargetMismatchError
from rt_ris.manifest import StageArtefact
from rt_ris.records import from_data, parse_json

RECORD_LIMIT: Final = 1 << 16
ELF: Final = b"\x7fELF"


def check_graphs(bundle: Bundle) -> None:
    """Refuse graphs that no builder reads.

    Raises:
        TargetMismatchError: naming the first such stage, with the command that exports others.
    """
    manifest = bundle.manifest
    for stage in manifest.stages:
        if stage.target.format != "onnx":
            raise TargetMismatchError(
                f"Stage '{stage.spec.id}' was exported for {stage.target.format}: its graph holds "
                "operators that no builder reads, so there are no engines of this bundle. Export "
                f"one for builders: rt-ris export --arch {manifest.architecture} --variant "
                f"{manifest.variant} --target onnx, and the same checkpoint.",
                expected="onnx",
                found=stage.target.format,
            )


def find_engines(folder: Path, bundle: Bundle, here: Here) -> Mapping[str, EngineRecord]:
    """The record of each stage's engine for what is here, by stage id; no engine is read yet.

    Raises:
        OutputError: there is no such folder.
        IntegrityError: the folder or a record cannot be trusted, or a record breaks its format.
        TargetMismatchError: an engine is of another bundle, version, platform or GPU, or there is
            none for this GPU; the message holds the command that builds it.
    """
    check_graphs(bundle)
    check_folder(folder)
    stages = bundle.manifest.stages
    return {stage.spec.id: find_engine(folder, bundle, here, stage) for stage in stages}


def find_engine(folder: Path, bundle: Bundle, here: Here, stage: StageArtefact) -> EngineRecord:
    """The record of one stage's engine for what is here, in a folder that was checked.

    Raises:
        IntegrityError, TargetMismatchError: as ``find_engines`` does.
    """
    record = _record(folder, bundle, here, stage)
    _check(record, folder, bundle, here, stage)
    return record


def read_engine(folder: Path, record: EngineRecord) -> bytes:
    """An engine's bytes, after all that can be said of them without parsing.

    Raises:
        IntegrityError: they are not those that were built, or hold a program beside the engine.
    """
    raw = read_trusted(folder / record.engine, limit=max(record.bytes, 0))
    if len(raw) != record.bytes:
        _damaged(record, "bytes", str(record.bytes), str(len(raw)))
    found = hashlib.sha256(raw).hexdigest()
    if found != record.sha256:
        _damaged(record, "SHA-256", record.sha256, found)
    if record.target == "tensorrt-rtx" and ELF in raw:
        # What rt-ris builds holds none; a library inside a plan would be loaded and run. Plans of
        # TensorRT itself hold GPU programs of the same format, so there the hash has to do.
        raise IntegrityError(
            f"'{record.engine}' holds a program for the processor; TensorRT-RTX engines of rt-ris "
            "never do. It was not made by `rt-ris build`; remove it and build it yourself.",
            member=record.engine,
            expected="no ELF image",
            found="an ELF image",
        )
    return raw


def read_record(path: Path) -> EngineRecord:
    """A record of an engine.

    Raises:
        IntegrityError: it cannot be trusted or breaks its format.
    """
    raw = read_trusted(path, limit=RECORD_LIMIT)
    try:
        record = from_data(EngineRecord, parse_json(raw))
    except ManifestError as error:
        raise IntegrityError(
            f"The record '{path}' breaks its format: {error} Build the engines with this rt-ris.",
            member=path.name,
        ) from error
    if f"{record.engine}.json" != path.name:
        raise IntegrityError(
            f"The record '{path}' is of '{record.engine}'; a record stands beside its engine under "
            "the engine's name. Copy the engines again, or build them.",
            member=path.name,
            expected=path.name.removesuffix(".json"),
            found=record.engine,
        )
    return record


def _record(folder: Path, bundle: Bundle, here: Here, stage: StageArtefact) -> EngineRecord:
    wanted = [engine_name(stage, here.target, one) for one in (LOCAL, f"sm{here.gpu.sm}")]
    for name in wanted:
        if (folder / f"{name}.json").exists():
            return read_record(folder / f"{name}.json")
    others = sorted(path.name for path in folder.glob(f"{stage.spec.id}.*.engine"))
    raise TargetMismatchError(
        f"'{folder}' has no engine of stage '{stage.spec.id}' for {here.target} on {here.gpu.name} "
        f"(compute capability {dotted(here.gpu.sm)}); it has {', '.join(others) or 'none of it'}. "
        f"Build it with: {build_command(bundle, folder, here.target)}",
        expected=" or ".join(wanted),
        found=", ".join(others),
    )


def _check(
    record: EngineRecord, folder: Path, bundle: Bundle, here: Here, stage: StageArtefact
) -> None:
    for what, expected, found in _facts(record, bundle, here, stage):
        if expected != found:
            raise TargetMismatchError(
                f"Engine '{record.engine}' has {what} {found}; here it must be {expected}. Rebuild "
                f"with: {build_command(bundle, folder, here.target)}",
                expected=expected,
                found=found,
            )


def _facts(
    record: EngineRecord, bundle: Bundle, here: Here, stage: StageArtefact
) -> Iterator[tuple[str, str, str]]:
    """What a record must say, as triples of its name, the value here and the record's."""
    graph = bundle.manifest.graph_sha256(stage)
    yield "stage", stage.spec.id, record.stage
    yield "precision", stage.target.precision, record.precision
    yield "bundle", bundle.sha256, record.bundle_sha256
    yield "graph", graph, record.graph_sha256
    yield "target", here.target, record.target
    yield f"{here.target} version", here.version, record.version
    yield "compute capability", str(here.gpu.sm), str(record.sm)
    if record.target == "tensorrt":  # its plans are bound to one model of GPU and to the machine
        yield "GPU", here.gpu.name, record.gpu.name if record.gpu else "none"
        yield "platform", this_platform(), record.platform


def _damaged(record: EngineRecord, what: str, expected: str, found: str) -> NoReturn:
    raise IntegrityError(
        f"Engine '{record.engine}' has {what} {found}; its record says {expected}. The copy is "
        "incomplete or damaged; copy it again, or build it.",
        member=record.engine,
        expected=expected,
        found=found,
    )
