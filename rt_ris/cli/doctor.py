"""``rt-ris doctor``: what is installed, what can run, and why not."""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import rt_ris
from rt_ris.backends import BACKENDS, choose, versions
from rt_ris.build.record import default_folder
from rt_ris.bundle import Bundle
from rt_ris.cli import LITE_WEIGHTS, VERBS
from rt_ris.cli.engines import look_at_engines, targets
from rt_ris.cli.options import add_json, print_json, shown
from rt_ris.cli.probe import engine, probe, version
from rt_ris.cli.requirements import Row, requirements
from rt_ris.errors import BackendError, OutputError, RecipeError, RtRisError
from rt_ris.predictor import Predictor
from rt_ris.records import to_data

PACKAGES: Final = (
    "numpy",
    "pillow",
    "tokenizers",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt-rtx-cu13",
    "cuda-bindings",
    "torch",
    "torchvision",
    "timm",
    "transformers",
    "onnx",
    "onnxscript",
    "scikit-image",
    "scikit-learn",
    "segment-anything",
    "open-clip-torch",
)


ON_ANY_BACKEND: Final = ("evaluate", "verify", "segment")
"""Verbs that do without ONNX Runtime where engines run."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    parser = subparsers.add_parser(
        "doctor",
        help="show what is installed and what can run",
        description="Show versions, backends and which verbs can run. With a bundle, open it as "
        "segment would, and list what it and its engines need, what is there, and what follows.",
    )
    parser.add_argument("bundle", type=Path, nargs="?", help="folder of a bundle to try")
    parser.add_argument(
        "--engines",
        type=Path,
        metavar="FOLDER",
        help="engines of the bundle; the exit code is then that of running them [BUNDLE.engines]",
    )
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Look around and print; a bundle that cannot run gives its error's exit code.

    Raises:
        RecipeError: a folder of engines is given without its bundle.
    """
    if args.engines is not None and args.bundle is None:
        raise RecipeError("--engines is about a bundle; name the bundle, too.")
    found: dict[str, Any] = {
        "rt_ris": rt_ris.__version__,
        "python": platform.python_version(),
        "executable": sys.executable,
        "platform": platform.platform(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "packages": {name: version(name) for name in PACKAGES},
        "backends": {name: _backend(name) for name in BACKENDS},
        "verbs": {name: _verb(name) for name in VERBS},
        "weights of maris-lite": {name: _weights(name) for name in LITE_WEIGHTS},
    }
    code = 0
    if args.bundle is not None:
        found["bundle"], code = _try_bundle(args.bundle)
        if "requirements" in found["bundle"]:  # else there is no bundle that engines could be of
            found["engines"], of_engines = _try_engines(Bundle.open(args.bundle), args.engines)
            code = code if args.engines is None else of_engines
    if args.json:
        print_json(found)
    else:
        print("\n".join(_lines(found)))
    return code


def _backend(name: str) -> dict[str, Any]:
    fault = _fault(name)
    if fault:
        return {"runs": False, "why_not": fault}
    try:
        return {"runs": True, **versions(name)}
    except (RtRisError, ImportError, OSError) as error:  # an engine may be there but broken
        return {"runs": False, "why_not": str(error)}


def _fault(backend: str) -> str:
    """Why a backend's engine, which is installed, would fail or crash when it is imported."""
    module = BACKENDS[backend].engine
    fault = "" if module is None else engine(module).fault
    return fault and f"{module} is installed but broken: {fault}"


def _verb(name: str) -> dict[str, Any]:
    verb = VERBS[name]
    missing = [module for module in verb.needs if importlib.util.find_spec(module) is None]
    if not missing:
        return {"runs": True}
    if missing == ["onnxruntime"] and name in ON_ANY_BACKEND:
        there = [one for one, row in BACKENDS.items() if row.runs_engines and row.installed()]
        if there:
            return {"runs": True, "backends": " ".join(there)}
    why_not = f"needs {', '.join(missing)}; run: {verb.pip_line()}"
    return {"runs": False, "why_not": why_not}


def _weights(module: str) -> str:
    """Train and export need these for maris-lite alone, so they are no part of a verb."""
    if importlib.util.find_spec(module) is not None:
        return "installed"
    return f"missing; to train or export maris-lite run: {LITE_WEIGHTS[module]}"


def _try_bundle(path: Path) -> tuple[dict[str, Any], int]:
    """Open all stages of a bundle as ``segment`` would, and judge the machine by its needs."""
    found: dict[str, Any] = {"path": shown(path)}
    try:
        bundle = Bundle.open(path)
        found["requirements"] = [to_data(row) for row in look(bundle)]
        backend = choose(bundle.manifest)
        _open(path, backend, engines=None)
    except RtRisError as error:
        return {**found, "runs": False, "why_not": str(error)}, error.exit_code
    stages = [stage.spec.id for stage in bundle.manifest.stages]
    return {**found, "runs": True, "backend": backend, "stages": stages}, 0


def _try_engines(bundle: Bundle, named: Path | None) -> tuple[dict[str, Any], int]:
    """Judge each engine of a folder, and open them as ``segment`` would; 0 if those of one run."""
    folder = named or default_folder(bundle.path)
    states: dict[str, dict[str, Any]] = {}
    codes = []
    for target in targets(bundle, folder):
        try:
            _open(bundle.path, target, engines=folder)
            states[target] = {"runs": True}
            codes.append(0)
        except RtRisError as error:
            states[target] = {"runs": False, "why_not": str(error)}
            codes.append(error.exit_code)
    rows = [to_data(row) for row in look_at_engines(bundle, folder)]
    found = {"path": shown(folder), "backends": states, "requirements": rows}
    return found, min(codes, default=OutputError.exit_code)


def _open(bundle: Path, backend: str, *, engines: Path | None) -> None:
    """Open all stages of a bundle."""
    fault = _fault(backend)
    if fault:
        raise BackendError(f"{fault}. Install it again.")
    Predictor.load(bundle, backend=backend, engines=engines).close()


def look(bundle: Bundle) -> tuple[Row, ...]:
    """The requirements of a bundle on this machine."""
    return requirements(bundle.manifest, probe(bundle.path.absolute().parent))


def _lines(found: dict[str, Any]) -> Iterator[str]:
    yield f"rt-ris {found['rt_ris']}, Python {found['python']}, {found['cores']} cores"
    yield f"{found['platform']}"
    yield f"{found['executable']}"
    for title in ("packages", "backends", "verbs", "weights of maris-lite"):
        yield f"\n{title}"
        for name, state in found[title].items():
            yield f"  {name:<17} {_state(state)}"
    if "bundle" in found:
        yield f"\nbundle {found['bundle']['path']}\n  {_state(found['bundle'])}"
        yield from _table(found["bundle"].get("requirements", []))
    if "engines" in found:
        yield f"\nengines {found['engines']['path']}"
        for name, state in found["engines"]["backends"].items():
            yield f"  {name:<17} {_state(state)}"
        yield from _table(found["engines"]["requirements"])


def _table(rows: list[dict[str, str]]) -> Iterator[str]:
    """Three lines a row: a consequence is a sentence, and no terminal is that wide."""
    for row in rows:
        yield f"\n  {row['need']:<21} {row['verdict']}: {row['consequence']}"
        yield f"    expected            {row['expected']}"
        yield f"    found               {row['found']}"


def _state(state: str | dict[str, Any] | None) -> str:
    if isinstance(state, dict):
        if not state["runs"]:
            return f"cannot run: {state['why_not']}"
        hidden = ("runs", "path", "requirements")
        facts = (f"{key} {value}" for key, value in state.items() if key not in hidden)
        return "  ".join(["runs", *facts])
    return state or "-"
