"""The process that builds: reads one request, builds its engines one after another.

``python -m rt_ris.build.child REQUEST.json`` prints one JSON object per line: ``{"built": ...}``
for every engine, ``{"failed": ...}`` where the builder refuses, ``{"storage": ...}`` where the disk
does, ``{"note": ...}`` for what stops nothing. Nothing here needs a GPU where the target is
TensorRT-RTX. ``python -m rt_ris.build.child version TARGET`` prints ``{"version": ...}``.
"""

from __future__ import annotations

import importlib
import json
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, Final

from rt_ris.build.log import error_log
from rt_ris.build.request import BUCKETS, MODULES, Job, Request
from rt_ris.build.timings import Timings
from rt_ris.records import from_data, parse_json

PLUGIN: Final = "PLUGIN_V3"
FUSED_ATTENTION: Final = b"function={ name=_gemm_mha_v2 "
"""What a plan of TensorRT-RTX 1.7 holds once for each attention that became one kernel."""


def main(words: Sequence[str]) -> int:
    """Build everything that a request asks for, or print the builder's version."""
    if words[0] == "version":
        _say(version=importlib.import_module(MODULES[words[1]]).__version__)  # type: ignore[index]
        return 0
    request = from_data(Request, parse_json(Path(words[0]).read_bytes()))
    trt = importlib.import_module(MODULES[request.target])
    timings = None
    if request.timings is not None:
        timings = Timings(trt, Path(f"{request.timings}-{trt.__version__}.timing"))
    with timings.interruptible() if timings else nullcontext():
        return _build_all(trt, request, timings)


def _build_all(trt: Any, request: Request, timings: Timings | None) -> int:
    registered = False
    for job in request.jobs:
        began = time.monotonic()
        if job.plugin and not registered:
            importlib.import_module("rt_ris_kernels.plugin").register(trt)
            registered = True
        try:
            found = build(trt, job, workspace_mib=request.workspace_mib, timings=timings)
        except Refused as refusal:
            _say(failed={"errors": refusal.errors})
            return 1
        except OSError as error:
            _say(storage={"errno": error.errno, "reason": error.strerror})
            return 1
        seconds = round(time.monotonic() - began, 1)
        facts = {"seconds": seconds, "peak_mib": peak_mib(), "version": trt.__version__}
        _say(built={**facts, **found})
    return 0


def peak_mib() -> int:
    """The largest memory of this process so far.

    Linux counts into ``getrusage`` what the process that started this one held, so its own record
    is read where there is one.
    """
    status = Path("/proc/self/status")
    for line in status.read_text("ascii").splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) >> 10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


class Refused(Exception):
    """The builder said no; ``errors`` are its own words."""

    def __init__(self, errors: Sequence[str]) -> None:
        super().__init__("; ".join(errors))
        self.errors = list(errors)


def build(
    trt: Any, job: Job, *, workspace_mib: int | None, timings: Timings | None = None
) -> dict[str, object]:
    """Build one engine with any of TensorRT 10.3, 11 and TensorRT-RTX, and write it.

    Args:
        trt: the engine's Python module; only what all three have is used, and what one lacks is
            used only for a request that the others do not get.
        job: graph, destination and compute capability.
        workspace_mib: memory the builder may use on the device; None leaves it to the builder.
        timings: the cache of timings, where the builder times.

    Returns:
        Numbers of layers and bytes, and how many of our plugins are in it.

    Raises:
        Refused: the graph does not parse or cannot be built, or the build was interrupted.
        OSError: the engine could not be written.
    """
    log = error_log(trt)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(job.graph):
        raise Refused([_parser_error(parser.get_error(i)) for i in range(parser.num_errors)])
    layers = [network.get_layer(index) for index in range(network.num_layers)]
    kinds = [str(layer.type).split(".")[-1] for layer in layers]
    _check_plugins([layer for layer, kind in zip(layers, kinds, strict=True) if kind == PLUGIN])
    config = _configured(trt, builder, network, job, workspace_mib=workspace_mib)
    with _timed(config, timings):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise Refused(log.errors or ["The builder gave no reason."])
    content = bytes(plan)
    Path(job.engine).write_bytes(content)
    return {
        "layers": len(layers),
        "plugins": kinds.count(PLUGIN),
        "fused_attentions": content.count(FUSED_ATTENTION),
        "bytes": len(content),
    }


def _configured(
    trt: Any, builder: Any, network: Any, job: Job, *, workspace_mib: int | None
) -> Any:
    config = builder.create_builder_config()
    if workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_mib << 20)
    if job.sm is not None:
        config.num_compute_capabilities = 1
        capability = getattr(trt.ComputeCapability, f"SM{job.sm}", None)
        if capability is None or not config.set_compute_capability(capability, 0):
            raise Refused([f"The builder does not know compute capability {job.sm}."])
    for low, best, high in BUCKETS if _has_free_axis(network) else ():
        config.add_optimization_profile(_profile(builder, network, low, best, high))
    return config


@contextmanager
def _timed(config: Any, timings: Timings | None) -> Iterator[None]:
    """A build that reads the timings before and writes them behind, whatever became of it."""
    if timings is None:
        yield
        return
    distrusted = timings.attach(config)
    if distrusted:
        _say(note=f"the timings are taken anew: {distrusted}")
    try:
        yield
    finally:
        try:
            timings.save(config)
        except OSError as error:
            _say(note=f"the timings could not be kept in {timings.path}: {error.strerror}")


def _check_plugins(layers: Sequence[Any]) -> None:
    """Refuse what a plugin could only refuse inside the builder, which ends the process."""
    for layer in layers:
        channels = layer.get_input(0).shape[-1]
        accepted = importlib.import_module("rt_ris_kernels.geometry").CHANNELS
        if channels not in accepted:
            raise Refused(
                [
                    f"'{layer.name}' has {channels} channels, our kernels take "
                    f"{' or '.join(map(str, accepted))}; build it from its function (--no-plugin)"
                ]
            )


def _parser_error(error: Any) -> str:
    """The parser's words with the node they are about."""
    node = getattr(error, "node_name", lambda: "")()
    operator = getattr(error, "node_operator", lambda: "")()
    return f"{operator} '{node}': {error.desc()}" if node else str(error.desc())


def _has_free_axis(network: Any) -> bool:
    return any(-1 in tuple(network.get_input(i).shape) for i in range(network.num_inputs))


def _profile(builder: Any, network: Any, low: int, best: int, high: int) -> Any:
    profile = builder.create_optimization_profile()
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        shapes = [
            tuple(count if axis == -1 else axis for axis in tensor.shape)
            for count in (low, best, high)
        ]
        if -1 in tuple(tensor.shape):
            profile.set_shape(tensor.name, *shapes)
    return profile


def _say(**news: object) -> None:
    print(json.dumps(news), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
