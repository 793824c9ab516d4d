"""``rt-ris synth``: make a data set of composed scenes with sentences, in RefCOCO's format."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from rt_ris.cli.options import non_negative, positive

if TYPE_CHECKING:
    from rich.progress import Progress

    from rt_ris_train.data.synth.write import Summary


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    parser = subparsers.add_parser(
        "synth",
        help="make training scenes with sentences that are true by construction",
        description="Compose scenes of cut-out objects on photographs and write them, with "
        "sentences and exact masks, in RefCOCO's format. An interrupted run continues when it is "
        "repeated with the same options.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    for split, scenes in (("train", 1000), ("val", 100), ("test", 100)):
        parser.add_argument(
            f"--{split}",
            type=non_negative,
            default=scenes,
            metavar="N",
            help=f"scenes of {split} [{scenes}]",
        )
    parser.add_argument("--seed", type=non_negative, default=0, help="same seed, same scenes [0]")
    parser.add_argument(
        "--stamps",
        type=Path,
        help="folder 'stamps' of tuxpaint-stamps-default: photographic objects [OpenMoji glyphs]",
    )
    parser.add_argument(
        "--backgrounds",
        type=Path,
        help="folder with more background pictures [those in scikit-image and scikit-learn]",
    )
    parser.add_argument(
        "--nouns",
        type=_listed,
        default=(),
        metavar="NOUN,NOUN",
        help="objects with these names only, such as banana,frog [all]",
    )
    parser.add_argument("--workers", type=positive, default=1, help="processes [1]")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Make the scenes and print how many there are."""
    from rt_ris_train.data.synth.write import SynthRecipe, write_scenes

    recipe = SynthRecipe(
        seed=args.seed,
        train=args.train,
        val=args.val,
        test=args.test,
        stamps=args.stamps,
        backgrounds=args.backgrounds,
        nouns=args.nouns,
    )
    with _progress_bar() as progress:
        summary = write_scenes(recipe, args.out, workers=args.workers, progress=progress)
    _report(summary, args.out)
    return 0


def _listed(text: str) -> tuple[str, ...]:
    return tuple(filter(None, (noun.strip() for noun in text.split(","))))


def _report(summary: Summary, out: Path) -> None:
    for split, scenes in summary.scenes.items():
        print(f"{split}: {scenes} scenes, {summary.sentences[split]} sentences")
    print(f"{out}")


def _progress_bar() -> AbstractContextManager[Callable[[int, int], None] | None]:
    """A bar on stderr where rich is installed and someone watches, else nothing."""
    if not sys.stderr.isatty():
        return nullcontext(None)
    try:
        from rich.console import Console
        from rich.progress import Progress
    except ModuleNotFoundError:
        return nullcontext(None)
    return _RichBar(Progress(console=Console(stderr=True)))


class _RichBar(AbstractContextManager[Callable[[int, int], None]]):
    """Rich's bar as a function of the number of scenes done and of all."""

    def __init__(self, bar: Progress) -> None:
        self._bar = bar
        self._task = bar.add_task("scenes", total=None)

    def __enter__(self) -> Callable[[int, int], None]:
        self._bar.start()
        return lambda done, total: self._bar.update(self._task, completed=done, total=total)

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
