"""The record that a gate passed on a GPU, and what makes it count."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from rt_ris.build.cache import kernels_identity
from rt_ris.build.find import RECORD_LIMIT
from rt_ris.build.record import EngineRecord, GateRecord, Here, gate_name, verify_command
from rt_ris.build.trust import read_trusted
from rt_ris.bundle import Bundle, replace_file, storage_error
from rt_ris.errors import IntegrityError, ManifestError, TargetMismatchError
from rt_ris.records import from_data, parse_json, to_json


def check_gate(
    folder: Path, bundle: Bundle, here: Here, records: Mapping[str, EngineRecord]
) -> GateRecord:
    """The gate record of these engines on this GPU.

    Raises:
        TargetMismatchError: no gate has passed here, or it passed for something else.
        IntegrityError: the record cannot be trusted or breaks its format.
    """
    path = folder / gate_name(here.gpu)
    command = verify_command(bundle, folder, here.target)
    if not path.exists():
        raise TargetMismatchError(
            f"The engines in '{folder}' are unverified on {here.gpu.name}: no gate has passed on "
            f"it. Run it with: {command}",
            expected=path.name,
            found="nothing",
        )
    record = read_gate(path)
    for what, expected, found in _facts(record, bundle, here, records):
        if expected != found:
            raise TargetMismatchError(
                f"The gate in '{path}' passed with {what} {found}; here it is {expected}. Run it "
                f"again with: {command}",
                expected=expected,
                found=found,
            )
    return record


def write_gate(folder: Path, record: GateRecord) -> Path:
    """Write a gate record; it appears whole or not at all.

    Raises:
        StorageError: writing failed, such as on a full disk.
    """
    path = folder / gate_name(record.gpu)
    try:
        replace_file(path, to_json(record))
    except OSError as error:
        raise storage_error(path, error, what="gate record") from error
    return path


def read_gate(path: Path) -> GateRecord:
    """A gate record.

    Raises:
        IntegrityError: it cannot be trusted or breaks its format.
    """
    try:
        return from_data(GateRecord, parse_json(read_trusted(path, limit=RECORD_LIMIT)))
    except ManifestError as error:
        raise IntegrityError(
            f"The gate record '{path}' breaks its format: {error} Remove it, and run the gate "
            "again.",
            member=path.name,
        ) from error


def _facts(
    record: GateRecord, bundle: Bundle, here: Here, records: Mapping[str, EngineRecord]
) -> Iterator[tuple[str, str, str]]:
    """What a record must say, as triples of its name, the value here and the record's."""
    yield "GPU", here.gpu.name, record.gpu.name
    yield "driver", here.gpu.driver, record.gpu.driver
    for name in ("sm", "multiprocessors", "memory_mib"):
        yield f"GPU {name}", str(getattr(here.gpu, name)), str(getattr(record.gpu, name))
    yield "target", here.target, record.target
    yield f"{here.target} version", here.version, record.version
    yield "bundle", bundle.sha256, record.bundle_sha256
    for engine in records.values():
        found = record.engines.get(engine.engine, "nothing")
        yield f"engine '{engine.engine}'", engine.sha256, found
    if any(engine.plugin for engine in records.values()):
        yield "kernels", kernels_identity(), record.kernels or "none"
