"""TensorRT's cache of kernel timings in a file, and how a build that times is stopped.

A build of TensorRT spends its time on measuring kernels. What it measured is written after every
engine, also after one that was interrupted, so that the next build goes on from there.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from rt_ris.build.trust import read_trusted
from rt_ris.bundle import replace_file
from rt_ris.errors import IntegrityError

LIMIT = 1 << 30


class Timings:
    """The timings of one GPU and one version.

    Args:
        trt: the imported ``tensorrt``.
        path: the file; made by ``save``.
    """

    def __init__(self, trt: Any, path: Path) -> None:
        self._trt = trt
        self.path = path
        self.stop = threading.Event()

    def attach(self, config: Any) -> str:
        """Give a build what is known, and a way to be stopped at its next step.

        Returns:
            Why a file that is there is left out, as somebody else could have written it; or
            nothing.
        """
        known, distrusted = b"", ""
        if os.path.lexists(self.path):
            try:
                known = read_trusted(self.path, limit=LIMIT)
            except IntegrityError as error:
                distrusted = str(error)
        cache = config.create_timing_cache(known)
        if cache is None or not config.set_timing_cache(cache, False):  # another GPU's, or damaged
            config.set_timing_cache(config.create_timing_cache(b""), False)
        config.progress_monitor = _monitor(self._trt, self.stop)
        return distrusted

    def save(self, config: Any) -> None:
        """Write what is known after a build, whole or not at all.

        Raises:
            OSError: it could not be written.
        """
        replace_file(self.path, bytes(config.get_timing_cache().serialize()))

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Within, an interrupt stops the build instead of the process."""

        def note(number: int, frame: FrameType | None) -> None:
            self.stop.set()

        before = signal.signal(signal.SIGINT, note)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def _monitor(trt: Any, stop: threading.Event) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc] # the module ships no types
        """What TensorRT tells of its progress; its answer to a step is whether to go on."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            """A phase has begun."""

        def phase_finish(self, phase: str) -> None:
            """It is over."""

        def step_complete(self, phase: str, step: int) -> bool:
            return not stop.is_set()

    return Monitor()
