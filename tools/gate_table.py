"""The gate at published sizes: float32 and half precision against PyTorch, stage by stage.

Weights are seeded random ones in the published layouts, so the table is about graphs and rounding
and not about masks. Runs ``rt-ris export --precision fp16``, once more with ``--remedy auto`` where
that misses. No package brings Shared-RIS's vocabulary, so its checkpoint holds a toy one; its
embeddings stay of the published size. Writes ``bench/results/gates.json``, one network at a time,
and goes on from there.

    python tools/gate_table.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import stamp

from rt_ris.bundle import Bundle
from rt_ris_export.half import PRODUCTS
from rt_ris_train.architecture import load
from rt_ris_train.architectures.shared_ris import toy_tokenizer
from rt_ris_train.checkpoint import SEEDED_HEAD, save_checkpoint

RESULT: Final = Path(__file__).parent.parent / "bench" / "results" / "gates.json"
SIZES: Final = (
    ("etris", "r101"),
    ("etris", "v16"),
    ("shared_ris", "base"),
    ("dmmi", "swin"),
    ("maris", "vit_b"),
    ("haris", "vit_b"),
)
LIBRARIES: Final = ("torch", "onnx", "onnxruntime", "numpy")


def exported(arch: str, variant: str, *, remedy: str) -> dict[str, Any]:
    """One export: its stages if the gate passed, the gate's words if it did not."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        words = ["export", "--arch", arch, "--variant", variant, "--precision", "fp16"]
        words += ["--remedy", remedy]
        if arch == "shared_ris":
            words += ["--checkpoint", "seeded.safetensors"]
            save_seeded(Path(folder) / words[-1], variant)
        began = time.monotonic()
        with tempfile.TemporaryFile("w+") as told:
            child = subprocess.Popen(
                [sys.executable, "-m", "rt_ris.cli", *words, "--out", str(bundle)],
                stdout=subprocess.DEVNULL,
                cwd=folder,
                stderr=told,
            )
            _, status, usage = os.wait4(child.pid, 0)
            told.seek(0)
            said = told.read().strip().splitlines()
        row: dict[str, Any] = {
            "command": "rt-ris " + " ".join(words),
            "exit": os.waitstatus_to_exitcode(status),
            "seconds": round(time.monotonic() - began, 1),
            "peak_mib": usage.ru_maxrss >> 10,
            "commit": stamp.commit(),
            "date": date.today().isoformat(),
        }
        return row | (described(bundle) if row["exit"] == 0 else {"said": said[-1:]})


def save_seeded(path: Path, variant: str) -> None:
    """A checkpoint of Shared-RIS's seeded weights with a toy vocabulary."""
    network = load("shared_ris").variant(variant).build()
    network.use_tokenizer(toy_tokenizer())
    metadata = {"architecture": "shared_ris", "variant": variant, "head": SEEDED_HEAD}
    save_checkpoint(path, network, metadata=metadata, whole=True)


def described(path: Path) -> dict[str, Any]:
    """What the gate of a bundle found."""
    bundle = Bundle.open(path)
    parity = json.loads(bundle.read("parity.json"))
    ranges = json.loads(bundle.read("ranges.json"))
    plain = {stage["id"]: worst(stage) for stage in parity["plain"]}
    half = {stage["id"]: worst(stage) for stage in parity["stages"]}
    return {
        "mask_iou": bundle.manifest.parity.mask_iou,
        "masks": bundle.manifest.parity.cases,
        "flips": bundle.manifest.parity.flips,
        "remedies": parity["remedies"],
        "limits": {
            "alone": parity["alone"],
            "chained": parity["tolerance"],
            "mask_iou": parity["mask_iou_limit"],
        },
        "stages": [
            {
                "stage": stage.spec.id,
                "precision": stage.target.precision,
                "half_weights": stage.half_weights,
                "half_multiply_adds": stage.half_multiply_adds,
                "fp32": plain[stage.spec.id],
                "fp16": half[stage.spec.id],
                **extremes(ranges.get(stage.spec.id, ())),
            }
            for stage in bundle.manifest.stages
        ],
    }


def worst(stage: Mapping[str, Any]) -> dict[str, float]:
    """The largest relative error of a stage's outputs, alone and along the chain."""
    return {
        name: max(tensor[key]["relative"] for tensor in stage["tensors"])
        for name, key in (("alone", "isolated"), ("chained", "chained"))
    }


def extremes(ranges: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The largest finite half, and how many were none; a mask's -inf is no fault."""
    listed = list(ranges)
    products = [entry for entry in listed if entry["node"] in PRODUCTS]
    return {
        "tensors": len(listed),
        "largest": max((entry["largest"] for entry in listed), default=0.0),
        "infinite_in_products": sum(entry["infinite"] for entry in products),
        "nan": sum(entry["nan"] for entry in listed),
    }


def main() -> None:
    """Export what is not in the result yet."""
    done = json.loads(RESULT.read_text("utf-8")) if RESULT.exists() else {}
    for arch, variant in SIZES:
        name = f"{arch} {variant}"
        libraries = {entry: version(entry) for entry in LIBRARIES}
        tries = done.setdefault(name, {"libraries": libraries, "tries": []})["tries"]
        for remedy in ("none", "auto")[len(tries) :]:
            if tries and tries[-1]["exit"] != 1:
                break
            tries.append(exported(arch, variant, remedy=remedy))
            print(name, json.dumps(tries[-1]), flush=True)
            RESULT.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
