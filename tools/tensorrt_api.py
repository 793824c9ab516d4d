"""Names and signatures of TensorRT's Python bindings, taken from the real wheels without TensorRT.

The bindings import over stubs of NVIDIA's three libraries, since importing calls nothing in them.
What is written is what the tests hold the builder and the adapter against, and what their fake
TensorRT is made of:

    python tools/tensorrt_api.py            # write tests/fakes/api/<version>.json
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any, Final

OUT: Final = Path(__file__).parent.parent / "tests" / "fakes" / "api"
WHEELS: Final = {
    "10.3.0": "tensorrt-cu12-bindings",
    "10.16.1.11": "tensorrt-cu12-bindings",
    "11.4.0.106": "tensorrt-cu13-bindings",
}
"""JetPack 6's version, the last of the 10s, and the newest."""
RTX: Final = "rtx-1.7.1.116"

FUNCTIONS: Final = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)
"""What the bindings want of the libraries when they are loaded."""


def main() -> None:
    """Write the dumps of all versions."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=OUT)
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    for version in WHEELS:
        with tempfile.TemporaryDirectory() as scratch:
            write(out, version, dump_wheel(version, Path(scratch)))
    write(out, RTX, dump("tensorrt_rtx", {}))


def write(out: Path, version: str, api: dict[str, Any]) -> None:
    """One dump, compressed so that the same content is the same bytes."""
    text = json.dumps(api, sort_keys=True, separators=(",", ":"))
    (out / f"{version}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def read(version: str, folder: Path = OUT) -> dict[str, Any]:
    """A dump as it was made."""
    found: dict[str, Any] = json.loads(
        gzip.decompress((folder / f"{version}.json.gz").read_bytes())
    )
    return found


def dump_wheel(version: str, scratch: Path) -> dict[str, Any]:
    """Download the bindings of a version and dump them.

    Raises:
        CalledProcessError: no wheel for this Python, no network, or no C compiler.
    """
    download = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    wanted = f"{WHEELS[version]}=={version}"
    subprocess.run([*download, "--dest", str(scratch), wanted], check=True, capture_output=True)
    (wheel,) = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(scratch / "wheel")
    stubs = scratch / "stubs"
    stubs.mkdir()
    make_stubs(stubs, version.split(".")[0])
    return dump(
        "tensorrt_bindings",
        {"PYTHONPATH": str(scratch / "wheel"), "LD_LIBRARY_PATH": str(stubs)},
    )


def make_stubs(folder: Path, major: str) -> None:
    """Three libraries that hold the names and do nothing."""
    source = folder / "stub.c"
    source.write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in FUNCTIONS))
    for name in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        library = f"lib{name}.so.{major}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{library}", "-o"]
        subprocess.run(
            [*command, str(folder / library), str(source)], check=True, capture_output=True
        )


def dump(module: str, environment: dict[str, str]) -> dict[str, Any]:
    """The dump of a module, made in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--inside", module],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def inside(name: str) -> None:
    """Import the module and print what it has."""
    module = __import__(name)
    classes: dict[str, Any] = {}
    for found in vars(module).values():
        if isinstance(found, type) and (found.__module__ or "").startswith("tensorrt"):
            _describe(found, found.__name__, classes)
    functions = {
        key: _signatures(value)
        for key, value in vars(module).items()
        if not isinstance(value, type) and callable(value) and not key.startswith("_")
    }
    found = {"version": module.__version__, "classes": classes, "functions": functions}
    print(json.dumps({**found, "constants": _constants(module)}))


def _constants(holder: Any) -> dict[str, list[str]]:
    """Members of enumerations that can be named without their enumeration, as ``ILogger.ERROR``."""
    return {
        key: [_plain(f"{type(value).__module__}.{type(value).__qualname__}"), value.name]
        for key, value in vars(holder).items()
        if hasattr(type(value), "__members__")
    }


def _describe(kind: type, name: str, classes: dict[str, Any]) -> None:
    methods: dict[str, Any] = {}
    properties: dict[str, Any] = {}
    nested: list[str] = []
    for key, value in vars(kind).items():
        if isinstance(value, type):
            nested.append(key)
            _describe(value, f"{name}.{key}", classes)
        elif isinstance(value, property):
            if not key.startswith("__"):
                properties[key] = {
                    "settable": value.fset is not None,
                    "type": _returned(value.fget),
                }
        elif callable(value) and (not key.startswith("_") or key == "__init__"):
            methods[key] = _signatures(value)
    members = getattr(kind, "__members__", {})
    classes[name] = {
        "bases": [b.__name__ for b in kind.__bases__ if b.__module__.startswith("tensorrt")],
        "methods": methods,
        "properties": properties,
        "members": {key: int(value) for key, value in members.items()},
        "nested": sorted(nested),
        "constants": {k: v for k, v in _constants(kind).items() if k not in members},
    }


def _returned(function: Any) -> str:
    text = _plain(getattr(function, "__doc__", None) or "")
    return text.rpartition("-> ")[2].split("\n")[0].strip() if "-> " in text else ""


def _signatures(function: Any) -> list[Any]:
    """``[[[name, type, optional], ...], returned]`` for each overload; empty where unknown."""
    found = []
    for line in _plain(getattr(function, "__doc__", None) or "").splitlines():
        match = re.match(r"^(?:\d+\. )?(\w+)\((.*)\) -> (.+)$", line)
        if match:
            arguments = [_argument(part) for part in _split(match[2])]
            found.append([arguments, match[3].strip()])
    return found


def _plain(text: str) -> str:
    """Without the modules' names, which differ."""
    return re.sub(r"\btensorrt\w*\.(?:tensorrt\w*\.)?", "", text)


def _split(text: str) -> list[str]:
    """The arguments, at the commas that are in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "[(<{") - (letter in "])>}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts if part.strip()]


def _argument(text: str) -> list[Any]:
    name, _, rest = text.partition(":")
    kind, equals, _ = rest.partition(" = ")
    return [name.strip(), kind.strip(), bool(equals)]


if __name__ == "__main__":
    if sys.argv[1:2] == ["--inside"]:
        inside(sys.argv[2])
    else:
        main()
