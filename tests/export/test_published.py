"""MARIS at a published size, from files in the layouts that SAM and CLIP are published in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rt_ris.cli import main
from rt_ris_train.architecture import load

KEYS = ("isolated", "chained")


def seeded(shape: tuple[int, ...], name: str, generator: torch.Generator) -> Tensor:
    """Weights of the size that trained ones have, so that activations neither fade nor explode."""
    drawn = torch.randn(shape, generator=generator)
    if len(shape) > 1:
        fan_in = drawn[0].numel()
        return drawn * min(fan_in**-0.5, 0.05)
    near_one = name.endswith("weight")
    return drawn * 0.05 + float(near_one)


def published_files(folder: Path, *, size: str, seed: int) -> dict[str, Path]:
    """A file for SAM and one for CLIP under the official names, drawn from a seed."""
    with torch.device("meta"):
        network = load("maris").variant(size).build()
        shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    generator = torch.Generator().manual_seed(seed)
    paths = {}
    for label, file in network.official_keys().items():
        tensors = {name: seeded(shapes[own], name, generator) for own, name in file.keys.items()}
        tensors |= {f"{prefix}unused": torch.zeros(1) for prefix in file.unused}
        paths[label] = folder / f"{label}.pth"
        torch.save(tensors, paths[label])
    return paths


def export(tmp_path: Path, size: str) -> dict[str, list[dict[str, object]]]:
    files = published_files(tmp_path, size=size, seed=5)
    out = tmp_path / "published.bundle"
    weights = [word for label, path in files.items() for word in ("--weights", f"{label}={path}")]
    arguments = ["export", "--arch", "maris", "--variant", size, *weights, "--out", str(out)]
    assert main(arguments) == 0
    record: dict[str, list[dict[str, object]]] = json.loads((out / "parity.json").read_text())
    return record


@pytest.mark.parametrize("size", ["tiny", pytest.param("vit_b", marks=pytest.mark.slow)])
def test_stages_of_a_published_size_match_pytorch(tmp_path: Path, size: str) -> None:
    torch.set_num_threads(1)
    record = export(tmp_path, size)
    assert [stage["id"] for stage in record["stages"]] == [
        "image_encoder",
        "text_encoder",
        "fusion",
        "decoder",
    ]
    for stage in record["stages"]:
        tensors = stage["tensors"]
        assert isinstance(tensors, list)
        assert tensors
        for tensor in tensors:
            assert max(tensor[key]["relative"] for key in KEYS) <= 1e-4, tensor
