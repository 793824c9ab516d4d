"""Where the time of a call goes: the first kernel cut short after each of its phases.

Each cut is the shipped source with a line planted, compiled here with nvcc. What a cut leaves out
is not written, so only its time means something. Differences of neighbours are what a phase adds.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import timing
import torch
from cases import Case

from rt_ris_kernels.arguments import fill
from rt_ris_kernels.binary import Binary
from rt_ris_kernels.build import CSRC, SOURCE, find_nvcc
from rt_ris_kernels.launch import MaskedMutualAttentionLauncher

LOADED = "      rr_wait_for_copies();\n      rr_barrier();\n"
SCORED = "      score(pixels);\n      rr_barrier();\n"
WEIGHED = "      attend(tile * PIXELS);\n      rr_barrier();\n"
COLLECTED = "      collect(pixels);\n"
CUTS = {
    "an empty launch": ("  RR_DEVICE void run() {\n", "  RR_DEVICE void run() {\n    return;\n"),
    "until tiles have come": (LOADED, f"{LOADED}      continue;\n"),
    "and scores": (SCORED, f"{SCORED}      continue;\n"),
    "and softmax": (WEIGHED, f"{WEIGHED}      continue;\n"),
    "and f_lav, without A^T z_v": (COLLECTED, ""),
    "all of the first kernel": ("", ""),
}
OTHERS = ("HALF_FORWARD(128", "HALF_FORWARD(256, 80", "SINGLE_FORWARD(", "REDUCE(f32")


def measure(capability: int) -> dict[str, dict[str, object]]:
    """Microseconds of each cut, of the second kernel alone, and of both, by case."""
    with tempfile.TemporaryDirectory() as folder:
        launchers = _compile(Path(folder), capability)
    found: dict[str, dict[str, object]] = {}
    for case in (Case(padded=False), Case(expressions=16, padded=False)):
        row: dict[str, object] = {}
        for name, launcher in launchers.items():
            row[name] = asdict(timing.in_graph(_calls(case, launcher, kernels=(0,))))
        whole = launchers["all of the first kernel"]
        row["the second kernel alone"] = asdict(timing.in_graph(_calls(case, whole, kernels=(1,))))
        row["both"] = asdict(timing.in_graph(_calls(case, whole, kernels=(0, 1))))
        found[case.name] = row
    return found


def _compile(folder: Path, capability: int) -> dict[str, MaskedMutualAttentionLauncher]:
    text = SOURCE.read_text()
    kept = "\n".join(line for line in text.split("\n") if not line.startswith(OTHERS))
    running = {}
    for index, (name, (place, planted)) in enumerate(CUTS.items()):
        assert place in kept, name
        source = folder / f"{index}.cu"
        source.write_text(kept.replace(place, planted, 1) if place else kept)
        command = [find_nvcc(), "-std=c++17", f"-arch=sm_{capability}", f"-I{CSRC}", "-cubin"]
        command += ["-w", str(source), "-o", str(source.with_suffix(".cubin"))]
        running[name] = (subprocess.Popen(command), source.with_suffix(".cubin"))
    launchers = {}
    for name, (process, code) in running.items():
        assert process.wait() == 0, name
        binary = Binary(
            code=code.read_bytes(), sha256="", architectures=(capability,), for_cuda_12={}
        )
        launchers[name] = MaskedMutualAttentionLauncher(binary=binary)
    return launchers


def _calls(
    case: Case, launcher: MaskedMutualAttentionLauncher, *, kernels: tuple[int, ...]
) -> list[Callable[[], object]]:
    plan = launcher.geometry(**case.sizes)
    launches = [(plan.forward, False), (plan.reduce, len(kernels) == 2)]
    calls: list[Callable[[], object]] = []
    for inputs in timing.buffers(case):
        outputs = [
            inputs[0].new_empty(case.expressions, size, case.channels)
            for size in (case.pixels, case.words)
        ]
        room = torch.zeros(plan.workspace_bytes // 4, device="cuda")
        arguments = fill(
            [tensor.data_ptr() for tensor in (*inputs, *outputs)],
            workspace=room.data_ptr(),
            plan=plan,
            shared=case.shared,
            pixels=case.pixels,
            words=case.words,
            attributes=case.attributes,
        )

        def call(arguments: object = arguments, keep: object = (inputs, outputs, room)) -> None:
            stream = torch.cuda.current_stream().cuda_stream
            for index in kernels:
                launch, dependent = launches[index]
                launcher.put(
                    launch,
                    arguments=ctypes.addressof(arguments),  # type: ignore[arg-type]
                    stream=stream,
                    dependent=dependent,
                )

        calls.append(call)
    return calls
