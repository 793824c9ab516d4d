"""The backends: a short explicit table, each imported only when it is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final, Literal, cast

from rt_ris.backends.base import Backend, Runner
from rt_ris.errors import BackendError, MissingExtraError
from rt_ris.manifest import Manifest

__all__ = ["BACKENDS", "Backend", "BackendEntry", "Runner", "choose", "open_backend"]

_log = logging.getLogger(__name__)

# ONNX Runtime (seen in 1.31) makes a device id and a store of events in the user's cache folder
# unless this is set before it is first imported. A value that the user has set is left alone.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


@dataclass(frozen=True, kw_only=True)
class BackendEntry:
    """A row of the table.

    Attributes:
        module: where the backend is.
        engine: the module of the engine it needs, or None.
        extra: the extra of rt-ris that brings the engine.
        format: the artefacts it opens.
        automatic: may be chosen by ``auto``.
    """

    module: str
    engine: str | None
    extra: str
    format: Literal["onnx", "engine"]
    automatic: bool

    def installed(self) -> bool:
        """True if the engine can be found; imports nothing."""
        return self.engine is None or importlib.util.find_spec(self.engine) is not None

    def pip_line(self) -> str:
        """The command that installs the engine."""
        return f'pip install "rt-ris[{self.extra}]"'


BACKENDS: Final[Mapping[str, BackendEntry]] = MappingProxyType(
    {
        "onnxruntime": BackendEntry(
            module="rt_ris.backends.onnxruntime",
            engine="onnxruntime",
            extra="cpu",
            format="onnx",
            automatic=True,
        ),
        "fake": BackendEntry(
            module="rt_ris.backends.fake", engine=None, extra="", format="onnx", automatic=False
        ),
    }
)
"""By name, in the order in which ``auto`` prefers them."""


def open_backend(name: str) -> Backend:
    """Import a backend.

    Raises:
        BackendError: there is no such backend.
        MissingExtraError: its engine is not installed.
    """
    if name not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise BackendError(f"There is no backend '{name}'; there are {known}.")
    entry = BACKENDS[name]
    try:
        return cast(Backend, importlib.import_module(entry.module))
    except ModuleNotFoundError as error:
        if entry.engine is None or error.name != entry.engine:
            raise  # a module of ours, or a broken installation: no extra would help
        raise MissingExtraError(
            f"Backend '{name}' needs {entry.engine}, which is not installed; run: "
            f"{entry.pip_line()}",
            extra=entry.extra,
            module=entry.engine,
        ) from error


def choose(manifest: Manifest) -> str:
    """The backend that ``auto`` stands for: the first that opens the bundle's artefacts.

    Raises:
        MissingExtraError: one would do, but its engine is not installed.
        BackendError: none opens these artefacts.
    """
    formats = {stage.target.format for stage in manifest.stages}
    fitting = {
        name: entry
        for name, entry in BACKENDS.items()
        if entry.automatic and formats == {entry.format}
    }
    for name, entry in fitting.items():
        if entry.installed():
            _log.info("backend %s: opens %s and %s is installed", name, entry.format, entry.engine)
            return name
    for name, entry in fitting.items():
        raise MissingExtraError(
            f"The bundle runs on backend '{name}', which needs {entry.engine}; run: "
            f"{entry.pip_line()}",
            extra=entry.extra,
            module=entry.engine or "",
        )
    raise BackendError(
        f"No backend opens artefacts of format {', '.join(sorted(formats))}; this rt-ris opens "
        f"{', '.join(sorted({entry.format for entry in BACKENDS.values()}))}."
    )
