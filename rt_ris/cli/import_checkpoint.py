"""``rt-ris import``: published weight files become a checkpoint that export and train take."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rt_ris.cli.options import add_json, add_tokens, print_json, shown

if TYPE_CHECKING:
    from rt_ris_train.importing import Import
    from rt_ris_train.official import Imported


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    parser = subparsers.add_parser(
        "import",
        help="make a checkpoint of published weight files",
        description="Read weight files that others publish, without running anything from them, "
        "and write a checkpoint. docs/import.md lists the files.",
    )
    parser.add_argument("--arch", required=True, help="architecture, such as etris")
    parser.add_argument("--variant", help="size of it [the architecture's default]")
    parser.add_argument(
        "--from",
        dest="files",
        action="append",
        required=True,
        metavar="[LABEL=]FILE",
        help="a published file; repeatable. Its label is told by the names in it",
    )
    parser.add_argument("--tokenizer", type=Path, help="published vocabulary, such as beit3.spm")
    add_tokens(parser)
    parser.add_argument("--out", type=Path, required=True, help="checkpoint to write")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that is there")
    add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Import, and print what was taken and what was dropped."""
    from rt_ris_train.importing import ImportRequest, import_checkpoint

    imported = import_checkpoint(
        ImportRequest(
            arch=args.arch,
            variant=args.variant,
            files=tuple(_labelled(text) for text in args.files),
            tokenizer=args.tokenizer,
            tokens=args.tokens,
            out=args.out,
            overwrite=args.overwrite,
        )
    )
    if args.json:
        data = {"checkpoint": shown(args.out), "tokens": imported.tokens}
        print_json({**data, "files": [_data(file) for file in imported.files]})
    else:
        print("\n".join([*_lines(imported), f"{args.out}"]))
    return 0


def _labelled(text: str) -> tuple[str | None, Path]:
    """A label and a path; a path may hold '=', a label is a word."""
    label, equals, rest = text.partition("=")
    if equals and label.isidentifier() and not Path(text).exists():
        return label, Path(rest)
    return None, Path(text)


def _data(file: Imported) -> dict[str, object]:
    dropped = [
        {"pattern": pattern, "tensors": count, "why": file.reasons[pattern]}
        for pattern, count in file.dropped.items()
    ]
    return {
        "label": file.label,
        "sha256": file.sha256,
        "taken": file.taken,
        "dropped": dropped,
        "whole": file.whole,
    }


def _lines(imported: Import) -> list[str]:
    lines = []
    for file in imported.files:
        lines.append(f"{file.label}: {file.taken} tensors taken (sha256 {file.sha256[:12]})")
        lines += [
            f"  dropped {count:>4}  {pattern:<32} {file.reasons[pattern]}"
            for pattern, count in file.dropped.items()
        ]
    other = "; weights trained with another length need --tokens" if imported.any_length else ""
    lines.append(f"Sentences have {imported.tokens} tokens, on which results depend{other}.")
    if not any(file.whole for file in imported.files):
        lines.append("The head keeps seeded random weights: train it before anything else.")
    return lines
