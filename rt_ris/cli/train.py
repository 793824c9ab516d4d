"""``rt-ris train``: train an architecture by a recipe; a killed run goes on where it stopped.

Several processes train as one under ``torchrun --nproc-per-node N -m rt_ris.cli train ...``.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rt_ris.cli.options import add_tokens, add_weights, positive

if TYPE_CHECKING:
    from rt_ris_train.loop import Report


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    parser = subparsers.add_parser("train", help="train an architecture on RefCOCO-format data")
    parser.add_argument("--recipe", default="maris-lite", help="shipped recipe or a TOML file")
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        required=True,
        help="folder in RefCOCO's or PhraseCut's format; repeat it to train on several as one",
    )
    parser.add_argument(
        "--split-by",
        action="append",
        default=[],
        help="who made the split, where a folder has several: one for all, or one for each --data",
    )
    parser.add_argument("--split", default="train", help="split to train on [train]")
    val = parser.add_mutually_exclusive_group()
    val.add_argument("--val-split", default="val", help="split to validate on [val]")
    val.add_argument(
        "--hold-out",
        type=float,
        metavar="SHARE",
        help="validate on this share of the training pictures, which are then not trained on",
    )
    add_tokens(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run; resumes in it")
    parser.add_argument("--cache", type=Path, help="folder of stored features [OUT/features]")
    parser.add_argument("--init", type=Path, help="checkpoint to begin from, such as an import's")
    add_weights(parser)
    parser.add_argument("--threads", type=positive, help="processor threads")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train to the end of the recipe."""
    from rt_ris_train.curve import draw_curve
    from rt_ris_train.data import open_training
    from rt_ris_train.loop import Trainer
    from rt_ris_train.official import named_files
    from rt_ris_train.parallel import rank, together
    from rt_ris_train.recipe import find_recipe, read_recipe
    from rt_ris_train.threads import use_threads

    use_kernels()

    use_threads(args.threads)
    recipe = read_recipe(find_recipe(args.recipe))
    if args.tokens is not None:
        recipe = replace(recipe, tokens=args.tokens)
    data = open_training(
        args.data,
        split_by=args.split_by,
        split=args.split,
        val_split=args.val_split,
        hold_out=args.hold_out,
    )
    with together():
        say, count = _lines() if rank() == 0 else (lambda _: None, lambda *_: None)
        trainer = Trainer(
            recipe,
            data=data,
            out=args.out,
            cache=args.cache,
            weights=named_files(args.weights),
            init=args.init,
            progress=count,
        )
        checkpoint = trainer.run(say)
        if rank() == 0:
            draw_curve(args.out / "log.jsonl", args.out / "curve.png")
            print(f"{checkpoint}", flush=True)
    return 0


def use_kernels() -> None:
    """Register our CUDA kernels with PyTorch, where they can be launched."""
    if importlib.util.find_spec("cuda") is not None:
        importlib.import_module("rt_ris_kernels.torch_op")


def _lines() -> tuple[Callable[[Report], None], Callable[[str, int, int], None]]:
    """Progress on stderr: one living line on a terminal, plain lines elsewhere."""
    end = "\r" if sys.stderr.isatty() else "\n"

    def say(report: Report) -> None:
        done = report.step / report.steps
        bar = "#" * round(24 * done) + "." * (24 - round(24 * done))
        line = (
            f"[{bar}] {report.step}/{report.steps}  loss {report.loss:.3f}  "
            f"IoU {report.iou:5.1f}  {report.rate:5.1f} sentences/s"
        )
        print(line, end=end, file=sys.stderr, flush=True)
        if report.validation:
            found = "  ".join(f"{name} {value:.1f}" for name, value in report.validation.items())
            print(f"\n    validation: {found}", file=sys.stderr, flush=True)

    def count(what: str, done: int, total: int) -> None:
        print(f"{what}: {done} of {total}", end=end, file=sys.stderr, flush=True)

    return say, count
