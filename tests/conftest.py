from __future__ import annotations

import rt_ris.backends  # noqa: F401  # before anything imports ONNX Runtime: it switches telemetry off
