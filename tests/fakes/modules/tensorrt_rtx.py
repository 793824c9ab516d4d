"""In the place of TensorRT-RTX, in tests and in the processes that they start."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import fake_trt

sys.modules[__name__] = fake_trt.from_environment()
