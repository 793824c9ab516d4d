"""Starting the process that builds, and telling what became of it."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from rt_ris.build.onnx_file import node_count
from rt_ris.build.request import MODULES, Job, Request, Target
from rt_ris.errors import BuildError, MissingExtraError
from rt_ris.records import to_json

PATIENCE_S: Final = 20.0
"""How long an interrupted build may take to its next step and to writing its timings."""

CHILD: Final = "rt_ris.build.child"


def built(request: Request, say: Callable[[str], None]) -> Iterator[Mapping[str, Any]]:
    """What the child reports, engine by engine; an error if it stops before the last.

    Raises:
        BuildError: a graph was refused, or the process died.
        OSError: an engine could not be written.
    """
    jobs = request.jobs
    counted = {graph: node_count(Path(graph).read_bytes()) for graph in {job.graph for job in jobs}}
    sizes = [counted[job.graph] for job in jobs]
    began, spent = time.monotonic(), 0.0
    with _started(request, say) as (child, errors):
        for index, job in enumerate(jobs):
            told = f"[{index + 1}/{len(jobs)}] building {Path(job.engine).name}"
            if index:
                so_far, left = time.monotonic() - began, _left(sizes, index, spent)
                told += f", {_duration(so_far)} so far, about {_duration(left)} left"
            say(told)
            news = _next(child, say)
            if "built" not in news:
                raise _failure(job, news, child, errors)
            spent += float(news["built"]["seconds"])
            if index == len(jobs) - 1:
                child.wait()
            yield news["built"]


def _left(sizes: Sequence[int], index: int, spent_s: float) -> float:
    """Seconds that are left if building takes time as graphs have nodes.

    Over the published sizes (``bench/results/engines.json``, by the engines' layers) it is off by
    27 % of the whole on average, by graphs' bytes by 31 %, and by 48 % where all count the same.
    """
    return spent_s * sum(sizes[index:]) / max(sum(sizes[:index]), 1)


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def installed_version(target: Target) -> str:
    """The version of the builder, asked in a process of its own as builds are."""
    with libraries(target) as environment:
        done = subprocess.run(
            [sys.executable, "-m", CHILD, "version", target],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
    told = [line for line in done.stdout.splitlines() if line.startswith('{"version"')]
    if not told:
        last = (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise BuildError(f"The builder of {target} does not start; it said: {last}")
    return str(json.loads(told[-1])["version"])


def check_installed(target: Target) -> None:
    """Refuse a target whose builder is not installed.

    Raises:
        MissingExtraError: with the pip line.
    """
    module = MODULES[target]
    if importlib.util.find_spec(module) is None:
        wheel = "tensorrt-rtx-cu13" if target == "tensorrt-rtx" else "tensorrt"
        raise MissingExtraError(
            f"Building for {target} needs its Python module '{module}'; run: pip install {wheel}",
            extra=wheel,
            module=module,
        )


@contextmanager
def libraries(target: Target) -> Iterator[dict[str, str]]:
    """The child's environment: TensorRT-RTX looks for its library by a name its wheel lacks.

    Seen in 1.7.1: the parser opens ``libtensorrt_rtx.so``, the wheel has ``.so.1`` only, and the
    process aborts at the first plugin.
    """
    environment = dict(os.environ)
    found = importlib.util.find_spec("tensorrt_rtx_libs") if target == "tensorrt-rtx" else None
    if found is None or not found.submodule_search_locations:
        yield environment
        return
    with tempfile.TemporaryDirectory() as folder:
        for library in Path(found.submodule_search_locations[0]).glob("*.so.1"):
            (Path(folder) / library.stem).symlink_to(library)
        before = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = f"{folder}:{before}" if before else folder
        yield environment


@contextmanager
def _started(
    request: Request, say: Callable[[str], None]
) -> Iterator[tuple[subprocess.Popen[str], IO[str]]]:
    """The child and what it writes to stderr; it is gone afterwards in any case."""
    with (
        libraries(request.target) as environment,
        tempfile.NamedTemporaryFile(suffix=".json") as written,
        tempfile.TemporaryFile("w+") as errors,
    ):
        written.write(to_json(request))
        written.flush()
        child = subprocess.Popen(
            [sys.executable, "-m", CHILD, written.name],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
        )
        try:
            yield child, errors
        except KeyboardInterrupt:
            if request.timings is not None:
                _stop(child, say)
            raise
        finally:
            child.kill()
            child.wait()
            assert child.stdout is not None
            child.stdout.close()


def _stop(child: subprocess.Popen[str], say: Callable[[str], None]) -> None:
    """Ask the child to end at its next step; it writes its timings then."""
    child.send_signal(signal.SIGINT)
    say(f"stopping; what the builder has timed is kept, which takes at most {PATIENCE_S:.0f} s")
    try:
        child.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        return  # it is killed now; the timings of the engines before this one are kept


def _next(child: subprocess.Popen[str], say: Callable[[str], None]) -> Mapping[str, Any]:
    """The child's next news; empty where it ended without any."""
    assert child.stdout is not None
    for line in child.stdout:
        if line.startswith('{"'):  # the builder prints lines of its own, too
            news: Mapping[str, Any] = json.loads(line)
            if "note" not in news:
                return news
            say(str(news["note"]))
    return {}


def _failure(
    job: Job, news: Mapping[str, Any], child: subprocess.Popen[str], errors: IO[str]
) -> Exception:
    if "storage" in news:
        return OSError(news["storage"]["errno"], news["storage"]["reason"])
    if "failed" in news:
        said = "; ".join(news["failed"]["errors"][:3])
        return BuildError(
            f"The builder refused stage '{job.stage}' ({Path(job.engine).name}): {said}. No engine "
            "was written. The other --target, a newer builder or the other precision (rt-ris "
            "export --precision) may take it."
        )
    code = child.wait()
    errors.seek(0)
    lines = [line for line in errors.read().splitlines() if line.strip()]
    last = f" It said: {lines[-1]}" if lines else ""
    advice = ""
    if code == -signal.SIGKILL:
        cause = "was killed, most likely because the memory was exhausted"
        advice = " Close what else uses memory, then try again."
    elif code < 0:
        cause = f"died of {signal.Signals(-code).name}"
    else:
        cause = f"ended with code {code}"
    return BuildError(
        f"The process that built stage '{job.stage}' ({Path(job.engine).name}) {cause}.{last} No "
        f"engine was written.{advice}"
    )
