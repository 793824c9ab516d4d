"""``rt-ris segment``: masks for sentences, as files."""

from __future__ import annotations

import argparse
import io
import json
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import rt_ris
from rt_ris.cli.files import write_whole
from rt_ris.cli.options import add_bundle, load, print_json, shown
from rt_ris.cli.overlay import overlay
from rt_ris.errors import OutputError
from rt_ris.image import Pixels, load_image
from rt_ris.mask import Mask
from rt_ris.predictor import Predictor
from rt_ris.session import SessionStats
from rt_ris.text import TruncationWarning

RESULT = "result.json"
STEM_LENGTH = 50
"""Letters of a picture's name that its results keep: with what is added, any disk holds them."""


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the verb and its options."""
    parser = subparsers.add_parser(
        "segment",
        help="segment what sentences describe",
        description="Write a mask and an overlay for every picture and sentence, and result.json. "
        "The first sentence about a picture includes its encoding, further ones do not.",
    )
    add_bundle(parser)
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE", help="pictures")
    parser.add_argument(
        "--describe",
        action="append",
        required=True,
        metavar="SENTENCE",
        help="what to segment, such as 'the red cup'; may be repeated",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the results")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Segment and write."""
    warnings.simplefilter("always", TruncationWarning)
    images: list[Mapping[str, Any]] = []
    with load(args) as predictor:
        _check_all(args.images, args.describe, predictor)
        _make_folder(args.out)
        (args.out / RESULT).unlink(missing_ok=True)  # it would not tell of the masks that follow
        for path, stem in zip(args.images, _stems(args.images), strict=True):
            job = _Job(path=path, stem=stem, out=args.out, sentences=tuple(args.describe))
            images.append(job.run(predictor))
            if not args.json:
                _print(images[-1])
    result = {"rt_ris": rt_ris.__version__, "bundle": shown(args.bundle), "images": images}
    write_whole(
        args.out / RESULT, json.dumps(result, indent=1, ensure_ascii=False).encode() + b"\n"
    )
    if args.json:
        print_json(result)
    else:
        print(f"written to {args.out}")
    return 0


def _check_all(paths: list[Path], sentences: list[str], predictor: Predictor) -> None:
    """Refuse sentences and pictures before anything is written; one picture at a time."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)  # told when it is segmented
        predictor.tokenizer.encode(sentences)
    for path in paths:
        load_image(path)


@dataclass(frozen=True, kw_only=True)
class _Job:
    """One picture and its sentences."""

    path: Path
    stem: str
    out: Path
    sentences: tuple[str, ...]

    def run(self, predictor: Predictor) -> Mapping[str, Any]:
        """Segment the picture, write its files, and describe them."""
        start = time.perf_counter()
        pixels = load_image(self.path)
        read_ms = _since(start)
        results, timings = [], []
        for number, sentence in enumerate(self.sentences, start=1):
            before, start = predictor.stats, time.perf_counter()
            if number == 1:
                predictor.set_image(pixels)
            mask = predictor.segment(sentence)
            covered = float(mask.binary.mean())
            timings.append(_timing(before, predictor.stats, _since(start)))
            files = self._write(number, pixels, mask)
            results.append({**_described(mask, covered), **files, "timing_ms": timings[-1]})
        return {
            "image": shown(self.path),
            "size": list(pixels.shape[:2]),
            "results": results,
            "timing_ms": _summary(read_ms, timings),
        }

    def _write(self, number: int, pixels: Pixels, mask: Mask) -> Mapping[str, str]:
        drawn = overlay(pixels, mask.binary)
        binary = mask.binary.astype(np.uint8) * np.uint8(255)
        names = {kind: f"{self.stem}_{number}_{kind}.png" for kind in ("mask", "overlay")}
        write_whole(self.out / names["mask"], _png(binary))
        write_whole(self.out / names["overlay"], _png(drawn))
        return names


def _described(mask: Mask, covered: float) -> Mapping[str, Any]:
    box = mask.box
    return {
        "sentence": mask.sentence,
        "exists": mask.exists,
        "existence": mask.existence,
        "score": mask.score,
        "covered": covered,
        "box": None if box is None else [box.top, box.left, box.bottom, box.right],
        "truncated_after": mask.truncated_after,
    }


def _timing(before: SessionStats, after: SessionStats, total_ms: float) -> Mapping[str, Any]:
    """Wall time of one sentence, and of the stages that ran for it."""
    stages = {}
    for name, timing in after.stages.items():
        earlier = before.stages.get(name)
        spent = timing.total_ms - (earlier.total_ms if earlier else 0.0)
        if earlier is None or timing.runs > earlier.runs:
            stages[name] = round(spent, 3)
    return {"total": round(total_ms, 3), "stages": stages}


def _summary(read_ms: float, timings: list[Mapping[str, Any]]) -> Mapping[str, float | None]:
    further = [timing["total"] for timing in timings[1:]]
    return {
        "read": round(read_ms, 3),
        "first_sentence": timings[0]["total"],
        "next_sentence": round(sum(further) / len(further), 3) if further else None,
    }


def _print(image: Mapping[str, Any]) -> None:
    height, width = image["size"]
    print(f"{image['image']}  {width} x {height}")
    for result in image["results"]:
        timing = result["timing_ms"]
        stages = "  ".join(f"{name} {spent:.1f}" for name, spent in timing["stages"].items())
        if result["exists"]:
            verdict = f"score {result['score']:.2f}  covers {100 * result['covered']:5.1f} %"
        else:
            verdict = f"not there (existence {result['existence']:.2f})"
        print(f"  {result['sentence']}\n      {verdict}  {timing['total']:.1f} ms  ({stages})")


def _stems(paths: list[Path]) -> list[str]:
    """A distinct stem for each picture's files: the second ``a`` is called ``a-2``."""
    stems: list[str] = []
    for path in paths:
        wanted = shown(path.stem).replace("\\", "_")[:STEM_LENGTH]
        stem, count = wanted, 1
        while stem in stems:
            count += 1
            stem = f"{wanted}-{count}"
        stems.append(stem)
    return stems


def _png(pixels: Pixels) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="PNG")
    return stream.getvalue()


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The folder {path} for the results cannot be made: {error.strerror}. Choose another."
        ) from error


def _since(start: float) -> float:
    return (time.perf_counter() - start) * 1000
