"""Build the engines of a bundle and record what they are."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from rt_ris.build.request import BUCKETS, MODULES, Job, Request, Target
from rt_ris.bundle import Bundle, partial_folder, put_in_place
from rt_ris.errors import BuildError, MissingExtraError, OutputError
from rt_ris.manifest import StageArtefact
from rt_ris.records import to_json

RTX_SMS: Final = (75, 80, 86, 89, 120, 121)
"""Compute capabilities for which TensorRT-RTX 1.7 builds without a GPU."""

OWN: Final = (".engine", ".engine.json")
"""Endings of what a folder of engines holds."""

UNVERIFIED: Final = "unverified"


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """What stands beside an engine, in a file of its name with ``.json`` behind.

    Attributes:
        engine: its file name.
        sha256: of its bytes; to be compared before anything reads them.
        bytes: its size.
        stage: which stage of the bundle it computes.
        precision: of the graph it was built from.
        bundle_sha256: of the manifest of that bundle.
        graph_sha256: of that graph.
        target: whose builder made it.
        version: of that builder, all four parts.
        sm: compute capability it is for; None for the GPU that was there.
        plugin: it asks for our plugins where it runs.
        profiles: least, best and most sentences of each profile.
        layers: of the parsed network.
        fused_attentions: attention kernels that the builder fused.
        seconds: that the build took.
        peak_mib: largest memory of the building process up to here.
        verified: ``unverified``, or the record of a gate that passed on a device.
    """

    engine: str
    sha256: str
    bytes: int
    stage: str
    precision: str
    bundle_sha256: str
    graph_sha256: str
    target: Target
    version: str
    sm: int | None
    plugin: bool
    profiles: tuple[tuple[int, int, int], ...]
    layers: int
    fused_attentions: int
    seconds: float
    peak_mib: int
    verified: str = UNVERIFIED


def build_engines(
    bundle: Bundle,
    out: Path,
    *,
    target: Target,
    sms: Sequence[int] = (),
    plugin: bool = True,
    workspace_mib: int | None = None,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[EngineRecord, ...]:
    """Build every stage for every compute capability, or leave nothing behind.

    Args:
        bundle: whose graphs are built; each is checked before the builder sees it.
        out: folder of the engines; made here.
        target: whose builder.
        sms: compute capabilities; empty for the GPU that is there.
        plugin: use our plugins where a stage has their operators.
        workspace_mib: device memory that the builder may use.
        overwrite: replace the folder.
        say: takes messages about progress.

    Raises:
        MissingExtraError: the builder is not installed.
        OutputError: the folder exists.
        BuildError: a graph was refused, or the building process died.
        IntegrityError: a graph is not the one that was sealed.
    """
    _check_builder(target, sms)
    _check_out(out, overwrite=overwrite)
    out.parent.mkdir(parents=True, exist_ok=True)
    with partial_folder(out) as folder, tempfile.TemporaryDirectory() as scratch:
        wanted = [(stage, sm) for stage in bundle.manifest.stages for sm in sms or (None,)]
        for name in bundle.manifest.needed():
            (Path(scratch) / name).write_bytes(bundle.read(name))
        jobs = tuple(
            Job(
                graph=str(Path(scratch) / stage.file),
                engine=str(folder / _name(stage, target, sm)),
                sm=sm,
            )
            for stage, sm in wanted
        )
        request = Request(target=target, plugin=plugin, workspace_mib=workspace_mib, jobs=jobs)
        records = []
        for (stage, sm), built in zip(wanted, _built(request, say), strict=True):
            content = (folder / _name(stage, target, sm)).read_bytes()
            record = EngineRecord(
                engine=_name(stage, target, sm),
                sha256=hashlib.sha256(content).hexdigest(),
                bytes=len(content),
                stage=stage.spec.id,
                precision=stage.target.precision,
                bundle_sha256=bundle.sha256,
                graph_sha256=bundle.manifest.members[stage.file].sha256,
                target=target,
                version=str(built["version"]),
                sm=sm,
                plugin=int(built["plugins"]) > 0,
                profiles=BUCKETS,
                layers=int(built["layers"]),
                fused_attentions=int(built["fused_attentions"]),
                seconds=float(built["seconds"]),
                peak_mib=int(built["peak_mib"]),
            )
            (folder / f"{record.engine}.json").write_bytes(to_json(record))
            records.append(record)
        put_in_place(folder, out)
    return tuple(records)


def build_graph(
    graph: Path, engine: Path, *, target: Target, sm: int | None, plugin: bool = False
) -> Mapping[str, Any]:
    """Build one graph that belongs to no bundle, for looking at what the builder makes of it.

    Returns:
        ``seconds``, ``version``, ``layers``, ``plugins``, ``fused_attentions``, ``bytes``.

    Raises:
        MissingExtraError: the builder is not installed.
        BuildError: the graph was refused, or the building process died.
    """
    _check_builder(target, () if sm is None else (sm,))
    job = Job(graph=str(graph), engine=str(engine), sm=sm)
    request = Request(target=target, plugin=plugin, workspace_mib=None, jobs=(job,))
    (built,) = _built(request, lambda _: None)
    return built


def _check_out(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that is there, and in any case one that holds more than engines."""
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise OutputError(f"'{out}' exists; choose another folder (--out), or --overwrite.")
    others = [out]
    if out.is_dir() and not out.is_symlink():
        others = [path for path in out.iterdir() if not path.name.endswith(OWN)]
    if others:
        raise OutputError(
            f"'{out}' is no folder of engines alone ('{others[0].name}'); it is left alone, choose "
            "another one (--out)."
        )


def _built(request: Request, say: Callable[[str], None]) -> Iterator[Mapping[str, Any]]:
    """What the child reports, engine by engine; an error if it stops before the last."""
    names = [Path(job.engine).name for job in request.jobs]
    spent = 0.0
    with (
        libraries(request.target) as environment,
        tempfile.NamedTemporaryFile(suffix=".json") as written,
        tempfile.TemporaryFile("w+") as errors,
    ):
        written.write(to_json(request))
        written.flush()
        child = subprocess.Popen(
            [sys.executable, "-m", "rt_ris.build.child", written.name],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        try:
            for index, name in enumerate(names):
                left = f", about {spent / index * (len(names) - index):.0f} s left" if index else ""
                say(f"[{index + 1}/{len(names)}] building {name}{left}")
                assert child.stdout is not None
                told = (line for line in child.stdout if line.startswith('{"'))
                news = json.loads(next(told, "{}"))  # the builder prints lines of its own, too
                if "built" not in news:
                    raise _failure(name, news, child, errors)
                spent += float(news["built"]["seconds"])
                if index == len(names) - 1:
                    child.wait()
                yield news["built"]
        finally:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()


def _failure(
    name: str, news: Mapping[str, Any], child: subprocess.Popen[str], errors: IO[str]
) -> BuildError:
    if "failed" in news:
        said = "; ".join(news["failed"]["errors"][:3])
        return BuildError(f"The builder refused {name}: {said}. No engine was written.")
    code = child.wait()
    errors.seek(0)
    lines = [line for line in errors.read().splitlines() if line.strip()]
    last = f" It said: {lines[-1]}" if lines else ""
    if code == -signal.SIGKILL:
        cause = "was killed, most likely because the memory was exhausted"
    elif code < 0:
        cause = f"died of {signal.Signals(-code).name}"
    else:
        cause = f"ended with code {code}"
    return BuildError(f"The process that built {name} {cause}.{last} No engine was written.")


@contextmanager
def libraries(target: Target) -> Iterator[dict[str, str]]:
    """The child's environment: TensorRT-RTX looks for its library by a name its wheel lacks.

    Seen in 1.7.1: the parser opens ``libtensorrt_rtx.so``, the wheel has ``.so.1`` only, and the
    process aborts at the first plugin.
    """
    environment = dict(os.environ)
    found = importlib.util.find_spec("tensorrt_rtx_libs") if target == "tensorrt-rtx" else None
    if found is None or not found.submodule_search_locations:
        yield environment
        return
    with tempfile.TemporaryDirectory() as folder:
        for library in Path(found.submodule_search_locations[0]).glob("*.so.1"):
            (Path(folder) / library.stem).symlink_to(library)
        before = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = f"{folder}:{before}" if before else folder
        yield environment


def _check_builder(target: Target, sms: Sequence[int]) -> None:
    module = MODULES[target]
    if importlib.util.find_spec(module) is None:
        wheel = "tensorrt-rtx-cu13" if target == "tensorrt-rtx" else "tensorrt"
        raise MissingExtraError(
            f"Building for {target} needs its Python module '{module}'; run: pip install {wheel}",
            extra=wheel,
            module=module,
        )
    if target == "tensorrt" and sms:
        raise BuildError("TensorRT builds for the GPU that is there; leave --sm out.")
    wrong = [sm for sm in sms if sm not in RTX_SMS]
    if wrong:
        raise BuildError(
            f"TensorRT-RTX does not build for compute capability {wrong[0]}; it does for "
            f"{', '.join(map(str, RTX_SMS))}. Jetson Orin (87), Hopper (90) and Thor (110) take "
            "--target tensorrt, on the device."
        )


def _name(stage: StageArtefact, target: Target, sm: int | None) -> str:
    device = "local" if sm is None else f"sm{sm}"
    return f"{stage.spec.id}.{stage.target.precision}.{target}-{device}.engine"
