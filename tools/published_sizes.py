"""The published sizes through export, gate and builder: what passes, what it takes, what it costs.

Weights are seeded random ones in the published layouts, so the tables are about graphs, rounding
and builders and not about masks. Runs ``rt-ris export --precision fp16``, once more with ``--remedy
auto`` where that misses, then ``rt-ris build`` on the bundle for TensorRT-RTX, without a GPU. No
package brings Shared-RIS's vocabulary, so its checkpoint holds a toy one; its embeddings stay of
the published size. Writes ``bench/results/gates.json`` and ``engines.json``, one network at a time,
and goes on from there; networks that are named are run again.

    python tools/published_sizes.py
    python tools/published_sizes.py maris:vit_h --gate one_picture
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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

RESULTS: Final = Path(__file__).parent.parent / "bench" / "results"
GATES: Final = RESULTS / "gates.json"
ENGINES: Final = RESULTS / "engines.json"
SIZES: Final = ("maris:vit_b", "haris:vit_b", "etris:r101", "etris:v16", "dmmi:swin")
SIZES_WITHOUT_VOCABULARY: Final = ("shared_ris:base",)
SMS: Final = (75, 80, 86, 89, 120)
OF_ENGINES: Final = (
    *("stage", "precision", "sm", "seconds", "peak_mib", "bytes", "layers", "fused_attentions"),
    *("plugin", "version"),
)
LIBRARIES: Final = ("torch", "onnx", "onnxruntime", "numpy")


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A command that has ended."""

    words: Sequence[str]
    exit: int
    seconds: float
    peak_mib: int
    out: str
    said: Sequence[str]

    def facts(self) -> dict[str, Any]:
        """What every result says of its command."""
        return {
            "command": "rt-ris " + " ".join(self.words),
            "exit": self.exit,
            "seconds": round(self.seconds, 1),
            "peak_mib": self.peak_mib,
            "commit": stamp.commit(),
            "date": date.today().isoformat(),
            "machine": stamp.machine(),
        }


def run(words: Sequence[str], folder: str) -> Finished:
    """Run ``rt-ris`` in a folder; its peak is that of its largest process."""
    began = time.monotonic()
    command = [sys.executable, "-m", "rt_ris.cli", *words]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as said:
        child = subprocess.Popen(command, stdout=out, stderr=said, cwd=folder)
        _, status, usage = os.wait4(child.pid, 0)
        out.seek(0)
        said.seek(0)
        return Finished(
            words=words,
            exit=os.waitstatus_to_exitcode(status),
            seconds=time.monotonic() - began,
            peak_mib=usage.ru_maxrss >> 10,
            out=out.read(),
            said=said.read().strip().splitlines(),
        )


def exported(
    arch: str, variant: str, folder: str, *, remedy: str, gate: Path | None
) -> dict[str, Any]:
    """One export to ``bundle``: what the gate measured, and its words if it did not pass."""
    words = ["export", "--arch", arch, "--variant", variant, "--precision", "fp16"]
    words += ["--remedy", remedy, "--out", "bundle", "--json"]
    if f"{arch}:{variant}" in SIZES_WITHOUT_VOCABULARY:
        words += ["--checkpoint", "seeded.safetensors"]
        save_seeded(Path(folder) / words[-1], variant)
    if gate is not None:
        words += ["--gate", "gate"]
    done = run(words, folder)
    row = done.facts() | {"libraries": {name: version(name) for name in LIBRARIES}}
    if done.exit not in (0, 1):
        return row | {"said": done.said[-1:]}
    told = json.loads(done.out)
    parity = told["parity"]
    row |= {"remedies": parity["remedies"], "stages": described(parity)}
    if done.exit:
        return row | {"said": done.said[-1:]}
    bundle = Bundle.open(Path(folder) / "bundle")
    ranges = (
        json.loads(bundle.read("ranges.json")) if "ranges.json" in bundle.manifest.members else {}
    )
    for stage, artefact in zip(row["stages"], bundle.manifest.stages, strict=True):
        stage |= {
            "precision": artefact.target.precision,
            "half_weights": artefact.half_weights,
            "half_multiply_adds": artefact.half_multiply_adds,
            **extremes(ranges.get(artefact.spec.id, ())),
        }
    found = bundle.manifest.parity
    return row | {"mask_iou": found.mask_iou, "masks": found.cases, "flips": found.flips}


def built(folder: str) -> dict[str, Any]:
    """The engines of ``bundle`` by one command, for all capabilities that are not refused."""
    sms, refused, spent = list(SMS), [], 0.0
    while True:
        words = ["build", "bundle", "--target", "tensorrt-rtx", "--json"]
        words += ["--sm", ",".join(map(str, sms))]
        done = run(words, folder)
        spent += done.seconds
        named = re.search(r"stage '(\S+)' .*-sm(\d+)\.engine", done.said[-1]) if done.exit else None
        if named is None:
            break
        sms.remove(int(named[2]))
        refused.append({"stage": named[1], "sm": int(named[2]), "said": done.said[-1]})
    row = done.facts() | {"refused": refused, "seconds_of_all_tries": round(spent, 1)}
    if done.exit:
        return row | {"said": done.said[-1:]}
    engines = json.loads(done.out)["built"]
    return row | {"engines": [{name: one[name] for name in OF_ENGINES} for one in engines]}


def save_seeded(path: Path, variant: str) -> None:
    """A checkpoint of Shared-RIS's seeded weights with a toy vocabulary."""
    network = load("shared_ris").variant(variant).build()
    network.use_tokenizer(toy_tokenizer())
    metadata = {"architecture": "shared_ris", "variant": variant, "head": SEEDED_HEAD}
    save_checkpoint(path, network, metadata=metadata, whole=True)


def described(parity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stages that the gate measured, in a passed bundle's record or in that of a miss."""
    plain = {stage["id"]: worst(stage) for stage in parity["plain"]}
    return [
        {
            "stage": stage["id"],
            "fp32": plain.get(stage["id"]),
            "fp16": worst(stage),
            **extremes(parity.get("ranges", {}).get(stage["id"], ())),
        }
        for stage in parity["stages"]
    ]


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


def add(path: Path, name: str, row: object | None) -> None:
    """Put a network's results in the place of earlier ones; None leaves none."""
    done = json.loads(path.read_text("utf-8")) if path.exists() else {}
    done[name] = row
    done = {key: value for key, value in done.items() if value is not None}
    path.write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Run what is named, or what is not in the results yet."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sizes", nargs="*", metavar="ARCH:VARIANT")
    parser.add_argument("--gate", type=Path, help="data to compare on [the shipped pictures]")
    args = parser.parse_args()
    there = {path: json.loads(path.read_text("utf-8")) for path in (GATES, ENGINES)}
    for size in args.sizes or (*SIZES, *SIZES_WITHOUT_VOCABULARY):
        arch, variant = size.split(":")
        name = f"{arch} {variant}"
        if not args.sizes and all(name in found for found in there.values()):
            continue
        with tempfile.TemporaryDirectory() as folder:
            if args.gate is not None:
                (Path(folder) / "gate").symlink_to(args.gate.resolve())
            tries: list[dict[str, Any]] = []
            add(ENGINES, name, None)
            for remedy in ("none", "auto"):
                tries.append(exported(arch, variant, folder, remedy=remedy, gate=args.gate))
                add(GATES, name, tries)
                print(name, json.dumps(tries[-1]), flush=True)
                if tries[-1]["exit"] != 1:
                    break
            if tries[-1]["exit"] == 0:
                row = built(folder)
                add(ENGINES, name, row)
                print(name, json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
