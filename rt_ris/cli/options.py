"""Options that several verbs share."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from rt_ris.backends import BACKENDS
from rt_ris.predictor import Predictor


def add_bundle(parser: argparse.ArgumentParser) -> None:
    """The bundle and how to run it: BUNDLE, --backend, --engines, --threads, --json."""
    parser.add_argument("bundle", type=Path, help="folder of the bundle")
    add_backend(parser)
    parser.add_argument("--threads", type=positive, help="processor threads [all cores]")
    add_json(parser)


def add_backend(parser: argparse.ArgumentParser) -> None:
    """The options --backend and --engines."""
    known = ", ".join(["auto", *BACKENDS])
    parser.add_argument("--backend", default="auto", help=f"{known} [auto]")
    parser.add_argument(
        "--engines",
        type=Path,
        metavar="FOLDER",
        help="engines of the bundle, for --backend tensorrt or tensorrt-rtx [BUNDLE.engines]",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """The option --json."""
    parser.add_argument("--json", action="store_true", help="JSON alone on stdout")


def add_weights(parser: argparse.ArgumentParser) -> None:
    """The option --weights, which verbs that build a network share."""
    parser.add_argument(
        "--weights",
        action="append",
        default=[],
        metavar="LABEL=FILE",
        help="published weights of a frozen encoder, such as sam=sam_vit_b_01ec64.pth; repeatable",
    )


def add_tokens(parser: argparse.ArgumentParser) -> None:
    """The option --tokens, which verbs that decide how long sentences are share."""
    parser.add_argument(
        "--tokens",
        type=positive,
        metavar="L",
        help="length of sentences, special tokens included [RefCOCO's; RefCOCOg: 22 or 25]",
    )


def positive(text: str) -> int:
    """A whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def non_negative(text: str) -> int:
    """A whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is not 0 or more")
    return value


def shown(path: str | os.PathLike[str]) -> str:
    r"""A path as text that UTF-8 can hold; bytes that are no UTF-8 become escapes, ``\xff``."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def load(args: argparse.Namespace, *, allow_unverified: bool = False) -> Predictor:
    """The predictor that the options ask for."""
    return Predictor.load(
        args.bundle,
        backend=args.backend,
        threads=args.threads,
        engines=args.engines,
        allow_unverified=allow_unverified,
    )


def print_json(data: object) -> None:
    """One JSON document on stdout; letters that its encoding lacks as JSON's own escapes."""
    text = json.dumps(data, indent=1, ensure_ascii=False, allow_nan=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(data, indent=1, allow_nan=False)
    print(text)
