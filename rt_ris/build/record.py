"""What stands beside engines, as plain data: what each of them is, and where a gate passed."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rt_ris.backends.cuda import Gpu
from rt_ris.build.request import Target
from rt_ris.bundle import Bundle
from rt_ris.manifest import StageArtefact

LOCAL: Final = "local"
"""In the place of a compute capability: the engine is for the GPU it was built on."""


@dataclass(frozen=True, kw_only=True)
class EngineRecord:
    """What stands beside an engine, in a file of its name with ``.json`` behind.

    Attributes:
        engine: its file name.
        sha256: of its bytes; compared before anything reads them.
        bytes: its size.
        stage: which stage of the bundle it computes.
        precision: of the graph it was built from.
        bundle_sha256: of the manifest of that bundle.
        graph_sha256: of that graph.
        target: whose builder made it.
        version: of that builder, all its parts.
        platform: operating system and processor it was built on, such as ``linux-x86_64``.
        sm: compute capability it is for.
        gpu: on which it was built; None where it was built without one.
        plugin: it asks for our plugins where it runs.
        profiles: least, best and most sentences of each profile.
        layers: of the parsed network.
        fused_attentions: attention kernels that the builder fused.
        seconds: that the build took.
        peak_mib: largest memory of the building process up to here.
        key: of everything that decides what the builder makes (``rt_ris.build.cache``).
    """

    engine: str
    sha256: str
    bytes: int
    stage: str
    precision: str
    bundle_sha256: str
    graph_sha256: str
    target: Target
    version: str
    platform: str
    sm: int
    gpu: Gpu | None
    plugin: bool
    profiles: tuple[tuple[int, int, int], ...]
    layers: int
    fused_attentions: int
    seconds: float
    peak_mib: int
    key: str


@dataclass(frozen=True, kw_only=True)
class GateRecord:
    """That a gate passed: these engines, on this GPU, compute what PyTorch computed.

    Attributes:
        gpu: where it passed, its driver included.
        target, version: what ran the engines.
        bundle_sha256: of the manifest of the bundle whose golden vectors were replayed.
        engines: name -> SHA-256 of every engine that ran.
        kernels: identity of our plugins if an engine asks for them.
        relative_error, relative_error_limit: of the worst tensor, and the gate.
        mask_iou, mask_iou_limit: of the worst mask, and the gate.
        flips: pixels over all masks on the other side of the threshold.
        tied: sentences that needed the looser limit of ties.
        rt_ris: version that judged.
        created: UTC time, ISO 8601.
    """

    gpu: Gpu
    target: Target
    version: str
    bundle_sha256: str
    engines: Mapping[str, str]
    kernels: str | None
    relative_error: float
    relative_error_limit: float
    mask_iou: float
    mask_iou_limit: float
    flips: int
    tied: int
    rt_ris: str
    created: str


@dataclass(frozen=True, kw_only=True)
class Here:
    """What engines would run on: a library and a GPU."""

    target: Target
    version: str
    gpu: Gpu


def default_folder(bundle: Path) -> Path:
    """Where the engines of a bundle are unless one says otherwise: beside it."""
    if bundle.name in ("", ".."):  # such as ``.``, for who stands in the bundle
        bundle = Path(os.path.abspath(bundle))
    return bundle.with_name(f"{bundle.name}.engines")


def engine_name(stage: StageArtefact, target: Target, device: str) -> str:
    """The file name of an engine; ``device`` is ``sm89`` or ``local``."""
    return f"{stage.spec.id}.{stage.target.precision}.{target}-{device}.engine"


def gate_name(gpu: Gpu) -> str:
    """The file name of a GPU's gate record."""
    return f"verified.{gpu.slug}.json"


def is_own(name: str) -> bool:
    """True for the files that a folder of engines holds."""
    gate = name.startswith(("verified.", ".verified."))  # with a dot: one that was interrupted
    return gate or name.endswith((".engine", ".engine.json"))


def this_platform() -> str:
    """Operating system and processor, such as ``linux-aarch64``."""
    return f"{sys.platform}-{platform.machine()}"


def build_command(bundle: Bundle, folder: Path, target: Target) -> str:
    """The command that builds a bundle's engines for the GPU that is there."""
    words = ["rt-ris", "build", str(bundle.path), "--target", target]
    if folder != default_folder(bundle.path):
        words += ["--out", str(folder)]
    return shlex.join([*words, "--overwrite"])


def verify_command(bundle: Bundle, folder: Path, target: Target) -> str:
    """The command that runs the gate on engines."""
    words = ["rt-ris", "verify", str(bundle.path), "--backend", target]
    return shlex.join([*words, "--engines", str(folder)])
