"""Write the README's numbers from ``bench/results/maris-lite.json``; ``--check`` only compares."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
RESULT = ROOT / "bench" / "results" / "maris-lite.json"
BEGIN = "<!-- numbers: bench/results/maris-lite.json, written by tools/readme_numbers.py -->\n"
END = "<!-- /numbers -->"


def numbers(result: dict[str, Any]) -> str:
    """The part of the README between its two marks."""
    masks, times = result["masks"], result["time"]
    whole, other = masks["bundle"], masks["bundle_sentences_on_other_pictures"]
    some, trained = masks["bundle_compared"], masks["pytorch_compared"]
    return f"""
| on composite scenes it has not seen | oIoU | mIoU | Pr@0.5 | no-target accuracy | T-acc |
|---|---|---|---|---|---|
| the bundle, {whole["sentences"]} sentences | {_row(whole)} |
| the same, sentences given to other pictures | {_row(other)} |
| the bundle, {some["sentences"]} sentences | {_row(some)} |
| PyTorch, the same {trained["sentences"]} | {_row(trained)} |

Scenes and backgrounds are new, the objects are not: known kinds, known cut-outs. Processor time of
one thread ({result["machine"]["processor"]}), whole calls without resizing masks to full size:

| a new picture with its first sentence | a further sentence | each of sixteen in one call |
|---|---|---|
| {_times(times)} |

The bundle has {result["bundle_bytes"] / 1e6:.0f} MB.
"""


def _times(times: dict[str, Any]) -> str:
    milliseconds = {name: spread["median"] for name, spread in times["milliseconds"].items()}
    first, further = milliseconds["new_picture_and_sentence"], milliseconds["further_sentence"]
    ratio = times["first_over_further"]
    return f"{first} ms | {further} ms, {ratio} times less | {milliseconds['one_of_16']} ms"


def _row(measures: dict[str, Any]) -> str:
    names = ("oIoU", "mIoU", "Pr@0.5", "N_acc", "T_acc")
    return " | ".join(f"{measures[name]:.2f}" for name in names)


def main() -> int:
    """Write the README, or with --check return 1 where it differs from the JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = README.read_text("utf-8")
    head, rest = text.split(BEGIN)
    tail = rest.split(END)[1]
    wanted = head + BEGIN + numbers(json.loads(RESULT.read_text("utf-8"))) + END + tail
    if args.check:
        return int(wanted != text)
    README.write_text(wanted, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
