"""What makes a second build cheaper: the key of an engine, and TensorRT's cache of timings."""

from __future__ import annotations

import hashlib
import importlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from rt_ris.backends.cuda import Gpu
from rt_ris.build.record import this_platform
from rt_ris.build.request import BUCKETS, Request

KEY_VERSION: Final = 2
"""Changes with whatever the builder does that no fact of the key tells, such as its flags."""


def engine_key(
    request: Request, *, graph_sha256: str, version: str, sm: int, gpu: Gpu | None, plugin: bool
) -> str:
    """SHA-256 over everything that decides what the builder makes.

    TensorRT times kernels on the GPU that is there, so all of that GPU counts, its driver too;
    TensorRT-RTX compiles for a compute capability alone (its engines are equal byte by byte).
    """
    facts = {
        "key": KEY_VERSION,
        "graph": graph_sha256,
        "kernels": kernels_identity() if plugin else None,
        "target": request.target,
        "version": version,
        "platform": this_platform(),
        "sm": sm,
        "gpu": _gpu(gpu) if request.target == "tensorrt" else None,
        "profiles": BUCKETS,
        "workspace_mib": request.workspace_mib,
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def kernels_identity() -> str:
    """Name, version and compiled code of our plugins, as one text."""
    spec = importlib.import_module("rt_ris_kernels.plugin").SPEC
    code = importlib.import_module("rt_ris_kernels.binary").load_binary().sha256
    return f"{spec.domain}::{spec.op_type} {spec.version} {code}"


def timing_folder() -> Path:
    """The user's own folder of timing caches; made here, for nobody else to read or write."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "rt-ris" / "timings"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return folder


def _gpu(gpu: Gpu | None) -> Mapping[str, object]:
    assert gpu is not None, "TensorRT builds on a GPU"
    return vars(gpu)
