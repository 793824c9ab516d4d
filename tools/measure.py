"""Measure the shipped maris-lite and write ``bench/results/maris-lite.json``.

Masks: the bundle and the checkpoint on the same composite sentences, and the bundle with sentences
given to other pictures. Time: processor time of one thread for a new picture and for a further
sentence. What each number includes stands beside it under ``scope``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from pathlib import Path

import stamp

from rt_ris import Predictor
from rt_ris.cli import main as rt_ris
from rt_ris_train.checkpoint import load_network
from rt_ris_train.data.refcoco import RefDataset
from rt_ris_train.evaluate import EvaluationOptions, evaluate
from rt_ris_train.runner import predictor_of

ROOT = Path(__file__).parent.parent
OUT = ROOT / "bench" / "results" / "maris-lite.json"
PACKAGES = ("numpy", "onnx", "onnxruntime", "pillow", "timm", "tokenizers", "torch", "transformers")
ROUNDS = 15


def main() -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="composite scenes, split test")
    parser.add_argument("--bundle", type=Path, default=ROOT / "out" / "measure" / "lite.bundle")
    parser.add_argument("--compared", type=int, default=1000, help="sentences for PyTorch")
    args = parser.parse_args()
    args.bundle.parent.mkdir(parents=True, exist_ok=True)
    code = rt_ris(["export", "--arch", "maris", "--out", str(args.bundle), "--overwrite"])
    if code:
        return code
    dataset = RefDataset.open(args.data, split="test")
    result = {
        "what": "maris-lite, the checkpoint in the package, exported in float32",
        "date": date.today().isoformat(),
        "commit": stamp.commit(),
        "machine": stamp.machine(),
        "versions": {name: version(name) for name in PACKAGES},
        "data": json.loads((args.data / "synth.json").read_text("utf-8"))["assets"]["sprites"],
        "masks": _masks(args.bundle, dataset, args.compared),
        "time": _times(args.bundle, dataset),
        "bundle_bytes": sum(path.stat().st_size for path in args.bundle.iterdir()),
    }
    OUT.parent.mkdir(parents=True, exist_ok=True)
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(OUT)
    return 0


def _masks(bundle: Path, dataset: RefDataset, compared: int) -> dict[str, object]:
    with Predictor.load(bundle) as predictor:
        whole = evaluate(predictor, dataset)
        shuffled = evaluate(predictor, dataset, options=EvaluationOptions(shuffle_seed=0))
        some = evaluate(predictor, dataset, options=EvaluationOptions(limit=compared))
    with predictor_of(load_network("maris", "lite", None).network) as reference:
        trained = evaluate(reference, dataset, options=EvaluationOptions(limit=compared))
    return {
        "scope": "unseen scenes and backgrounds, known objects; original size; threshold 0.5",
        "bundle": whole,
        "bundle_sentences_on_other_pictures": shuffled,
        "bundle_compared": some,
        "pytorch_compared": trained,
    }


def _times(bundle: Path, dataset: RefDataset) -> dict[str, object]:
    """Medians over pictures, one thread."""
    refs = list({ref.image_id: ref for ref in dataset.refs}.values())[: ROUNDS + 2]
    first, further, sixteen = [], [], []
    with Predictor.load(bundle, threads=1) as predictor:
        for number, ref in enumerate(refs):
            path = dataset.image_path(ref)
            first.append(_cpu(lambda: _new_picture(predictor, path, f"dog {number}")))  # noqa: B023
            further.append(_cpu(lambda: predictor.segment(f"left cat {number}")))  # noqa: B023
            many = [f"the {word} thing {number}" for word in "abcdefghijklmnop"]
            sixteen.append(_cpu(lambda: predictor.segment(many)) / 16)  # noqa: B023
        encoder = predictor.stats.stages["image_encoder"].runs
    rows = {"new_picture_and_sentence": first, "further_sentence": further, "one_of_16": sixteen}
    return {
        "scope": "process CPU time, one thread, ONNX Runtime CPU; first row includes decoding the "
        "JPEG, resizing, both encoders and the head; masks are not resized to full size",
        "picture": "640x480 or similar",
        "pictures": len(refs),
        "image_encoder_runs": encoder,
        "milliseconds": {name: _spread(values[2:]) for name, values in rows.items()},
        "first_over_further": _ratio(first, further),
        "one_of_16_over_one": _ratio(sixteen, further),
    }


def _new_picture(predictor: Predictor, path: Path, sentence: str) -> None:
    predictor.set_image(path)
    predictor.segment(sentence)


def _cpu(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return 1000 * (time.process_time() - began)


def _spread(values: list[float]) -> dict[str, float]:
    return {
        "median": round(statistics.median(values), 1),
        "min": round(min(values), 1),
        "max": round(max(values), 1),
    }


def _ratio(first: list[float], second: list[float]) -> float:
    pairs = zip(first[2:], second[2:], strict=True)
    return round(statistics.median(one / other for one, other in pairs), 2)


if __name__ == "__main__":
    sys.exit(main())
