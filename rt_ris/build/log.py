"""A logger for any TensorRT that keeps what it calls errors."""

from __future__ import annotations

from typing import Any


def error_log(trt: Any) -> Any:
    """A logger of a TensorRT module; the messages of its errors are in ``errors``."""

    class Log(trt.ILogger):  # type: ignore[misc] # the module ships no types
        """Keeps the errors."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: object, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Log()
