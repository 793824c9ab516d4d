"""What a bundle needs of a machine, what the machine has, and what follows: before a long build.

Nothing here looks at anything: ``probe.py`` did. What it could not look at is ``unknown``, never
``ok``. Estimates of memory say how they were made.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from rt_ris.backends import LEAST_FOR_OWN_OPERATORS
from rt_ris.backends.cuda import cuda_version, dotted
from rt_ris.build.engines import RTX_SMS
from rt_ris.build.request import MOST_EXPRESSIONS
from rt_ris.cli.probe import ONNX_RUNTIMES, Engine, Gpu, Machine
from rt_ris.manifest import Manifest

Verdict = Literal["ok", "fails", "absent", "unknown", "unneeded"]

ARCHITECTURES: Final = ("x86_64", "amd64", "aarch64", "arm64")
"""Processors for which every dependency has a wheel."""

LEAST_ONNXRUNTIME: Final = (1, 20)
LEAST_TENSORRT: Final = (10, 3)
"""TensorRT from which a registered plugin goes before the operator's function in the graph."""
LEAST_CUDA_BINDINGS: Final = (12, 6)
LEAST_SM: Final = 75
"""The oldest compute capability, times ten, that TensorRT 10.3 to 11 and TensorRT-RTX take."""
LEAST_CUDA: Final = 12060
CUDA_13: Final = 13000
"""Version of CUDA whose drivers take the kernels in the wheel, and what the cu13 wheels hold."""

GRAPH_COPIES: Final = 3.0
INNER_TENSORS: Final = 20.0
"""Peak of maris-lite in ONNX Runtime 1.31, one thread: 111 MiB of graphs took 327 MiB to load, and
16 sentences took 189 MiB more, where stages pass on 10.4 MiB."""
ENGINE_MIB: Final = 100
"""Of the interpreter with NumPy and ONNX Runtime."""
CONTEXT_MIB: Final = 500
"""Of device memory, for a CUDA context and an engine's code: a round number, not measured."""
ENGINE_SHARE: Final = 1.5
"""Bytes of an engine by those of its graph: 1.2 where ``bench/results/engines.json`` has weights
that dominate, and room."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A stage that a builder is known to refuse, by the names that the manifest has for humans."""

    architecture: str
    variant: str
    stage: str
    precision: str
    sm: int
    why: str


RTX_REFUSALS: Final = (
    Refusal(
        architecture="dmmi",
        variant="swin",
        stage="fusion",
        precision="fp16",
        sm=75,
        why="TensorRT-RTX 1.7.1 ends with 'empty runtime-fusion MVMF'",
    ),
)
"""Of ``bench/results/engines.json``."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One requirement.

    Attributes:
        need: what it is about.
        expected: what the bundle, or a way to run it, asks for.
        found: what the machine has.
        consequence: what follows, and what to do where something fails.
        verdict: ``fails`` predicts that this way to run the bundle is refused; ``absent`` is a way
            that this machine does not have; ``unknown`` was not looked at.
    """

    need: str
    expected: str
    found: str
    consequence: str
    verdict: Verdict


def requirements(manifest: Manifest, machine: Machine) -> tuple[Row, ...]:
    """All rows; predictions about a GPU are for the first one."""
    return tuple(row(manifest, machine) for row in ROWS)


Case = tuple[bool, Verdict, str]
"""Whether it holds, and then the verdict and its consequence."""


def judged(need: str, *cases: Case, expected: str, found: str) -> Row:
    """The row of the first case that holds; the last one always does."""
    verdict, consequence = next((verdict, text) for holds, verdict, text in cases if holds)
    return Row(need=need, expected=expected, found=found, consequence=consequence, verdict=verdict)


def _python(_: Manifest, machine: Machine) -> Row:
    fits = machine.bits == 64 and machine.architecture.lower() in ARCHITECTURES
    return judged(
        "Python",
        (
            numbers(machine.python) < (3, 10),
            "fails",
            "rt-ris is not tested on it; use 3.10 or later",
        ),
        (not fits, "fails", "there may be no wheels of the dependencies; pip would compile them"),
        (True, "ok", "the dependencies come as wheels"),
        expected="3.10 or later, 64 bit, x86-64 or ARM64",
        found=f"{machine.python}, {machine.bits} bit, {machine.architecture}",
    )


def _onnx_runtime(manifest: Manifest, machine: Machine) -> Row:
    least = LEAST_FOR_OWN_OPERATORS if _foreign(manifest) else LEAST_ONNXRUNTIME
    engine, line = _engine(machine, "onnxruntime"), 'pip install "rt-ris[cpu]"'
    old = numbers(engine.version or "") < least
    provided = "CPUExecutionProvider" in engine.providers
    return judged(
        "ONNX Runtime",
        (bool(engine.fault), "fails", "it cannot be imported: the processor runs nothing"),
        (engine.version is None, "fails", f"the processor runs nothing; run: {line}"),
        (old, "fails", f"older than what the bundle asks for; run: {line} --upgrade"),
        (not provided, "fails", f"without that provider the processor runs nothing; run: {line}"),
        (True, "ok", "the bundle can run on the processor"),
        expected=f"{'.'.join(map(str, least))} or later, with CPUExecutionProvider",
        found=", ".join([_version(engine), *engine.providers]),
    )


def _cuda_provider(_: Manifest, machine: Machine) -> Row:
    listed = "CUDAExecutionProvider" in _engine(machine, "onnxruntime").providers
    both = len(machine.wheels) == len(ONNX_RUNTIMES)
    lost = "onnxruntime-gpu" in machine.wheels and not listed
    remove = "uninstall onnxruntime and onnxruntime-gpu, then install one of them"
    mute = "asked for CUDA, ONNX Runtime would fall back to the processor without an error"
    return judged(
        "CUDA in ONNX Runtime",
        (lost, "fails", f"onnxruntime-gpu is installed but its module lacks CUDA; {remove}"),
        (both, "fails", f"both wheels own one module, and either may be broken; {remove}"),
        (listed and not machine.gpus, "absent", f"{mute}; rt-ris never asks for it"),
        (True, "unneeded", "rt-ris runs ONNX Runtime on the processor alone"),
        expected="nothing",
        found=f"{', '.join(machine.wheels) or 'no wheel'}; CUDA {'is' if listed else 'not'} listed",
    )


def _driver(_: Manifest, machine: Machine) -> Row:
    found = _cuda(machine.cuda)
    return judged(
        "NVIDIA driver",
        (machine.cuda is None, "absent", "no GPU can be used; the processor remains"),
        (bool(machine.no_cuda), "fails", "the driver is there and cannot be used; reinstall it"),
        ((machine.cuda or 0) < LEAST_CUDA, "fails", "too old for engines; update the driver"),
        (True, "ok", "CUDA can be used"),
        expected=f"{_cuda(LEAST_CUDA)} or later",
        found=f"{found}: {machine.no_cuda}" if machine.no_cuda else found,
    )


def _gpu(_: Manifest, machine: Machine) -> Row:
    gpu = _first(machine)
    elsewhere = "build --target tensorrt-rtx --sm SM can build for other GPUs here"
    return judged(
        "GPU",
        (gpu is None, "absent", f"no engine runs here; {elsewhere}"),
        (gpu is not None and gpu.sm < LEAST_SM, "fails", "no engine of rt-ris is built for it"),
        (True, "ok", "the rows below are about the first one"),
        expected=f"compute capability {dotted(LEAST_SM)} or later",
        found="; ".join(f"{one.name} ({dotted(one.sm)})" for one in machine.gpus) or "none",
    )


def _tensorrt(manifest: Manifest, machine: Machine) -> Row:
    engine, gpu = _engine(machine, "tensorrt"), _first(machine)
    old = engine.version is not None and numbers(engine.version) < LEAST_TENSORRT
    advice = "update it (JetPack 6 has 10.3)"
    return judged(
        "TensorRT",
        _unreadable(manifest),
        (gpu is None, "absent", "--target tensorrt builds for the GPU that is there: none is"),
        (gpu is not None and gpu.sm < LEAST_SM, "fails", "--target tensorrt refuses this GPU"),
        (bool(engine.fault), "fails", "--target tensorrt fails: the module cannot be imported"),
        (engine.version is None, "absent", f"--target tensorrt cannot build; {_install(machine)}"),
        (old, "fails", f"--target tensorrt fails: strongly typed plugins need 10.3; {advice}"),
        (True, "ok", "nothing is known that stops --target tensorrt here"),
        expected="10.3 or later",
        found=_version(engine),
    )


def _tensorrt_rtx(manifest: Manifest, machine: Machine) -> Row:
    engine, gpu = _engine(machine, "tensorrt_rtx"), _first(machine)
    sms = ", ".join(map(dotted, RTX_SMS))
    refused = gpu is not None and gpu.sm not in RTX_SMS
    known = list(_rtx_refusals(manifest, None if gpu is None else gpu.sm))
    old = machine.cuda is not None and machine.cuda < CUDA_13
    instead = "use --target tensorrt on this machine"
    install = "pip install tensorrt-rtx-cu13"
    return judged(
        "TensorRT-RTX",
        _unreadable(manifest),
        (refused, "fails", f"TensorRT-RTX builds and runs nothing for this GPU; {instead}"),
        (gpu is not None and bool(known), "fails", f"{'; '.join(known)}; {instead}"),
        (bool(engine.fault), "fails", "--target tensorrt-rtx fails: it cannot be imported"),
        (engine.version is None, "absent", f"--target tensorrt-rtx cannot build; run: {install}"),
        (gpu is not None and old, "fails", f"its cu13 wheel needs a driver of CUDA 13; {instead}"),
        (gpu is None, "ok", "; ".join(["--target tensorrt-rtx --sm SM can build here", *known])),
        (True, "ok", "nothing is known that stops --target tensorrt-rtx here"),
        expected=f"compute capability {sms}",
        found=f"{_version(engine)}; {'no GPU' if gpu is None else dotted(gpu.sm)}",
    )


def _unreadable(manifest: Manifest) -> Case:
    """The case of graphs that no builder reads."""
    names = ", ".join(f"'{stage}'" for stage in _foreign(manifest))
    why = f"builders do not read {names}, exported for ONNX Runtime; export with --target onnx"
    return bool(names), "fails", why


def _rtx_refusals(manifest: Manifest, sm: int | None) -> Iterator[str]:
    """What TensorRT-RTX is known to refuse of a bundle, for one GPU or (None) for any."""
    for stage in manifest.stages:
        names = (manifest.architecture, manifest.variant, stage.spec.id, stage.target.precision)
        for known in RTX_REFUSALS:
            listed = (known.architecture, known.variant, known.stage, known.precision)
            if listed == names and sm in (None, known.sm):
                yield f"'{stage.spec.id}' is refused for {dotted(known.sm)}: {known.why}"
        if stage.operators and stage.target.precision == "fp32" and sm in (None, LEAST_SM):
            yield (
                f"'{stage.spec.id}' is refused for {dotted(LEAST_SM)}: our operator in float32 "
                "has no kernel there, and TensorRT-RTX 1.7.1 no float32 products; export it in fp16"
            )


def _kernels(manifest: Manifest, machine: Machine) -> Row:
    operators, kernels = _operators(manifest), machine.kernels
    accepted = kernels.channels if kernels else ()
    faults = list(_kernel_faults(operators or {}, machine))
    inlined = "; build with --no-plugin: the operator is built from its function in the graph"
    return judged(
        "our kernels",
        (bool(_foreign(manifest)), "unneeded", "no engine is built of graphs for ONNX Runtime"),
        (operators is None, "unknown", "the manifest does not say; export the bundle again"),
        (not operators, "unneeded", "the graphs are standard ONNX; a plugin changes nothing"),
        (bool(faults), "fails", "; ".join(faults) + inlined),
        (not machine.gpus, "absent", "engines may hold the plugin; none runs here"),
        (_too_old(machine), "absent", "none for this GPU: build takes the operator's function"),
        (True, "ok", "engines run the operator by our kernels"),
        expected="; ".join(
            f"{name} with {_list(channels)} channels"
            for name, channels in (operators or {}).items()
        )
        or ("no operator of ours" if operators is not None else "not known"),
        found=f"rt_ris_kernels for {_list(accepted)} channels" if kernels else "no rt_ris_kernels",
    )


def _kernel_faults(operators: Mapping[str, tuple[int, ...]], machine: Machine) -> Iterator[str]:
    """Why an engine with our plugin is refused, or fails when it runs."""
    kernels, gpu = machine.kernels, _first(machine)
    if kernels is None:
        yield "rt_ris_kernels is absent or damaged"
        return
    for name, channels in operators.items():
        if set(channels) - set(kernels.channels):
            yield f"the builder refuses {name} with {_list(channels)} channels"
    if gpu is None or machine.cuda is None or _too_old(machine):
        return
    if machine.cuda < (LEAST_CUDA if gpu.sm in kernels.for_cuda_12 else CUDA_13):
        yield (
            f"the kernels need a driver of CUDA 13, this one is {_cuda(machine.cuda)}: an engine "
            "with the plugin would fail when it runs"
        )


def _too_old(machine: Machine) -> bool:
    """The GPU is older than our kernels."""
    kernels, gpu = machine.kernels, _first(machine)
    return kernels is not None and gpu is not None and gpu.sm < kernels.least_sm


def _cuda_bindings(manifest: Manifest, machine: Machine) -> Row:
    engine, cuda = _engine(machine, "cuda.bindings"), machine.cuda
    found = numbers(engine.version or "")
    major = (cuda or 0) // 1000
    line = f'pip install "cuda-bindings>={major}.0,<{major + 1}"'
    newer = bool(found) and cuda is not None and found[0] > major
    return judged(
        "cuda-bindings",
        (not machine.gpus, "unneeded", "there is no GPU to use them on"),
        (bool(engine.fault), "fails", "it cannot be imported: no engine runs from Python"),
        (engine.version is None, "absent", f"no engine runs from Python; run: {line}"),
        (found < LEAST_CUDA_BINDINGS, "fails", f"older than what rt-ris asks for; run: {line}"),
        (newer, "unknown", f"newer than the driver, which was never tried; rather: {line}"),
        (True, "ok", "buffers and streams can be driven from Python"),
        expected="12.6 or later, of the driver's CUDA",
        found=_version(engine),
    )


def _host_memory(manifest: Manifest, machine: Machine) -> Row:
    graphs, passed = _graphs_mib(manifest), _passed_mib(manifest)
    needed = round(ENGINE_MIB + GRAPH_COPIES * graphs + INNER_TENSORS * passed)
    fewer = "fewer sentences at once need less; a smaller variant or fp16 does, too"
    return judged(
        "host memory",
        *_room(machine.memory_mib, needed, fails=f"loading may be killed; {fewer}"),
        expected=f"about {needed} MiB to run (estimate: {GRAPH_COPIES:.0f} x {graphs:.0f} MiB of "
        f"graphs + {INNER_TENSORS:.0f} x {passed:.1f} MiB that stages pass on for "
        f"{MOST_EXPRESSIONS} sentences; a build takes more)",
        found=_mib(machine.memory_mib, "available"),
    )


def _device_memory(manifest: Manifest, machine: Machine) -> Row:
    gpu, graphs, passed = _first(machine), _graphs_mib(manifest), _passed_mib(manifest)
    needed = round(CONTEXT_MIB + graphs + INNER_TENSORS * passed)
    shared = gpu is not None and gpu.integrated
    free = machine.memory_mib if shared else None if gpu is None else gpu.free_mib
    fewer = "free the GPU, give --workspace to the build, or take a smaller variant"
    return judged(
        "device memory",
        (gpu is None, "absent", "no engine runs here"),
        *_room(free, needed, fails=f"building or running an engine runs out of memory; {fewer}"),
        expected=f"about {needed} MiB to run (estimate, never measured: {graphs:.0f} MiB of "
        f"weights + {INNER_TENSORS:.0f} x {passed:.1f} MiB that stages pass on for "
        f"{MOST_EXPRESSIONS} sentences + {CONTEXT_MIB}; a build takes more)",
        found="no GPU"
        if gpu is None
        else _mib(free, "available, shared with the processor" if shared else "free")
        + f", {gpu.total_mib} in all",
    )


def _disk(manifest: Manifest, machine: Machine) -> Row:
    graphs = _graphs_mib(manifest)
    needed = max(1, round(ENGINE_SHARE * graphs))
    return judged(
        "disk",
        *_room(machine.disk_mib, needed, fails="a build fails at its end; give --out elsewhere"),
        expected=f"about {needed} MiB per compute capability for engines (estimate: "
        f"{ENGINE_SHARE} x {graphs:.0f} MiB of graphs)",
        found=_mib(machine.disk_mib, "free beside the bundle"),
    )


ROWS: Final[tuple[Callable[[Manifest, Machine], Row], ...]] = (
    _python,
    _onnx_runtime,
    _cuda_provider,
    _host_memory,
    _driver,
    _gpu,
    _device_memory,
    _tensorrt,
    _tensorrt_rtx,
    _kernels,
    _cuda_bindings,
    _disk,
)
"""The processor's way first, then the GPU's."""


def _room(free: int | None, needed: int, *, fails: str) -> tuple[Case, ...]:
    return (
        (free is None, "unknown", "not looked at: this system does not say"),
        ((free or 0) < needed, "fails", fails),
        (True, "ok", "by the estimate there is room"),
    )


def _first(machine: Machine) -> Gpu | None:
    return machine.gpus[0] if machine.gpus else None


def _graphs_mib(manifest: Manifest) -> float:
    """Size of all graphs, nearly all of it weights."""
    files = (name for stage in manifest.stages for name in manifest.graph_files(stage))
    return sum(manifest.members[name].bytes for name in files) / 2**20


def _passed_mib(manifest: Manifest) -> float:
    """Size of what stages pass on for the most sentences at once."""
    outputs = (spec for stage in manifest.stages for spec in stage.spec.outputs)
    return sum(spec.nbytes(expressions=MOST_EXPRESSIONS) for spec in outputs) / 2**20


def _foreign(manifest: Manifest) -> list[str]:
    """Ids of the stages whose graphs hold operators of ONNX Runtime's own."""
    return [stage.spec.id for stage in manifest.stages if stage.target.format == "onnxruntime"]


def _operators(manifest: Manifest) -> dict[str, tuple[int, ...]] | None:
    """Our operators with their channels over all stages; None if a stage does not say."""
    found: dict[str, tuple[int, ...]] = {}
    for stage in manifest.stages:
        if stage.operators is None:
            return None
        for name, channels in stage.operators.items():
            found[name] = tuple(sorted({*found.get(name, ()), *channels}))
    return found


def _engine(machine: Machine, module: str) -> Engine:
    return machine.engines.get(module, Engine(fault="not looked at"))


def _install(machine: Machine) -> str:
    if machine.l4t is not None:
        return "it is part of JetPack (docs/jetson.md)"
    return "run: pip install tensorrt"


def numbers(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``10.3.0.post1`` is (10, 3, 0); none of an empty one."""
    leading = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, leading[0].split("."))) if leading else ()


def _version(engine: Engine) -> str:
    return f"broken: {engine.fault}" if engine.fault else engine.version or "not installed"


def _cuda(version: int | None) -> str:
    return "none" if version is None else cuda_version(version)


def _list(sizes: tuple[int, ...]) -> str:
    return " and ".join(map(str, sizes)) or "no"


def _mib(size: int | None, what: str) -> str:
    return "not known" if size is None else f"{size} MiB {what}"
