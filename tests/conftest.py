from __future__ import annotations

import os

import hypothesis

import rt_ris.backends  # noqa: F401  # before anything imports ONNX Runtime: it switches telemetry off

# New examples are for those who write the code; a landing must not hang on the luck of a draw.
hypothesis.settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")
