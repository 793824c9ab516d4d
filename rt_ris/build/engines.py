"""Build the engines of a bundle and record what they are."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from rt_ris.backends import cuda
from rt_ris.backends.cuda import Gpu, dotted
from rt_ris.build.cache import engine_key, timing_folder
from rt_ris.build.find import check_graphs, read_engine, read_record
from rt_ris.build.gate import read_gate
from rt_ris.build.onnx_file import without_functions
from rt_ris.build.process import built, check_installed, installed_version
from rt_ris.build.record import LOCAL, EngineRecord, engine_name, is_own, this_platform
from rt_ris.build.request import BUCKETS, Job, Request, Target
from rt_ris.build.trust import check_folder
from rt_ris.bundle import Bundle, partial_folder, put_in_place, storage_error
from rt_ris.errors import (
    BuildError,
    OutputError,
    PluginError,
    RtRisError,
    StorageError,
    TargetMismatchError,
)
from rt_ris.manifest import StageArtefact
from rt_ris.records import to_json

RTX_SMS: Final = (75, 80, 86, 89, 120, 121)
"""Compute capabilities for which TensorRT-RTX 1.7 builds without a GPU."""


def build_engines(
    bundle: Bundle,
    out: Path,
    *,
    target: Target,
    sms: Sequence[int] = (),
    plugin: bool = True,
    workspace_mib: int | None = None,
    overwrite: bool = False,
    accept: Callable[[Path], None] = lambda _: None,
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
        overwrite: replace the folder; engines in it that would come out the same are kept.
        accept: looks at the finished folder before it is put in its place; raises to refuse it.
        say: takes messages about progress.

    Raises:
        MissingExtraError: the builder or cuda-bindings is not installed.
        TargetMismatchError: the graphs are for ONNX Runtime alone, or no compute capability is
            named and there is no GPU.
        OutputError: the folder exists, or is inside the bundle.
        PluginError: our kernels do not take an operator of a stage.
        BuildError: a graph was refused, or the building process died.
        StorageError: writing failed, such as on a full disk.
        IntegrityError: a graph is not the one that was sealed.
    """
    check_graphs(bundle)
    check_installed(target)
    _check_capabilities(target, sms)
    _check_out(out, bundle.path, overwrite=overwrite)
    gpu = None if sms else _gpu(target)
    order = _Order(bundle=bundle, target=target, sms=tuple(sms), gpu=gpu, plugin=plugin)
    for one in order.wanted():
        _check_operators(one)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        timings = None if gpu is None or target != "tensorrt" else _timings(gpu, say)
        request = Request(target=target, workspace_mib=workspace_mib, timings=timings, jobs=())
        with partial_folder(out) as folder:
            kept = _keep(out, folder, order, request) if os.path.lexists(out) else {}
            records = _build(folder, order, request, kept, say)
            _keep_gates(out, folder, records)
            accept(folder)
            put_in_place(folder, out)
    except OSError as error:
        raise storage_error(out, error, what="folder of engines") from error
    return records


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
    check_installed(target)
    _check_capabilities(target, () if sm is None else (sm,))
    job = Job(stage=graph.stem, graph=str(graph), engine=str(engine), sm=sm, plugin=plugin)
    request = Request(target=target, workspace_mib=None, timings=None, jobs=(job,))
    (made,) = built(request, lambda _: None)
    return made


@dataclass(frozen=True, kw_only=True)
class _Wanted:
    """One engine that is asked for.

    Attributes:
        stage: that it computes.
        name: its file.
        sm: compute capability that it is for.
        gpu: on which it is built; None where that is not here.
        plugin: its operators of ours become our plugin.
    """

    stage: StageArtefact
    name: str
    sm: int
    gpu: Gpu | None
    plugin: bool


@dataclass(frozen=True, kw_only=True)
class _Order:
    """All engines that are asked for: of a bundle, for capabilities or for the GPU that is here."""

    bundle: Bundle
    target: Target
    sms: tuple[int, ...]
    gpu: Gpu | None
    plugin: bool

    def wanted(self) -> list[_Wanted]:
        """In the order in which they are built."""
        devices = [(sm, f"sm{sm}") for sm in self.sms]
        if self.gpu is not None:
            devices = [(self.gpu.sm, LOCAL)]
        least = importlib.import_module("rt_ris_kernels.launch").LEAST_CAPABILITY
        return [
            _Wanted(
                stage=stage,
                name=engine_name(stage, self.target, device),
                sm=sm,
                gpu=self.gpu,
                plugin=self.plugin and sm >= least and stage.operators != {},
            )
            for stage in self.bundle.manifest.stages
            for sm, device in devices
        ]

    def key(self, one: _Wanted, request: Request, version: str) -> str:
        """The key of one engine by a version of the builder."""
        graph = self.bundle.manifest.graph_sha256(one.stage)
        return engine_key(
            request,
            graph_sha256=graph,
            version=version,
            sm=one.sm,
            gpu=one.gpu,
            plugin=one.plugin,
        )


def _build(
    folder: Path,
    order: _Order,
    request: Request,
    kept: Mapping[str, EngineRecord],
    say: Callable[[str], None],
) -> tuple[EngineRecord, ...]:
    """Build what is not kept; the records of all, in order."""
    for name in kept:
        say(f"kept {name}: nothing that it depends on has changed")
    records = dict(kept)
    todo = sorted(
        (one for one in order.wanted() if one.name not in kept), key=lambda one: one.plugin
    )
    if order.plugin:
        _say_inlined(todo, say)
    with tempfile.TemporaryDirectory() as scratch:
        jobs = _jobs(order, todo, folder, Path(scratch))
        made = built(replace(request, jobs=jobs), say) if jobs else iter(())
        for one, facts in zip(todo, made, strict=True):
            content = (folder / one.name).read_bytes()
            record = _record(order, one, request, facts, content)
            (folder / f"{one.name}.json").write_bytes(to_json(record))
            records[one.name] = record
    return tuple(records[one.name] for one in order.wanted())


def _say_inlined(todo: Sequence[_Wanted], say: Callable[[str], None]) -> None:
    """Tell for which GPUs there is no kernel of ours."""
    for sm in sorted({one.sm for one in todo if one.stage.operators and not one.plugin}):
        say(f"no kernel of ours for {dotted(sm)}: our operator is built from its function there")


def _jobs(order: _Order, todo: Sequence[_Wanted], folder: Path, scratch: Path) -> tuple[Job, ...]:
    """Jobs on graphs that were checked and copied to where nobody else changes them."""
    jobs = tuple(
        Job(
            stage=one.stage.spec.id,
            graph=str(scratch / ("plugin" if one.plugin else "function") / one.stage.file),
            engine=str(folder / one.name),
            sm=one.sm if order.target == "tensorrt-rtx" else None,
            plugin=one.plugin,
        )
        for one in todo
    )
    try:
        for job, one in zip(jobs, todo, strict=True):
            _copy_graph(order.bundle, one, Path(job.graph).parent)
    except OSError as error:
        told = storage_error(scratch, error, what="copy of the graphs")
        raise StorageError(f"{told} TMPDIR names another place for it.", path=told.path) from error
    return jobs


def _copy_graph(bundle: Bundle, one: _Wanted, folder: Path) -> None:
    """A stage's graph, and its weights where they are in a second file."""
    folder.mkdir(exist_ok=True)
    if (folder / one.stage.file).exists():
        return  # for another compute capability
    for name in bundle.manifest.graph_files(one.stage):
        content = bundle.read(name)
        if one.plugin and name == one.stage.file:
            content = without_functions(content)
        (folder / name).write_bytes(content)


def _record(
    order: _Order, one: _Wanted, request: Request, facts: Mapping[str, Any], content: bytes
) -> EngineRecord:
    version = str(facts["version"])
    return EngineRecord(
        engine=one.name,
        sha256=hashlib.sha256(content).hexdigest(),
        bytes=len(content),
        stage=one.stage.spec.id,
        precision=one.stage.target.precision,
        bundle_sha256=order.bundle.sha256,
        graph_sha256=order.bundle.manifest.graph_sha256(one.stage),
        target=order.target,
        version=version,
        platform=this_platform(),
        sm=one.sm,
        gpu=one.gpu,
        plugin=int(facts["plugins"]) > 0,
        profiles=BUCKETS,
        layers=int(facts["layers"]),
        fused_attentions=int(facts["fused_attentions"]),
        seconds=float(facts["seconds"]),
        peak_mib=int(facts["peak_mib"]),
        key=order.key(one, request, version),
    )


def _keep(out: Path, folder: Path, order: _Order, request: Request) -> dict[str, EngineRecord]:
    """Copy what a new build would make again, with records that name this bundle."""
    there = [one for one in order.wanted() if (out / f"{one.name}.json").exists()]
    version = installed_version(order.target) if there else ""
    kept = {}
    for one in there:
        try:
            check_folder(out)
            record = read_record(out / f"{one.name}.json")
            if record.key != order.key(one, request, version):
                continue
            raw = read_engine(out, record)
        except RtRisError:
            continue  # damaged, foreign or of an older format: built anew
        record = replace(record, bundle_sha256=order.bundle.sha256)
        (folder / one.name).write_bytes(raw)
        (folder / f"{one.name}.json").write_bytes(to_json(record))
        kept[one.name] = record
    return kept


def _keep_gates(out: Path, folder: Path, records: Sequence[EngineRecord]) -> None:
    """Copy the gate records of which every engine is still the same."""
    now = {record.engine: record.sha256 for record in records}
    for path in out.glob("verified.*.json") if out.is_dir() else ():
        try:
            gate = read_gate(path)
        except RtRisError:
            continue
        if gate.engines.items() <= now.items():
            shutil.copyfile(path, folder / path.name)


def _gpu(target: Target) -> Gpu:
    """The GPU that is here, if the target builds for it."""
    try:
        gpu = cuda.open_cuda().gpu()
    except TargetMismatchError as error:
        if target == "tensorrt":
            raise
        raise TargetMismatchError(
            f"{error} To build for a GPU that is not here, name its compute capability: --sm 89.",
            expected=error.expected,
            found=error.found,
        ) from error
    if target == "tensorrt-rtx":
        _check_capabilities(target, (gpu.sm,))
    return gpu


def _timings(gpu: Gpu, say: Callable[[str], None]) -> str | None:
    """How the file of this GPU's timings begins; without a place for it, the build is longer."""
    try:
        return str(timing_folder() / f"{gpu.slug}-sm{gpu.sm}")
    except OSError as error:
        say(f"no timings are kept, their folder cannot be made: {error}")
        return None


def _check_out(out: Path, bundle: Path, *, overwrite: bool) -> None:
    """Refuse a folder that is there, and in any case one that holds more than engines."""
    if bundle.resolve() in (out.resolve(), *out.resolve().parents):
        raise OutputError(
            f"'{out}' is inside the bundle '{bundle}', whose files are sealed: with one more it "
            "would be refused. Choose a folder beside it (--out)."
        )
    if not os.path.lexists(out):
        return
    if not overwrite:
        raise OutputError(f"'{out}' exists; choose another folder (--out), or --overwrite.")
    others = [out]
    if out.is_dir() and not out.is_symlink():
        others = [path for path in out.iterdir() if not is_own(path.name)]
    if others:
        raise OutputError(
            f"'{out}' is no folder of engines alone ('{others[0].name}'); it is left alone, choose "
            "another one (--out)."
        )


def _check_operators(one: _Wanted) -> None:
    """Refuse before the first engine what the building process would refuse at its stage."""
    accepted = importlib.import_module("rt_ris_kernels.geometry").CHANNELS
    for name, channels in (one.stage.operators or {}).items() if one.plugin else ():
        wrong = sorted(set(channels) - set(accepted))
        if wrong:
            raise PluginError(
                f"Stage '{one.stage.spec.id}' uses {name} with {wrong[0]} channels; our kernels "
                f"take {' or '.join(map(str, accepted))}. Build it from its function: --no-plugin."
            )


def _check_capabilities(target: Target, sms: Sequence[int]) -> None:
    if target == "tensorrt" and sms:
        raise BuildError("TensorRT builds for the GPU that is there; leave --sm out.")
    wrong = [sm for sm in sms if sm not in RTX_SMS]
    if wrong:
        raise BuildError(
            f"TensorRT-RTX does not build for compute capability {wrong[0]}; it does for "
            f"{', '.join(map(str, RTX_SMS))}. Jetson Orin (87), Hopper (90) and Thor (110) take "
            "--target tensorrt, on the device."
        )
