"""``rt-ris verify``: check a bundle's bytes and replay its golden vectors on this machine."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rt_ris.backends import BACKENDS, choose
from rt_ris.build.record import default_folder
from rt_ris.build.replay import MASK_STEP, PIXEL_STEP, Check, Replay, replay
from rt_ris.bundle import Bundle
from rt_ris.cli.gate import COUNTS, missed, write_passed
from rt_ris.cli.options import add_bundle, load, print_json, shown
from rt_ris.cli.report import Evidence, check_report, write_report


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    parser = subparsers.add_parser(
        "verify",
        help="replay a bundle's golden vectors and apply its gate",
        description="Check every byte, run the stored pictures and sentences through the backend, "
        "and compare with what PyTorch computed. Exit code 1 names the first step that differs. "
        "Engines that pass are recorded as verified on this GPU; until then nothing else runs "
        "them.",
    )
    add_bundle(parser)
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="write a JSON file to send to who can help, also where the gate misses; it names "
        "neither you nor your machine",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a report that is there")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Replay, report, print, judge; write down that engines passed.

    Raises:
        ParityError: a comparison is beyond its limit; the report is written nevertheless.
    """
    check_report(args.report, overwrite=args.overwrite)
    evidence = Evidence()
    try:
        bundle, found = _replayed(args, evidence)
    except Exception as error:
        evidence.error = error
        _report(args, evidence)
        raise
    evidence.error = miss = missed(found)
    _report(args, evidence)
    if args.json:
        print_json(evidence.replay)
    else:
        print(_table(bundle, found))
    if miss is not None:
        raise miss
    if _on_engines(args):
        record = write_passed(bundle, args.backend, _folder(args, bundle), found)
        if not args.json:
            print(f"verified on this GPU: {shown(record)}")
    return 0


def _replayed(args: argparse.Namespace, evidence: Evidence) -> tuple[Bundle, Replay]:
    """Run the golden vectors; ``evidence`` has what was known when something fails."""
    evidence.backend = args.backend
    evidence.bundle = bundle = Bundle.open(args.bundle)
    if args.backend == "auto":
        evidence.backend = choose(bundle.manifest)
    if _on_engines(args):
        evidence.engines = _folder(args, bundle)
    with load(args, allow_unverified=True) as predictor:
        try:
            found = replay(bundle, predictor, counts=COUNTS if _on_engines(args) else ())
        finally:
            evidence.timings = predictor.stats.stages
    evidence.replay = _described(found)
    return bundle, found


def _on_engines(args: argparse.Namespace) -> bool:
    return args.backend in BACKENDS and BACKENDS[args.backend].runs_engines


def _folder(args: argparse.Namespace, bundle: Bundle) -> Path:
    """Where the engines are."""
    folder: Path | None = args.engines
    return folder or default_folder(bundle.path)


def _report(args: argparse.Namespace, evidence: Evidence) -> None:
    if args.report is not None:
        write_report(args.report, evidence, asked=args.bundle)


def _described(found: Replay) -> dict[str, Any]:
    miss = found.first_miss
    return {
        "passed": miss is None,
        "first_miss": None if miss is None else _row(miss),
        "relative_error": _finite(found.worst(masks=False)),
        "mask_iou": 1 - found.worst(masks=True),
        "flips": found.flips,
        "tied": found.tied,
        "checks": [_row(check) for check in found.checks],
    }


def _row(check: Check) -> dict[str, Any]:
    return {
        "picture": check.case,
        "step": check.step,
        "name": check.name,
        "error": _finite(check.error),
        "limit": check.limit,
        "passed": check.passed,
    }


def _finite(number: float) -> float | None:
    """JSON has no infinity; null stands for it."""
    return number if number < float("inf") else None


def _table(bundle: Bundle, found: Replay) -> str:
    """The worst comparison of each step."""
    worst: dict[tuple[str, str], Check] = {}
    for check in found.checks:
        name = "1 - IoU" if check.step == MASK_STEP else check.name
        key = (check.step, name.split(":")[0] if check.step == PIXEL_STEP else name)
        if key not in worst or check.error > worst[key].error:
            worst[key] = check
    wide = max(len(name) for _, name in worst) + 2
    lines = [f"{bundle.path}: every byte is as sealed", "", f"{'step':<18}{'value':<{wide}}worst"]
    for (step, name), check in worst.items():
        verdict = "ok" if check.passed else "MISS"
        limit = f"limit {check.limit:.0e}" if check.limit else "must be equal"
        lines.append(f"{step:<18}{name:<{wide}}{check.error:.2e}  ({limit})  {verdict}")
    lines.append(f"{found.flips} pixels flipped, {found.tied} sentences tied at a hard decision")
    return "\n".join(lines)
