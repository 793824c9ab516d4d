"""``rt-ris evaluate``: measure a bundle or a checkpoint on data in RefCOCO's format."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rt_ris.cli.options import (
    add_backend,
    add_json,
    add_weights,
    non_negative,
    positive,
    print_json,
    shown,
)
from rt_ris.errors import MissingExtraError, RecipeError
from rt_ris.predictor import Predictor

if TYPE_CHECKING:
    from rt_ris_train.data.refcoco import RefDataset
    from rt_ris_train.evaluate import EvaluationOptions
    from rt_ris_train.metrics import MetricsByKind

SHOWN = ("oIoU", "mIoU", "Pr@0.5", "Pr@0.7", "Pr@0.9", "gIoU", "cIoU", "N_acc", "T_acc")


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    parser = subparsers.add_parser("evaluate", help="measure a bundle or a checkpoint")
    parser.add_argument("model", type=Path, help="bundle, or checkpoint (then with --arch)")
    parser.add_argument(
        "--data", type=Path, required=True, help="folder in RefCOCO's or PhraseCut's format"
    )
    parser.add_argument("--split", default="test")
    parser.add_argument("--split-by", help="who made the split, where there are several")
    parser.add_argument("--arch", help="architecture of a checkpoint")
    parser.add_argument("--variant", help="variant of a checkpoint [the architecture's default]")
    parser.add_argument("--limit", type=positive, help="at most so many sentences, evenly spread")
    parser.add_argument(
        "--shuffle",
        type=non_negative,
        metavar="SEED",
        help="give sentences to other pictures (a baseline)",
    )
    parser.add_argument(
        "--space",
        choices=("original", "input"),
        default="original",
        help="compare at the picture's own size, or on the stretched input as LAVT and DMMI do",
    )
    parser.add_argument(
        "--empty-below",
        type=non_negative,
        default=0,
        metavar="PIXELS",
        help="smaller masks count as 'no such thing' (50 in gRefCOCO's practice) [0]",
    )
    parser.add_argument(
        "--strict-precision",
        action="store_true",
        help="Pr@X counts IoU above X, as ETRIS and PhraseCut do, not X itself",
    )
    parser.add_argument(
        "--baselines",
        action="store_true",
        help="also measure masks that neither look nor read, chosen on split train",
    )
    parser.add_argument("--threads", type=positive, help="processor threads")
    add_backend(parser)
    add_json(parser)
    add_weights(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Evaluate and print."""
    from rt_ris_train.data import open_dataset
    from rt_ris_train.evaluate import EvaluationOptions, measures

    dataset = open_dataset(args.data, split=args.split, split_by=args.split_by)
    with _predictor(args) as predictor:
        options = EvaluationOptions(
            limit=args.limit,
            shuffle_seed=args.shuffle,
            field=predictor.tokenizer.spec.field,
            input_side=_input_side(predictor) if args.space == "input" else None,
            empty_below=args.empty_below,
            strict_precision=args.strict_precision,
        )
        began = time.process_time()
        counted = _counted(predictor, dataset, options)
        seconds = time.process_time() - began
    if counted is None:
        return 0
    found = measures(counted, options)
    result = {
        "model": shown(args.model),
        "data": shown(args.data),
        "split": args.split,
        "cpu_seconds": round(seconds, 1),
        **found,
    }
    if args.baselines:
        result["baselines"] = _baselines(args, dataset, options)
    if args.json:
        print_json(result)
    else:
        print(_table(result))
    return 0


def _counted(
    predictor: Predictor, dataset: RefDataset, options: EvaluationOptions
) -> MetricsByKind | None:
    """What all processes have counted, in the first of them; None in the others."""
    from rt_ris_train.evaluate import count

    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return count(predictor, dataset, options=options, progress=_progress)
    from rt_ris_train.parallel import gathered, processes, rank, together

    with together():
        first, *others = gathered(
            count(predictor, dataset, options=options, share=(rank(), processes()))
        )
        for other in others:
            first.add(other)
        return first if rank() == 0 else None


def _baselines(
    args: argparse.Namespace, dataset: RefDataset, options: EvaluationOptions
) -> dict[str, object]:
    """The overall IoU of masks that neither look nor read, chosen on the training split."""
    from rt_ris_train.baselines import baselines
    from rt_ris_train.data import open_dataset
    from rt_ris_train.evaluate import evaluate

    training = open_dataset(args.data, split="train", split_by=args.split_by)
    plain = replace(options, input_side=None)
    return {
        name: evaluate(each, dataset, options=plain)["oIoU"]
        for name, each in baselines(training).items()
    }


def _input_side(predictor: Predictor) -> int:
    if predictor.image.fit != "stretch":
        raise RecipeError(
            f"This network fits pictures by '{predictor.image.fit}'; --space input is the "
            "convention of networks that stretch them. Use --space original."
        )
    return predictor.image.size


def _predictor(args: argparse.Namespace) -> Predictor:
    if args.arch is None:
        if not args.model.is_dir():
            raise RecipeError(
                f"'{args.model}' is not a bundle (a folder). For a checkpoint file, name its "
                "architecture too: --arch maris."
            )
        return Predictor.load(
            args.model, backend=args.backend, threads=args.threads, engines=args.engines
        )
    if args.backend != "auto" or args.engines is not None:
        raise RecipeError(
            "A checkpoint is evaluated in PyTorch; leave --backend and --engines out, or export "
            "it and evaluate the bundle."
        )
    try:
        from rt_ris_train.checkpoint import load_network
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError(
            'A checkpoint is evaluated in PyTorch; run: pip install "rt-ris[train,lite]". A bundle '
            "needs no PyTorch.",
            extra="train,lite",
            module="torch",
        ) from error
    from rt_ris_train.official import named_files
    from rt_ris_train.runner import predictor_of
    from rt_ris_train.threads import use_threads

    use_threads(args.threads)
    weights = named_files(args.weights)
    loaded = load_network(args.arch, args.variant, args.model, weights=weights)
    return predictor_of(loaded.network)


def _progress(done: int, total: int) -> None:
    if sys.stderr.isatty() or done == total:
        print(f"{done} of {total} sentences", end="\r", file=sys.stderr, flush=True)


def _table(result: Mapping[str, object]) -> str:
    kinds = result["kinds"]
    assert isinstance(kinds, Mapping)
    rows = [("all", result), *kinds.items()]
    lines = ["kind            sentences  " + "  ".join(f"{name:>6}" for name in SHOWN)]
    for name, row in rows:
        values = "  ".join("     -" if row[key] is None else f"{row[key]:6.2f}" for key in SHOWN)
        lines.append(f"{name:<15} {row['sentences']:>9}  {values}")
    baselines = result.get("baselines")
    if isinstance(baselines, Mapping):
        lines += [
            f"{name:<15} oIoU {value:6.2f}, neither looks nor reads"
            for name, value in baselines.items()
        ]
    return "\n".join(lines)
