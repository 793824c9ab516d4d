"""Write the numbers of the READMEs from ``bench/results``; ``--check`` only compares."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
END = "<!-- /numbers -->"


def maris_lite(result: dict[str, Any]) -> str:
    """What the shipped checkpoint finds and how long it takes."""
    masks, times = result["masks"], result["time"]
    whole, other = masks["bundle"], masks["bundle_sentences_on_other_pictures"]
    some, trained = masks["bundle_compared"], masks["pytorch_compared"]
    return f"""
| on composite scenes it has not seen | oIoU | mIoU | Pr@0.5 | no-target accuracy | T-acc |
|---|---|---|---|---|---|
| the bundle, {whole["sentences"]} sentences | {_row(whole)} |
| the same, sentences given to other pictures | {_row(other)} |
| the bundle, {some["sentences"]} sentences | {_row(some)} |
| PyTorch, the same {trained["sentences"]} | {_row(trained)} |

Scenes and backgrounds are new, the objects are not: known kinds, known cut-outs. Processor time of
one thread ({result["machine"]["processor"]}), whole calls without resizing masks to full size:

| a new picture with its first sentence | a further sentence | each of sixteen in one call |
|---|---|---|
| {_times(times)} |

The bundle has {result["bundle_bytes"] / 1e6:.0f} MB.
"""


def _times(times: dict[str, Any]) -> str:
    milliseconds = {name: spread["median"] for name, spread in times["milliseconds"].items()}
    first, further = milliseconds["new_picture_and_sentence"], milliseconds["further_sentence"]
    ratio = times["first_over_further"]
    return f"{first} ms | {further} ms, {ratio} times less | {milliseconds['one_of_16']} ms"


def _row(measures: dict[str, Any]) -> str:
    names = ("oIoU", "mIoU", "Pr@0.5", "N_acc", "T_acc")
    return " | ".join(f"{measures[name]:.2f}" for name in names)


def kernels(result: dict[str, Any]) -> str:
    """What the CUDA kernels cost, beside PyTorch and the floor, and where it goes."""
    gpu = result["gpu"]
    rows = [_kernel_row(row) for row in result["times"]]
    errors = [row for row in result["checks"] if "float16" in row["case"]]
    single = [row for row in result["checks"] if "float32" in row["case"]]
    worst = max(max(row["f_lav"], row["f_val"]) for row in errors)
    worst_single = max(max(row["f_lav"], row["f_val"]) for row in single)
    targets = "\n".join(
        f"| {row['what']} | {'at least' if 'faster' in row['what'] else 'at most'} {row['limit']:g}"
        f" | {row['value']:g} | {'yes' if row['met'] else '**no**'} |"
        for row in result["targets"]
    )
    return f"""
{gpu["name"]}, driver and clocks {gpu["driver_and_clocks"]}, PyTorch {gpu["torch"]}, a copy moves
{result["copy_bytes_per_s"] / 1e12:.2f} TB/s. Microseconds per call in a CUDA graph, medians,
buffers taking turns; P = 4096 pixels. The floor is the least bytes over the copy's bandwidth.

| call | floor | ours | eager | torch.compile | with SDPA |
|---|---|---|---|---|---|
{chr(10).join(rows)}

Worst relative error against float64 over {len(errors)} cases: {worst:.1e} in float16 (limit
{errors[0]["limit"]:g}); over {len(single)} cases {worst_single:.1e} in float32 (limit
{single[0]["limit"]:g}).

| target | | measured | met |
|---|---|---|---|
{targets}

Where the time goes, microseconds in a graph; the first kernel is cut short after each phase:

| the first kernel until … | N=1 | N=16 |
|---|---|---|
{_phases(result["phases"])}

`ncu`, the first kernel with sixteen expressions: shared memory {_counter(result, SHARED_MEMORY)} %
busy, an instruction issued in {_counter(result, ISSUE_SLOTS)} % of the slots,
{_counter(result, WARPS)} % of a multiprocessor's warps resident.
"""


SHARED_MEMORY = "l1tex__data_pipe_lsu_wavefronts_mem_shared.sum.pct_of_peak_sustained_elapsed [%]"
ISSUE_SLOTS = "smsp__issue_active.avg.pct_of_peak_sustained_active [%]"
WARPS = "sm__warps_active.avg.pct_of_peak_sustained_active [%]"


def _counter(result: dict[str, Any], name: str) -> str:
    rows = result["counters"]
    many = next(row for row in rows if "forward" in row["kernel"] and "16, 16" in row["grid"])
    return f"{float(many[name]):.0f}"


def _phases(phases: dict[str, dict[str, dict[str, float]]]) -> str:
    one, many = phases.values()
    return "\n".join(
        f"| {name} | {one[name]['median']:.1f} | {many[name]['median']:.1f} |" for name in one
    )


def _kernel_row(row: dict[str, Any]) -> str:
    times = (row[name]["graph_us"]["median"] for name in ("kernel", "eager", "compiled", "sdpa"))
    name = row["case"].split(" mean=")[0].replace(" P=4096", "")
    return f"| {name} | {row['floor_us']:.1f} | {' | '.join(f'{each:.1f}' for each in times)} |"


def half_masks(result: dict[str, Any]) -> str:
    """What half precision does to the masks of a trained network."""
    masks, off = result["masks"], result["differences_in_oIoU"]
    names = {"pytorch": "PyTorch", "fp32": "float32 bundle", "fp16": "half-precision bundle"}
    rows = [
        f"| {name} | {found['sentences']} | {found['oIoU']:.3f} | {found['mIoU']:.3f} "
        f"| {off.get(key, 0.0):.3f} |"
        for key, name in names.items()
        for found in (masks[key],)
    ]
    return "\n".join(
        ["", "| | sentences | oIoU | mIoU | off by |", "|---|---|---|---|---|", *rows, "", ""]
    )


def gates(result: dict[str, Any]) -> str:
    """What the gate of each published size found."""
    return "\n".join(line for name, tries in result.items() for line in _gate(name, tries))


def _gate(name: str, tries: list[dict[str, Any]]) -> list[str]:
    lines = ["", f"## {name}", ""]
    for one in tries:
        spent = f"{one['seconds'] / 60:.0f} min, {one['peak_mib'] / 1024:.1f} GiB"
        lines += [f"`{one['command']}`: {spent}. {_outcome(one)}", ""]
        if one.get("stages"):
            lines += [
                "| stage | half of multiply-adds | float32 alone | chained | half alone | chained "
                "| largest | infinite in products, NaN |",
                "|---|---|---|---|---|---|---|---|",
                *map(_gate_row, one["stages"]),
                "",
            ]
    return lines


def _outcome(found: dict[str, Any]) -> str:
    if found["exit"]:
        said = found["said"][-1].removeprefix("rt-ris: error: ")
        return f"Exit {found['exit']}: {said}"
    remedies = f" Remedies: {'; '.join(found['remedies'])}." if found["remedies"] else ""
    return f"Passed: {found['masks']} masks, smallest IoU {found['mask_iou']:.4f}.{remedies}"


def _gate_row(stage: dict[str, Any]) -> str:
    errors = " | ".join(
        f"{side[key]:.1e}"
        for side in (stage["fp32"], stage["fp16"])
        for key in ("alone", "chained")
    )
    share = "fp16"  # of a miss, before any remedy
    if "precision" in stage:
        share = f"{stage['precision']}, {stage['half_multiply_adds']:.0%}"
    ended = f"{stage['infinite_in_products']}, {stage['nan']}"
    return f"| {stage['stage']} | {share} | {errors} | {stage['largest']:.3g} | {ended} |"


def engines(result: dict[str, Any]) -> str:
    """What TensorRT-RTX needs to build each stage, and what it makes of attentions."""
    lines = [
        "",
        "| network | stage | capabilities | s to build | MiB | fused attentions | our plugin |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in result.items():
        built = found.get("engines", [])
        if not built:
            lines.append(f"| {name} | refused: {found['said'][-1]} | | | | | |")
        for stage in dict.fromkeys(row["stage"] for row in built):
            rows = [row for row in built if row["stage"] == stage]
            lines.append(
                f"| {name} | {stage} {rows[0]['precision']} "
                f"| {', '.join(map(str, sorted(row['sm'] for row in rows)))} "
                f"| {_range([row['seconds'] for row in rows])} "
                f"| {_range([row['bytes'] / 2**20 for row in rows])} "
                f"| {', '.join(sorted({str(row['fused_attentions']) for row in rows}))} "
                f"| {', '.join(str(row['sm']) for row in rows if row['plugin'])} |"
            )
        for one in found["refused"]:
            lines.append(f"| {name} | {one['stage']} | {one['sm']} | refused | | | |")
    lines += ["", "| network | engines | s for all | GiB |", "|---|---|---|---|"]
    for name, found in result.items():
        lines.append(
            f"| {name} | {len(found.get('engines', []))} | {found['seconds_of_all_tries']:.0f} "
            + (f"| {found['peak_mib'] / 1024:.1f} |" if found["peak_mib"] else "| not measured |")
        )
    return "\n".join([*lines, "", ""])


def _range(values: list[float]) -> str:
    shown = [f"{value:.1f}" for value in (min(values), max(values))] if values else ["not measured"]
    return " to ".join(dict.fromkeys(shown))


def tiled_attention(result: dict[str, Any]) -> str:
    """What ONNX Runtime's attention operator saves."""
    names = {"image_encoder": "image encoder", "head": "a sentence's head: fusion and decoder"}
    rows = [
        f"| {names[part]} | {_peaks(found, 'onnx')} | {_peaks(found, 'onnxruntime')} | "
        f"{found['onnxruntime']['cpu_over_onnx']['median']:.2f} | "
        f"{found['onnxruntime']['relative_error']:.0e} |".replace("0e+00", "nothing")
        for part, found in result["parts"].items()
    ]
    encoder = result["parts"]["image_encoder"]
    whole = encoder["onnxruntime_without_bands"]
    return f"""
MARIS vit_b, one thread ({result["machine"]["processor"]}), ONNX Runtime
{result["versions"]["onnxruntime"]}, {encoder["rounds"]} rounds in turns. Memory is the peak of a
process that runs nothing else, less what it has when the graph is loaded.

| | peak, `onnx` | peak, `onnxruntime` | CPU time, ratio | results differ by |
|---|---|---|---|---|
{chr(10).join(rows)}

With SAM's bias as a whole instead of in bands the encoder would need
{_mib(whole["peak_rss_mib"] - whole["loaded_rss_mib"])}, at {whole["cpu_over_onnx"]["median"]:.2f}
of the time.
"""


def _peaks(found: dict[str, Any], form: str) -> str:
    return _mib(found[form]["peak_rss_mib"] - found[form]["loaded_rss_mib"])


def _mib(size: int) -> str:
    return f"{size:,} MiB"


PARTS: tuple[tuple[Path, str, Callable[[dict[str, Any]], str]], ...] = (
    (ROOT / "README.md", "maris-lite.json", maris_lite),
    (ROOT / "kernels" / "README.md", "kernels-h200.json", kernels),
    (ROOT / "export" / "README.md", "half-masks.json", half_masks),
    (ROOT / "docs" / "gates.md", "gates.json", gates),
    (ROOT / "docs" / "engines.md", "engines.json", engines),
    (ROOT / "docs" / "processor.md", "tiled-attention.json", tiled_attention),
)


def filled(page: Path, result: str, write: Callable[[dict[str, Any]], str]) -> str:
    """The page with its numbers written anew."""
    begin = f"<!-- numbers: bench/results/{result}, written by tools/readme_numbers.py -->\n"
    head, rest = page.read_text("utf-8").split(begin)
    numbers = write(json.loads((RESULTS / result).read_text("utf-8")))
    return head + begin + numbers + END + rest.split(END, 1)[1]


def main() -> int:
    """Write the pages, or with --check return 1 where one differs from its JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    pages = {page: filled(page, result, write) for page, result, write in PARTS}
    if args.check:
        return int(any(page.read_text("utf-8") != text for page, text in pages.items()))
    for page, text in pages.items():
        page.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
