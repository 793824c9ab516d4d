"""Where the time goes: wall time by name, in milliseconds."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Timing:
    """What was measured under one name.

    Attributes:
        runs: how often.
        total_ms: sum of the wall times.
        last_ms: the latest one.
    """

    runs: int
    total_ms: float
    last_ms: float


class Timer:
    """Adds up wall times by name; safe to share by threads."""

    def __init__(self) -> None:
        self._timings: dict[str, Timing] = {}
        self._lock = threading.Lock()

    @contextmanager
    def measure(self, name: str) -> Iterator[None]:
        """Time the body, also if it raises."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, (time.perf_counter() - start) * 1000)

    def add(self, name: str, elapsed_ms: float) -> None:
        """Record one more run."""
        with self._lock:
            old = self._timings.get(name)
            self._timings[name] = Timing(
                runs=1 if old is None else old.runs + 1,
                total_ms=elapsed_ms if old is None else old.total_ms + elapsed_ms,
                last_ms=elapsed_ms,
            )

    def timings(self) -> Mapping[str, Timing]:
        """A copy of what was measured so far, in order of first use."""
        with self._lock:
            return dict(self._timings)
