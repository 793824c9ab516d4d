"""What the process that builds is asked for, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

Target = Literal["tensorrt", "tensorrt-rtx"]

MODULES: Final[Mapping[Target, str]] = {"tensorrt": "tensorrt", "tensorrt-rtx": "tensorrt_rtx"}
"""The Python modules of the builders."""

BUCKETS: Final = ((1, 1, 1), (2, 4, 4), (5, 16, 16))
"""Least, best and most sentences of each optimisation profile."""

MOST_EXPRESSIONS: Final = BUCKETS[-1][2]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One engine.

    Attributes:
        stage: what it computes, for messages.
        graph: path of the ONNX file.
        engine: path of the file to write.
        sm: compute capability to build for, such as 86; None for the GPU that is there.
        plugin: our operators become our plugin, and the graph holds no functions of them; else they
            are built from those. Jobs without it come first, as what is registered stays so.
    """

    stage: str
    graph: str
    engine: str
    sm: int | None
    plugin: bool


@dataclass(frozen=True, kw_only=True)
class Request:
    """Several engines by one builder.

    Attributes:
        target: which builder.
        workspace_mib: of device memory that the builder may use.
        timings: how the file with TensorRT's timings on this GPU begins, the version follows; None
            for builders that time nothing.
        jobs: in order.
    """

    target: Target
    workspace_mib: int | None
    timings: str | None
    jobs: tuple[Job, ...]
