"""``rt-ris build``: engines of a bundle, here or for compute capabilities that are not here."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rt_ris.build.engines import RTX_SMS, build_engines
from rt_ris.build.record import EngineRecord, default_folder
from rt_ris.bundle import Bundle
from rt_ris.cli.gate import gate_of_build
from rt_ris.cli.options import add_json, positive, print_json, shown
from rt_ris.cli.stopping import stoppable
from rt_ris.records import to_data


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    parser = subparsers.add_parser(
        "build",
        help="build TensorRT engines of a bundle",
        description="Build every stage into an engine. For the GPU that is there the gate is run "
        "at the end, and engines that miss it are not kept. TensorRT-RTX also builds for named "
        "compute capabilities without a GPU; such engines are refused until `rt-ris verify` has "
        "passed on one.",
    )
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    parser.add_argument("--target", choices=("tensorrt", "tensorrt-rtx"), required=True)
    parser.add_argument(
        "--sm",
        type=_capabilities,
        default=(),
        metavar="SM,SM",
        help=f"compute capabilities, of {','.join(map(str, RTX_SMS))} [the GPU that is there]",
    )
    parser.add_argument("--out", type=Path, help="folder of the engines [BUNDLE.engines]")
    parser.add_argument(
        "--no-plugin", action="store_true", help="build our operators from their functions"
    )
    parser.add_argument("--workspace", type=positive, metavar="MIB", help="builder's device memory")
    parser.add_argument("--overwrite", action="store_true", help="replace a folder that is there")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Build, run the gate where the GPU is here, and say what was not verified."""
    bundle = Bundle.open(args.bundle)
    out = args.out or default_folder(args.bundle)
    with stoppable():
        records = build_engines(
            bundle,
            out,
            target=args.target,
            sms=args.sm,
            plugin=not args.no_plugin,
            workspace_mib=args.workspace,
            overwrite=args.overwrite,
            accept=_nothing if args.sm else gate_of_build(bundle, args.target, _say),
            say=_say,
        )
    if args.json:
        found = {"engines": shown(out), "verified": not args.sm}
        print_json({**found, "built": [to_data(record) for record in records]})
    else:
        print(_table(records))
        state = "verified on this GPU"
        if args.sm:
            state = "UNVERIFIED: `rt-ris verify --engines` on their GPU makes them usable"
        print(f"{shown(out)}: {len(records)} engines, {state}.")
    return 0


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _nothing(folder: Path) -> None:
    """What is asked of engines whose GPU is not here."""


def _capabilities(text: str) -> tuple[int, ...]:
    try:
        return tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no list such as 75,86,120") from error


def _table(records: tuple[EngineRecord, ...]) -> str:
    wide = max(len(record.engine) for record in records) + 2
    lines = [f"{'engine':<{wide}}{'MiB':>8}{'s':>8}{'layers':>8}{'fused attentions':>18}"]
    lines += [
        f"{record.engine:<{wide}}{record.bytes / 2**20:>8.1f}{record.seconds:>8.1f}"
        f"{record.layers:>8}{record.fused_attentions:>18}"
        for record in records
    ]
    return "\n".join(lines)
