"""In the place of TensorRT, in tests and in the processes that they start."""

import os
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import fake_trt

made = fake_trt.Fake(os.environ["RT_RIS_FAKE_TENSORRT"])
if os.environ.get("RT_RIS_FAKE_FAULT"):
    made._faults.add(os.environ["RT_RIS_FAKE_FAULT"])
if os.environ.get("RT_RIS_FAKE_SLOW"):  # a file that says that a build is under way

    def wait() -> None:
        Path(os.environ["RT_RIS_FAKE_SLOW"]).touch()
        time.sleep(0.02)

    made._during, made._steps = wait, 1500
sys.modules[__name__] = made
