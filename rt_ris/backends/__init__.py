"""The backends: a short explicit table, each imported only when it is asked for."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Final, Literal, cast

from rt_ris.backends.base import Backend, EngineBackend, Runner
from rt_ris.bundle import Bundle
from rt_ris.errors import BackendError, MissingExtraError, RecipeError
from rt_ris.manifest import Manifest
from rt_ris.spec import StageSpec

__all__ = [
    "BACKENDS",
    "Backend",
    "BackendEntry",
    "Runner",
    "choose",
    "open_backend",
    "stage_opener",
    "versions",
]

_log = logging.getLogger(__name__)

# ONNX Runtime (seen in 1.31) makes a device id and a store of events in the user's cache folder
# unless this is set before it is first imported. A value that the user has set is left alone.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")


LEAST_FOR_OWN_OPERATORS: Final = (1, 21)
"""ONNX Runtime for graphs of format ``onnxruntime``: 1.20 adds one sentence's mask to another's
scores where several are asked at once (microsoft/onnxruntime, pull request 24017)."""


@dataclass(frozen=True, kw_only=True)
class BackendEntry:
    """A row of the table.

    Attributes:
        module: where the backend is.
        engine: the module of the engine it needs, or None.
        extra: the extra of rt-ris that brings the engine.
        formats: what it opens: the bundle's graphs, or engines that were built from them.
        automatic: may be chosen by ``auto``.
    """

    module: str
    engine: str | None
    extra: str
    formats: tuple[Literal["onnx", "onnxruntime", "engine"], ...]
    automatic: bool

    @property
    def runs_engines(self) -> bool:
        """Whether it opens engines instead of the bundle's graphs."""
        return "engine" in self.formats

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
            formats=("onnx", "onnxruntime"),
            automatic=True,
        ),
        "tensorrt": BackendEntry(
            module="rt_ris.backends.tensorrt",
            engine="tensorrt",
            extra="tensorrt",
            formats=("engine",),
            automatic=False,
        ),
        "tensorrt-rtx": BackendEntry(
            module="rt_ris.backends.tensorrt",
            engine="tensorrt_rtx",
            extra="tensorrt-rtx",
            formats=("engine",),
            automatic=False,
        ),
        "fake": BackendEntry(
            module="rt_ris.backends.fake",
            engine=None,
            extra="",
            formats=("onnx", "onnxruntime"),
            automatic=False,
        ),
    }
)
"""By name, in the order in which ``auto`` prefers them."""


def open_backend(name: str) -> Backend:
    """Import a backend that opens the graphs of a bundle.

    Raises:
        BackendError: there is no such backend.
        MissingExtraError: its engine is not installed.
    """
    return cast(Backend, _module(name))


def stage_opener(
    name: str,
    bundle: Bundle,
    *,
    threads: int | None = None,
    engines: str | os.PathLike[str] | None = None,
    allow_unverified: bool = False,
) -> Callable[[StageSpec], Runner]:
    """What opens the stages of a bundle on a backend.

    Args:
        name: of the backend.
        bundle: whose stages.
        threads: processor threads; None leaves the choice to the engine.
        engines: folder of the engines; None is beside the bundle, for backends that run engines.
        allow_unverified: run engines of which no gate has passed on this GPU.

    Raises:
        BackendError: there is no such backend.
        RecipeError: it runs no engines, and their folder is given.
        MissingExtraError: what it runs on is not installed.
        TargetMismatchError, IntegrityError, OutputError: see ``rt_ris.build.find``.
    """
    module = _module(name)
    if BACKENDS[name].runs_engines:
        folder = None if engines is None else Path(engines)
        opener = cast(EngineBackend, module).stage_opener
        return opener(bundle, target=name, folder=folder, allow_unverified=allow_unverified)
    if engines is not None:
        raise RecipeError(
            f"Backend '{name}' runs the bundle's graphs and no engines; leave the engines' folder "
            "out, or choose backend tensorrt or tensorrt-rtx."
        )

    def opened(stage: StageSpec) -> Runner:
        artefact = bundle.manifest.stage(stage.id)
        graph, *aside = map(bundle.read, bundle.manifest.graph_files(artefact))
        data = aside[0] if aside else b""
        return cast(Backend, module).open_stage(artefact, graph, data=data, threads=threads)

    return opened


def versions(name: str) -> Mapping[str, str]:
    """Names and versions of what a backend runs on, and its devices."""
    module = _module(name)
    if BACKENDS[name].runs_engines:
        return cast(EngineBackend, module).versions(name)
    return cast(Backend, module).versions()


def _module(name: str) -> ModuleType:
    """A backend's module, whose engine can be imported."""
    if name not in BACKENDS:
        known = ", ".join(["auto", *BACKENDS])
        raise BackendError(f"There is no backend '{name}'; there are {known}.")
    entry = BACKENDS[name]
    try:
        module = importlib.import_module(entry.module)
        if entry.engine is not None:
            importlib.import_module(entry.engine)
    except ModuleNotFoundError as error:
        if entry.engine is None or error.name != entry.engine:
            raise  # a module of ours, or a broken installation: no extra would help
        raise MissingExtraError(
            f"Backend '{name}' needs {entry.engine}, which is not installed; run: "
            f"{entry.pip_line()}",
            extra=entry.extra,
            module=entry.engine,
        ) from error
    return module


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
        if entry.automatic and formats <= set(entry.formats)
    }
    for name, entry in fitting.items():
        if entry.installed():
            opened = ", ".join(sorted(formats))
            _log.info("backend %s: opens %s and %s is installed", name, opened, entry.engine)
            return name
    for name, entry in fitting.items():
        raise MissingExtraError(
            f"The bundle runs on backend '{name}', which needs {entry.engine}; run: "
            f"{entry.pip_line()}",
            extra=entry.extra,
            module=entry.engine or "",
        )
    known = {one for entry in BACKENDS.values() if entry.automatic for one in entry.formats}
    raise BackendError(
        f"No backend opens artefacts of format {', '.join(sorted(formats))}; this rt-ris opens "
        f"{', '.join(sorted(known))}."
    )
