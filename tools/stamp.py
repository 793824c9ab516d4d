"""Where and with what a result was made, for the scripts beside this one."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path


def commit() -> str:
    """The commit of the working tree."""
    words = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def machine() -> dict[str, str]:
    """The processor, its cores and the system."""
    lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    model = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    cores = sum(line.startswith("processor") for line in lines)
    return {"processor": model, "cores": str(cores), "system": platform.platform(), "gpu": "none"}
