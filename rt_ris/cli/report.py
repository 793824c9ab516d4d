"""The report of ``rt-ris verify --report``: one JSON file that a user can send to who can help.

It holds versions, the machine, what ``doctor`` says, every comparison of the replay, times and the
error. It names nobody: paths are cut to their last part, names of the user and the host replaced.
``docs/verify_report.md`` describes it.
"""

from __future__ import annotations

import datetime
import getpass
import json
import os
import platform
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import rt_ris
from rt_ris.bundle import Bundle
from rt_ris.cli.doctor import PACKAGES, look
from rt_ris.cli.engines import look_at_engines
from rt_ris.cli.files import write_whole
from rt_ris.cli.probe import version
from rt_ris.errors import OutputError
from rt_ris.records import to_data
from rt_ris.timing import Timing

REPORT_VERSION: Final = 1

NOBODY: Final = frozenset({"", "root", "localhost"})
"""Names that many machines share, and that are words of messages."""

_PART = r"[^\s/'\":;,()]+"
_PATH = re.compile(rf"(?<![\w.])(?:~|/{_PART})(?:/{_PART})*/({_PART})")


@dataclass(kw_only=True)
class Evidence:
    """What a run of ``verify`` came to know, as far as it got.

    Attributes:
        bundle: None where it could not be opened.
        backend: that was asked for, or that ``auto`` stood for.
        engines: their folder; None where the bundle's graphs are run.
        replay: the comparisons, as ``--json`` prints them; None where there were none.
        timings: of each stage that ran.
        error: what ended it; None where the gate passed.
    """

    bundle: Bundle | None = None
    backend: str = ""
    engines: Path | None = None
    replay: Mapping[str, Any] | None = None
    timings: Mapping[str, Timing] = field(default_factory=dict)
    error: Exception | None = None


def check_report(path: Path | None, *, overwrite: bool) -> None:
    """Refuse a place for the report before anything runs.

    Raises:
        OutputError: something is there, the folder is missing, or there is nothing to overwrite.
    """
    if path is None:
        if overwrite:
            raise OutputError("--overwrite is about a report; give --report FILE with it.")
        return
    if not path.absolute().parent.is_dir():
        raise OutputError(f"The folder of the report {path} does not exist; create it first.")
    if path.is_dir() or (os.path.lexists(path) and not overwrite):
        raise OutputError(f"{path} exists; choose another file for the report, or --overwrite.")


def write_report(path: Path, evidence: Evidence, *, asked: Path) -> None:
    """Write the report.

    Args:
        path: of the report; one that is there is replaced.
        evidence: what is known.
        asked: the bundle's path as it was given.

    Raises:
        StorageError: writing failed.
    """
    document = _document(evidence, Anonymous(asked))
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    # what UTF-8 cannot hold, such as bytes of a file name, becomes an escape of JSON's own
    write_whole(path, text.encode("utf-8", "backslashreplace") + b"\n")


def _document(evidence: Evidence, anonymous: Anonymous) -> dict[str, Any]:
    bundle, error = evidence.bundle, evidence.error
    rows = () if bundle is None else look(bundle)
    if bundle is not None and evidence.engines is not None:
        rows = (*rows, *look_at_engines(bundle, evidence.engines))
    doctor = [to_data(row) for row in rows]
    return {
        "report_version": REPORT_VERSION,
        "made": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "rt_ris": rt_ris.__version__,
        "python": platform.python_version(),
        "platform": anonymous.text(platform.platform()),
        "packages": {name: version(name) for name in PACKAGES},
        "bundle": None if bundle is None else _bundle(bundle),
        "backend": evidence.backend,
        "doctor": [
            {key: anonymous.text(text) for key, text in row.items()}
            for row in doctor
            if isinstance(row, dict)
        ],
        "replay": evidence.replay,
        "timings": {
            stage: {"runs": timing.runs, "total_ms": round(timing.total_ms, 3)}
            for stage, timing in evidence.timings.items()
        },
        "error": None if error is None else _error(error, anonymous),
    }


def _bundle(bundle: Bundle) -> dict[str, Any]:
    manifest = bundle.manifest
    return {
        "sha256": bundle.sha256,
        "architecture": manifest.architecture,
        "variant": manifest.variant,
        "precision": {stage.spec.id: stage.target.precision for stage in manifest.stages},
        "rt_ris": manifest.provenance.rt_ris,
        "libraries": to_data(manifest.provenance.libraries),
    }


def _error(error: Exception, anonymous: Anonymous) -> dict[str, Any]:
    return {
        "type": type(error).__name__,
        "message": anonymous.text(str(error)),
        "exit_code": getattr(error, "exit_code", None),
    }


class Anonymous:
    """Takes out of a text what says who and where.

    Args:
        bundle: a path that becomes ``BUNDLE`` wherever it appears.
    """

    def __init__(self, bundle: Path) -> None:
        forms = {str(bundle), str(bundle.absolute()), str(bundle.resolve())} - {os.sep}
        # a name alone may be a word of any message; it tells no place
        self._bundle = sorted((form for form in forms if os.sep in form), key=len, reverse=True)
        self._homes = sorted(_homes(), key=len, reverse=True)
        self._names = sorted(_names(), key=len, reverse=True)

    def text(self, text: str) -> str:
        """The text without paths and names."""
        for form in self._bundle:
            text = text.replace(form, "BUNDLE")
        for home in self._homes:
            text = text.replace(home, "~")
        text = _PATH.sub(r"\1", text)
        for name in self._names:
            text = re.sub(rf"(?<![^\W_]){re.escape(name)}(?![^\W_])", "NAME", text)
        return text


def _homes() -> set[str]:
    """Home folders, which a path with spaces would hide from a pattern."""
    try:
        home = Path.home()
    except RuntimeError:  # a user without an entry, as in many containers
        return set()
    return {str(home), str(home.resolve())} - {"/"}


def _names() -> set[str]:
    return {name for name in _told_names() if name.lower() not in NOBODY}


def _told_names() -> Iterator[str]:
    """Of the user and of the host; also the host's first part."""
    yield platform.node()
    yield platform.node().partition(".")[0]
    yield from (Path(home).name for home in _homes())
    try:
        yield getpass.getuser()
    except (OSError, KeyError, ImportError):  # a user without an entry
        return
