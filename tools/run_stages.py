"""The process that ``tiled_attention.py`` measures: it imports the runtime and nothing else.

    python tools/run_stages.py STAGE.json [STAGE.json ...]

Beside each specification lies its graph. Inputs that no stage makes are random.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rt_ris.backends import open_backend
from rt_ris.backends.base import Array, Runner
from rt_ris.manifest import StageArtefact
from rt_ris.records import from_data, parse_json
from rt_ris.spec import EXPRESSIONS, StageSpec, TargetSpec, TensorSpec


def main(paths: Sequence[Path]) -> int:
    """Open stages; run them at each word ``run``, store what they made under any other word."""
    specs = [from_data(StageSpec, parse_json(path.read_bytes())) for path in paths]
    runners = [
        _opened(spec, path.with_suffix(".onnx")) for spec, path in zip(specs, paths, strict=True)
    ]
    random = np.random.default_rng(0)
    made = {tensor.name for spec in specs for tensor in spec.outputs}
    values: dict[str, Array] = {
        tensor.name: _random(tensor, random)
        for spec in specs
        for tensor in spec.inputs
        if tensor.name not in made
    }
    loaded = _rss("VmRSS")
    for line in sys.stdin:
        if line.strip() != "run":
            outputs: dict[str, Any] = {name: values[name] for name in made}
            np.savez(f"{line.strip()}.npz", **outputs)
            memory = {"loaded_rss_mib": loaded, "peak_rss_mib": _rss("VmHWM")}
            print(json.dumps(memory), flush=True)
            continue
        began = time.process_time()
        for runner in runners:
            values |= runner.run(values)
        print(time.process_time() - began, flush=True)
    return 0


def _opened(spec: StageSpec, graph: Path) -> Runner:
    artefact = StageArtefact(
        spec=spec,
        file=graph.name,
        target=TargetSpec(format="onnxruntime"),
        multiply_adds=0,
        parameters=0,
    )
    data = graph.with_name(f"{graph.name}.data")
    return open_backend("onnxruntime").open_stage(
        artefact, graph.read_bytes(), data=data.read_bytes() if data.exists() else b"", threads=1
    )


def _random(tensor: TensorSpec, random: np.random.Generator) -> Array:
    shape = [1 if axis == EXPRESSIONS else int(axis) for axis in tensor.shape]
    if tensor.dtype == "bool":
        return np.arange(shape[1])[None] < 9
    if tensor.dtype == "float32":
        return random.standard_normal(shape, dtype=np.float32)
    if tensor.name == "valid_box":
        return np.array([[0, 0, 768, 1024]], np.int32)
    return random.integers(0, 255, shape).astype(tensor.dtype)


def _rss(field: str) -> int:
    """Of this process, in MiB; ``ru_maxrss`` would be that of the parent where that was larger."""
    lines = Path("/proc/self/status").read_text("utf-8").splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) >> 10


if __name__ == "__main__":
    sys.exit(main([Path(word) for word in sys.argv[1:]]))
