"""``rt-ris export``: a checkpoint becomes a bundle, if the graphs compute what PyTorch computes."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rt_ris.bundle import Bundle
from rt_ris.cli.options import add_json, add_weights, print_json, shown
from rt_ris.cli.stopping import stoppable
from rt_ris.errors import ParityError

if TYPE_CHECKING:
    from rt_ris_export.parity_record import ParityRecord
    from rt_ris_export.step import Progress

PRECISIONS = ("fp32", "fp16")
TARGETS = ("onnx", "onnxruntime")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    parser = subparsers.add_parser("export", help="export a checkpoint into a gated bundle")
    parser.add_argument("--arch", required=True, help="architecture, such as maris")
    parser.add_argument("--variant", help="size of it [the architecture's default]")
    parser.add_argument("--checkpoint", type=Path, help="trained weights [those that are shipped]")
    add_weights(parser)
    parser.add_argument("--out", type=Path, help="the bundle [./ARCH-VARIANT.bundle]")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32")
    parser.add_argument(
        "--target",
        choices=TARGETS,
        default="onnx",
        help="onnx: any runtime and builder; onnxruntime: its own attention, in fp32, for bundles "
        "that are served on a processor [onnx]",
    )
    parser.add_argument(
        "--remedy",
        choices=("none", "auto"),
        default="none",
        help="auto: where a stage misses the gate in fp16, compute more of it in fp32 and say so",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        help="limit on stages' relative errors [fp32: 1e-4; fp16: 3e-2 alone, 0.1 chained]",
    )
    parser.add_argument(
        "--gate",
        type=Path,
        metavar="DATA",
        help="data in RefCOCO's format for the gate, where the network knows nothing on the "
        "shipped photographs",
    )
    parser.add_argument("--gate-split", default="test", help="split of it [test]")
    parser.add_argument("--overwrite", action="store_true", help="replace a bundle that is there")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Export, and print how close the bundle is to PyTorch."""
    from rt_ris_export import ExportRecipe, export_bundle
    from rt_ris_export.parity_record import read_record
    from rt_ris_train.official import named_files

    began = time.perf_counter()
    recipe = ExportRecipe(
        arch=args.arch,
        variant=args.variant,
        checkpoint=args.checkpoint,
        weights=named_files(args.weights),
        out=args.out,
        precision=args.precision,
        target=args.target,
        remedy=args.remedy,
        tolerance=args.tolerance,
        gate=args.gate,
        gate_split=args.gate_split,
        overwrite=args.overwrite,
    )
    try:
        with stoppable():
            path = export_bundle(recipe, progress=_progress)
    except ParityError as error:
        if args.json:  # what was measured until then helps to see why
            missed = {"missed": str(error), "stage": error.stage, "cause": error.cause}
            print_json({**missed, "parity": dict(error.measured)})
        raise
    seconds = round(time.perf_counter() - began, 1)
    record = read_record(path)
    precision = _precision(path)
    if args.json:
        print_json(_result(path, record, seconds=seconds) | {"precision": precision})
    else:
        print("\n".join([*_precision_lines(precision), _table(path, record, seconds=seconds)]))
    return 0


def _progress(news: Progress) -> None:
    line = f"[{news.index}/{news.count}] {news.step:<8}  {news.message}"
    print(line, file=sys.stderr, flush=True)


def _precision(path: Path) -> list[dict[str, object]]:
    """What each stage is called, and its share in half precision."""
    return [
        {
            "stage": stage.spec.id,
            "precision": stage.target.precision,
            "half_weights": stage.half_weights,
            "half_multiply_adds": stage.half_multiply_adds,
        }
        for stage in Bundle.open(path).manifest.stages
    ]


def _precision_lines(stages: Sequence[Mapping[str, object]]) -> list[str]:
    if all(stage["precision"] == "fp32" for stage in stages):
        return []
    lines = ["in half precision                   weights   multiply-adds"]
    lines += [
        f"  {stage['stage']!s:<15}{stage['precision']!s:<15}"
        f"{stage['half_weights']:>11.1%}{stage['half_multiply_adds']:>16.1%}"
        for stage in stages
    ]
    return lines


def _result(path: Path, record: ParityRecord, *, seconds: float) -> dict[str, object]:
    from rt_ris.records import to_data

    return {"bundle": shown(path), "seconds": seconds, "parity": to_data(record)}


def _table(path: Path, record: ParityRecord, *, seconds: float) -> str:
    summary = record.summary()
    lines = ["relative error against PyTorch   stage alone   from pixels on"]
    lines += [
        f"  {stage.id + ' ' + tensor.name:<31}"
        f"{tensor.isolated.relative:11.1e}{tensor.chained.relative:17.1e}"
        for stage in record.stages
        for tensor in stage.tensors
    ]
    lines += [
        f"  {'limit, passed':<31}{record.alone:11.1e}{record.tolerance:17.1e}",
        f"masks: {summary.cases}, smallest IoU {summary.mask_iou:.4f}, {summary.flips} pixels "
        f"flipped; {record.proving} cover 5 to 95 % of their picture and so prove something",
    ]
    if record.labels is not None:
        labels = record.labels
        lines.append(
            f"oIoU on {labels.sentences} labelled sentences: {labels.trained:.2f} in PyTorch, "
            f"{labels.exported:.2f} exported (limit {labels.limit} points apart)"
        )
    lines += [f"remedy: {step}" for step in record.remedies]
    if record.seeded:
        lines.append("The weights are seeded random ones, not trained: masks mean nothing.")
    return "\n".join([*lines, f"{path} written in {seconds} s"])
