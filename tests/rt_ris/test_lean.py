"""The runtime stays lean: what importing it loads, what it costs, how long it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import rt_ris

ROOT = Path(rt_ris.__file__).parent
HEAVY = {"torch", "onnx", "onnxruntime", "transformers", "tensorrt", "cuda", "timm", "onnxscript"}
HEAVY |= {"rt_ris_train", "rt_ris_export", "rt_ris_kernels"}
ENGINES = {"rt_ris.backends.onnxruntime", "rt_ris.backends.tensorrt"}
"""The modules that may name their engine."""


def modules() -> list[str]:
    paths = sorted(ROOT.rglob("*.py"))
    names = [".".join(["rt_ris", *path.relative_to(ROOT).with_suffix("").parts]) for path in paths]
    return [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]


def run(code: str, *args: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [ROOT.parent, *sys.path]))}
    command = [sys.executable, "-c", code, *args]
    return subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout


def test_importing_every_module_loads_nothing_heavy() -> None:
    code = (
        "import importlib, json, sys\n"
        "for name in sys.argv[1:]: importlib.import_module(name)\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    loaded = set(json.loads(run(code, *(name for name in modules() if name not in ENGINES))))
    assert "rt_ris" in loaded
    assert not loaded & HEAVY


def test_listing_the_verbs_loads_nothing_heavy() -> None:
    code = (
        "import json, sys\n"
        "from rt_ris.cli import main\n"
        "assert main(['--help']) == 0\n"
        "print('\\n' + json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    assert not set(json.loads(run(code).splitlines()[-1])) & HEAVY


def test_the_package_itself_loads_nothing() -> None:
    code = "import sys; before = set(sys.modules); import rt_ris; print(set(sys.modules) - before)"
    assert "numpy" not in run(code)


def cpu_seconds(first: str, then: str) -> float:
    """The least processor time of a few tries: other processes only ever add to it."""
    code = (
        f"import time; {first}; start = time.process_time(); {then}; "
        "print(time.process_time() - start)"
    )
    return min(float(run(code)) for _ in range(5))


def test_importing_brings_three_libraries_and_costs_little() -> None:
    code = (
        "import json, sys; before = set(sys.modules); from rt_ris import Predictor; "
        "print(json.dumps([name for name in set(sys.modules) - before if '.' not in name and "
        "'site-packages' in (getattr(sys.modules[name], '__file__', None) or '')]))"
    )
    assert set(json.loads(run(code))) - {"rt_ris"} == {"numpy", "PIL", "tokenizers"}
    # What is ours, beside NumPy on the same machine; the libraries are loaded before the clock.
    numpy = cpu_seconds("pass", "import numpy")
    libraries = "import numpy, PIL.Image, PIL.ExifTags, tokenizers, logging, json, hashlib"
    assert cpu_seconds(libraries, "from rt_ris import Predictor") < numpy + 0.050


def test_the_runtime_stays_under_3000_lines() -> None:
    apart = {"cli", "backends", "build"}
    files = [path for path in ROOT.rglob("*.py") if path.relative_to(ROOT).parts[0] not in apart]
    assert sum(len(path.read_text().splitlines()) for path in files) < 3000
    assert max(len(path.read_text().splitlines()) for path in ROOT.rglob("*.py")) < 500
