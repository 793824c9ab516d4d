"""Checks and times the CUDA kernels on this machine's GPU, in one command.

    python bench/gpu/run.py --out bench/results/kernels-h200.json
    python bench/gpu/run.py --dry-run      the checks alone, on the emulator, without a GPU

Needs Python >= 3.10 with numpy; on a GPU also torch and cuda-bindings, and for the looks from
outside compute-sanitizer and ncu. Run it from the repository root; nothing is downloaded.
Exits 1 if a check failed or a target was missed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent)]

from cases import CHECKS, Case  # noqa: E402
from check import check, relative  # noqa: E402

CHILD = Path(__file__).with_name("child.py")
REPEATS = 20
COUNTERS = (
    "gpu__time_duration.sum",
    "dram__bytes.sum",
    "lts__t_bytes.sum",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum.pct_of_peak_sustained_elapsed",
    "l1tex__data_bank_conflicts_pipe_lsu_mem_shared.sum",
    "sm__inst_executed_pipe_tensor.sum",
    "sm__warps_active.avg.pct_of_peak_sustained_active",
    "smsp__issue_active.avg.pct_of_peak_sustained_active",
)
SANITIZERS = ("memcheck", "racecheck", "synccheck")


def dry_run() -> dict[str, Any]:
    """Every check on the emulator, with fewer pixels and expressions."""
    from rt_ris_kernels.simt import Emulator

    emulator = Emulator()
    small = [
        replace(case, pixels=min(case.pixels, 257), expressions=min(case.expressions, 3))
        for case in CHECKS
    ]

    def run(arrays: Any, case: Case) -> Any:
        return emulator.run(arrays, **case.attributes, multiprocessors=3)

    return {"gpu": None, "checks": [check(case, run) for case in small]}


def on_gpu(*, quick: bool) -> dict[str, Any]:
    """Everything this machine can show."""
    import timing
    import torch

    from rt_ris_kernels import torch_op
    from rt_ris_kernels.launch import MaskedMutualAttentionLauncher

    launcher = MaskedMutualAttentionLauncher()

    def run(arrays: Any, case: Case) -> Any:
        tensors = [torch.from_numpy(array).cuda() for array in arrays]
        plan = launcher.geometry(**case.sizes)
        outputs = [
            torch.full((case.expressions, size, case.channels), torch.nan, device="cuda").to(
                tensors[0].dtype
            )
            for size in (case.pixels, case.words)
        ]
        room = torch.full((plan.workspace_bytes // 4,), torch.nan, device="cuda")
        stream = torch.cuda.current_stream().cuda_stream
        launcher.launch(tensors, outputs, workspace=room, stream=stream, attributes=case.attributes)
        return tuple(output.cpu().numpy() for output in outputs)

    def plain(arrays: Any, case: Case) -> Any:
        tensors = [torch.from_numpy(array).cuda() for array in arrays]
        return tuple(
            each.cpu().numpy() for each in torch_op.eager(*tensors, *case.attributes.values())
        )

    bandwidth = timing.copy_bandwidth()
    result: dict[str, Any] = {
        "gpu": _gpu_facts(launcher),
        "copy_bytes_per_s": bandwidth,
        "checks": [check(case, run, plain=plain) for case in CHECKS],
        "repeats": _repeats(run),
        "operator": _operator(),
        "plugin": _plugin(run),
    }
    if not quick:
        result["sanitizer"] = {tool: _sanitize(tool) for tool in SANITIZERS}
        result["counters"] = _count()
    with torch.no_grad():
        cases = timing.TIMED[:1] if quick else timing.TIMED
        result["times"] = [timing.time_case(case, launcher, bandwidth=bandwidth) for case in cases]
        if not quick:
            import phases

            result["phases"] = phases.measure(launcher.capability)
    result["tensorrt_rtx"] = _ask_rtx()
    result["targets"] = targets(result["times"])
    return result


def targets(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was aimed at on an H200, and whether it was met."""
    by_name = {row["case"]: row for row in rows}
    found = []

    def add(what: str, value: float, limit: float, *, at_least: bool = False) -> None:
        met = value >= limit if at_least else value <= limit
        found.append({"what": what, "value": round(value, 3), "limit": limit, "met": met})

    one = by_name.get(Case(padded=False).name)
    if one is not None:
        ours = one["kernel"]["graph_us"]["median"]
        add("N=1, 25 words, in a graph, us", ours, 7.0)
        add(
            "times faster than eager in a graph",
            one["eager"]["graph_us"]["median"] / ours,
            4.0,
            at_least=True,
        )
        add(
            "times faster than torch.compile in a graph",
            one["compiled"]["graph_us"]["median"] / ours,
            2.0,
            at_least=True,
        )
    many = by_name.get(Case(expressions=16, padded=False).name)
    if many is not None:
        add("N=16 of one image, in a graph, us", many["kernel"]["graph_us"]["median"], 15.0)
    return found


def _gpu_facts(launcher: Any) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    query = [
        "nvidia-smi",
        "--query-gpu=driver_version,clocks.sm,clocks.mem",
        "--format=csv,noheader",
    ]
    return {
        "name": properties.name,
        "capability": launcher.capability / 10,
        "multiprocessors": launcher.multiprocessors,
        "memory_bytes": properties.total_memory,
        "driver_and_clocks": _output(query),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "binary_sha256": launcher.binary.sha256,
    }


def _repeats(run: Any) -> dict[str, Any]:
    """Whether repeated calls give the same bits."""
    from cases import draw

    found = {}
    for case in (Case(), Case(words=77, expressions=16), Case(dtype="float32")):
        arrays, _ = draw(case)
        first = [output.tobytes() for output in run(arrays, case)]
        same = all(
            [output.tobytes() for output in run(arrays, case)] == first for _ in range(REPEATS)
        )
        found[case.name] = same
    return found


def _operator() -> dict[str, Any]:
    """The PyTorch operator: its backward pass on the GPU against float64 on the processor."""
    import torch
    from cases import draw

    found = {}
    for case in (Case(dtype="float32", pixels=901, expressions=2), Case(pixels=901, expressions=2)):
        arrays, _ = draw(case)
        gradients = []
        for device, dtype in (("cuda", None), ("cpu", torch.float64)):
            leaves = [torch.from_numpy(array).to(device=device, dtype=dtype) for array in arrays]
            leaves = [leaf.requires_grad_(k != 2) for k, leaf in enumerate(leaves)]
            outputs = torch.ops.rt_ris.masked_mutual_attention(*leaves, *case.attributes.values())
            weights = [
                torch.arange(each.numel()).view_as(each.cpu()).remainder(7) - 3 for each in outputs
            ]
            loss = sum(
                (each * weight.to(each)).sum()
                for each, weight in zip(outputs, weights, strict=True)
            )
            loss.backward()
            gradients.append(
                [leaf.grad.cpu().double().numpy() for leaf in leaves if leaf.requires_grad]
            )
        worst = max(relative(a, b) for a, b in zip(*gradients, strict=True))
        found[case.name] = {
            "worst_gradient_error": worst,
            "passed": worst <= (1e-5 if case.dtype == "float32" else 2e-3),
        }
    return found


def _plugin(run: Any) -> dict[str, Any]:
    """The TensorRT plugin's enqueue, called by hand with TensorRT's names and no TensorRT."""
    import fake_tensorrt
    import torch
    from cases import draw

    from rt_ris_kernels import plugin

    plugin.register(fake_tensorrt)
    creator = fake_tensorrt.REGISTRY.get_creator("MaskedMutualAttention", "1", "rt_ris")
    found = {}
    for case in (
        Case(),
        Case(words=77, expressions=3, shared=False, normalize=1),
        Case(dtype="float32"),
    ):
        arrays, _ = draw(case)
        wanted = [output.tobytes() for output in run(arrays, case)]
        fields = plugin.Fields(fake_tensorrt, case.attributes)
        made = creator.create_plugin("node", fields.collection, None).attach_to_context(None)
        kind = (
            fake_tensorrt.DataType.HALF if case.dtype == "float16" else fake_tensorrt.DataType.FLOAT
        )
        tensors = [torch.from_numpy(array).cuda() for array in arrays]
        outputs = [
            torch.full((case.expressions, size, case.channels), torch.nan, device="cuda").to(
                tensors[0].dtype
            )
            for size in (case.pixels, case.words)
        ]
        room = torch.full(
            (
                made.get_workspace_size(
                    [fake_tensorrt.dynamic(tuple(t.shape)) for t in tensors], []
                )
                // 4,
            ),
            torch.nan,
            device="cuda",
        )
        torch.cuda.synchronize()
        made.enqueue(
            [fake_tensorrt.desc(tuple(tensor.shape), kind) for tensor in tensors],
            [],
            [tensor.data_ptr() for tensor in tensors],
            [output.data_ptr() for output in outputs],
            room.data_ptr(),
            torch.cuda.current_stream().cuda_stream,
        )
        same = [output.cpu().numpy().tobytes() for output in outputs] == wanted
        found[case.name] = {"same_bits_as_the_launcher": same, "passed": same}
    return found


def _sanitize(tool: str) -> dict[str, Any]:
    program = shutil.which("compute-sanitizer")
    if program is None:
        return {"passed": None, "why": "compute-sanitizer is not on this machine"}
    done = _python([program, "--tool", tool, "--error-exitcode", "9"], [])
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "=====" in line]
    return {"passed": done.returncode == 0, "summary": lines[-1:] or [done.stderr[-400:]]}


def _count() -> Any:
    program = shutil.which("ncu")
    if program is None:
        return "ncu is not on this machine"
    options = ["--clock-control", "none", "--csv", "--page", "raw", "--metrics", ",".join(COUNTERS)]
    done = _python([program, *options], ["--timed"])
    rows = [line for line in done.stdout.splitlines() if line.startswith('"')]
    if done.returncode or len(rows) < 3:
        return f"ncu failed: {(done.stdout + done.stderr)[-600:]}"
    import csv

    header, units, *values = list(csv.reader(rows))
    found = []
    for value in values:
        row = dict(zip(header, value, strict=True))
        kept = {"kernel": row["Kernel Name"], "grid": row["Grid Size"]}
        kept |= {
            f"{name} [{unit}]": row[name]
            for name, unit in zip(header, units, strict=True)
            if name in COUNTERS
        }
        found.append(kept)
    return found


def _python(prefix: list[str], options: list[str]) -> subprocess.CompletedProcess[str]:
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    command = [*prefix, sys.executable, str(CHILD), *options]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=240, check=False
    )


def _ask_rtx() -> str:
    try:
        import tensorrt_rtx
    except ModuleNotFoundError:
        return "not asked: tensorrt_rtx is not installed on this machine"
    builder = tensorrt_rtx.Builder(tensorrt_rtx.Logger())
    config = builder.create_builder_config()
    accepted = config.set_compute_capability(tensorrt_rtx.ComputeCapability.CURRENT, 0)
    return f"tensorrt_rtx {tensorrt_rtx.__version__} accepts this GPU: {accepted}"


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError) as error:
        return str(error)


def _green(result: dict[str, Any]) -> bool:
    verdicts = [row["passed"] for row in result["checks"]]
    verdicts += result.get("repeats", {}).values()
    for part in ("operator", "plugin"):
        verdicts += [row["passed"] for row in result.get(part, {}).values()]
    verdicts += [row["passed"] is not False for row in result.get("sanitizer", {}).values()]
    return all(verdicts)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    parser.add_argument("--dry-run", action="store_true", help="on the emulator, without a GPU")
    parser.add_argument("--quick", action="store_true", help="no sanitizer, no counters, one size")
    given = parser.parse_args()
    result = dry_run() if given.dry_run else on_gpu(quick=given.quick)
    facts = {
        "python": platform.python_version(),
        "numpy": np.__version__,
        "commit": os.environ.get("RT_RIS_COMMIT")
        or _output(["git", "-C", str(ROOT), "rev-parse", "HEAD"]),
        "scope": "the operator alone, both launches; inputs and outputs in GPU memory",
    }
    result = {**facts, **result, "green": _green(result)}
    text = json.dumps(result, indent=1) + "\n"
    if given.out:
        given.out.parent.mkdir(parents=True, exist_ok=True)
        given.out.write_text(text)
    for row in result["checks"]:
        print(
            "ok  " if row["passed"] else "FAIL",
            row["case"],
            f"{row['f_lav']:.1e} {row['f_val']:.1e}",
        )
    for row in result.get("times", []):
        others = {k: row[k]["graph_us"]["median"] for k in ("kernel", "eager", "compiled", "sdpa")}
        print(row["case"], f"floor {row['floor_us']}", others, row["kernel"])
    for key in (
        "repeats",
        "operator",
        "plugin",
        "sanitizer",
        "counters",
        "tensorrt_rtx",
        "targets",
        "green",
    ):
        if key in result:
            print(key, json.dumps(result[key], indent=1))
    missed = any(not target["met"] for target in result.get("targets", []))
    return 0 if result["green"] and not missed else 1


if __name__ == "__main__":
    sys.exit(main())
