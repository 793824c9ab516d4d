from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("onnxruntime")
TINY = Path(__file__).parents[2] / "fixtures" / "tiny"


def test_running_a_bundle_leaves_nothing_in_the_user_s_folders(tmp_path: Path) -> None:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "ORT_"))
    }
    program = f"""
import numpy, rt_ris
predictor = rt_ris.Predictor.load({str(TINY)!r}, backend="onnxruntime")
predictor.set_image(numpy.zeros((9, 9, 3), numpy.uint8))
predictor.segment("a dog").binary
"""
    subprocess.run(
        [sys.executable, "-c", program],
        env={**environment, "HOME": str(tmp_path)},
        cwd=tmp_path,
        check=True,
    )
    assert list(tmp_path.rglob("*")) == []
