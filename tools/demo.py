"""The last part of ``make demo``: shipped pictures, three sentences each, overlays and timings."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from rt_ris.cli import main as rt_ris

ROOT = Path(__file__).parent.parent


def main() -> int:
    """Segment every picture of ``demo.json`` through the command line's own entry point."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pictures: dict[str, list[str]] = json.loads((ROOT / "tools" / "demo.json").read_text("utf-8"))
    for name, sentences in pictures.items():
        described = [word for sentence in sentences for word in ("--describe", sentence)]
        out = args.out / Path(name).stem
        code = rt_ris(["segment", args.bundle, str(ROOT / name), *described, "--out", str(out)])
        if code:
            return code
    return 0


if __name__ == "__main__":
    sys.exit(main())
