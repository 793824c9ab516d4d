"""The TensorRT plugin as a C++ library, for programs without Python.

``csrc/plugin.cpp`` is compiled against TensorRT's headers, which its users have and this package
does not. What Python owns, such as the operator's attributes, the kernels' parameter and their
launches, is written to a header for that one build, so that the library and ``plugin.py`` cannot
differ in a number.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rt_ris.bundle import replace_file, storage_error
from rt_ris.errors import BuildError
from rt_ris_kernels.arguments import Arguments
from rt_ris_kernels.binary import load_binary
from rt_ris_kernels.geometry import (
    CHANNELS,
    DTYPES,
    MAX_BLOCKS,
    MAX_ELEMENTS,
    MAX_EXPRESSIONS,
    TILE_PIXELS,
    WORD_CAPACITIES,
    Geometry,
    Launch,
    geometry,
)
from rt_ris_kernels.launch import LEAST_CAPABILITY, PROGRAMMATIC_LAUNCH
from rt_ris_kernels.ops.masked_mutual_attention import MASKED_MUTUAL_ATTENTION as SPEC
from rt_ris_kernels.simt import host_compiler

SOURCE = Path(__file__).with_name("csrc") / "plugin.cpp"
LIBRARY = "librt_ris_plugin.so"
"""The file's usual name."""

_HEADER = "NvInferRuntime.h"
_GENERATED = "plugin_constants.h"
_CODE = "kernels.fatbin"
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")
_C_TYPES = {
    ctypes.c_void_p: "const void*",
    ctypes.c_longlong: "long long",
    ctypes.c_int: "int",
    ctypes.c_float: "float",
}


def build_library(
    out: Path, *, headers: Path, cuda: Path | None = None, cubin: Path | None = None
) -> int:
    """Compiles the plugin with the kernels inside; nothing of TensorRT is linked.

    Args:
        out: the file to write; it appears whole or not at all.
        headers: folder of TensorRT's or TensorRT-RTX's ``NvInferRuntime.h``.
        cuda: folder of ``cuda.h``; that of NVIDIA's Python packages by default.
        cubin: kernels made by ``build.py --nvrtc`` for one kind of GPU and older drivers; the
            shipped kernels by default.

    Returns:
        The library's size in bytes.

    Raises:
        BuildError: a header or the compiler is missing, or the compiler refused the source.
        IntegrityError: the shipped kernels are damaged.
        StorageError: ``out`` could not be written.
    """
    _check_headers(headers)
    cuda = cuda or packaged_cuda()
    if not (cuda / "cuda.h").is_file():
        raise BuildError(
            f"{cuda} has no cuda.h, which the plugin and TensorRT's headers need. Install the "
            "packages of the group 'cuda-build' (nvidia-cuda-runtime), or name the folder of a "
            "CUDA toolkit: --cuda /usr/local/cuda/include."
        )
    compiler = host_compiler()
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _GENERATED).write_text(constants())
        (Path(folder) / _CODE).write_bytes(_read_cubin(cubin) if cubin else load_binary().code)
        command = [compiler, *_FLAGS, "-isystem", str(headers.resolve())]
        command += ["-isystem", str(cuda.resolve()), "-I.", str(SOURCE), "-o", LIBRARY, "-ldl"]
        try:
            done = subprocess.run(
                command, cwd=folder, capture_output=True, text=True, errors="replace", check=False
            )
        except OSError as error:
            raise BuildError(
                f"{compiler} cannot be run ({error.strerror}). Name a C++ compiler with CXX."
            ) from error
        if done.returncode:
            raise BuildError(
                f"{compiler} refused the plugin with the headers in {headers}; nothing was "
                f"written:\n{done.stderr.strip()}"
            )
        raw = (Path(folder) / LIBRARY).read_bytes()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        replace_file(out, raw)
    except OSError as error:
        raise storage_error(out, error, what="plugin") from error
    return len(raw)


def constants() -> str:
    """The header of ``csrc/plugin.cpp``: everything that Python decides."""
    fields = "".join(f"  {_C_TYPES[kind]} {name};\n" for name, kind in Arguments._fields_)
    attributes = "".join(f" \\\n  {_attribute(name)}" for name in SPEC.attributes)
    return f"""// Written by rt_ris_kernels/plugin_library.py for one build; not to be edited.
#pragma once
#include <cstdint>

#define RT_RIS_CODE {json.dumps(_CODE)}
// ONE(type, name, default) for each attribute of the operator, in its order.
#define RT_RIS_ATTRIBUTES(ONE){attributes}
#define RT_RIS_ATTRIBUTE_COUNT {len(SPEC.attributes)}

namespace rt_ris {{

constexpr char NAME[] = {json.dumps(SPEC.op_type)};
constexpr char VERSION[] = {json.dumps(str(SPEC.version))};
constexpr char NAMESPACE[] = {json.dumps(SPEC.domain)};
constexpr int INPUTS = {len(SPEC.inputs)};
constexpr int OUTPUTS = {len(SPEC.outputs)};
constexpr int CHANNELS[] = {{{", ".join(map(str, CHANNELS))}}};
constexpr int MAX_WORDS = {WORD_CAPACITIES[-1]};
constexpr int MAX_BLOCKS = {MAX_BLOCKS};
constexpr int MAX_EXPRESSIONS = {MAX_EXPRESSIONS};
constexpr int64_t MAX_ELEMENTS = {MAX_ELEMENTS};
constexpr int TILE_PIXELS = {TILE_PIXELS};
constexpr int LEAST_CAPABILITY = {LEAST_CAPABILITY};
constexpr int PROGRAMMATIC_LAUNCH = {PROGRAMMATIC_LAUNCH};

struct Arguments {{
{fields}}};

// A forward kernel takes up to so many words; a block with one tile needs less shared memory.
struct ForwardPlan {{
  bool half;
  int channels, words, blocks_per_multiprocessor;
  const char* kernel;
  int threads, shared_bytes, one_tile_shared_bytes;
}};

// A reduction launched for up to so many splits.
struct ReducePlan {{
  bool half;
  int channels, splits;
  const char* kernel;
  int threads, shared_bytes;
}};

constexpr ForwardPlan FORWARD_PLANS[] = {{
{_rows(_forward_rows())}}};

constexpr ReducePlan REDUCE_PLANS[] = {{
{_rows(_reduce_rows())}}};

}}  // namespace rt_ris
"""


def packaged_cuda() -> Path:
    """Where NVIDIA's Python packages keep ``cuda.h``, if they are installed."""
    return Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "include"


def _check_headers(headers: Path) -> None:
    try:
        text = (headers / _HEADER).read_text(errors="replace")
    except OSError as error:
        raise BuildError(
            f"{headers} has no {_HEADER}. Name the folder of the headers of TensorRT 10.3 or "
            "later, or of TensorRT-RTX; this package ships none (Debian's package is "
            "libnvinfer-headers-dev, the archives have them in include/)."
        ) from error
    if "IPluginV3OneRuntime" not in text:
        raise BuildError(
            f"{headers / _HEADER} declares no IPluginV3OneRuntime: it is older than TensorRT 10. "
            "Name the headers of TensorRT 10.3 or later, or of TensorRT-RTX."
        )


def _read_cubin(path: Path) -> bytes:
    try:
        code = path.read_bytes()
    except OSError as error:
        raise BuildError(f"{path} cannot be read: {error.strerror or error}.") from error
    missing = [plan[4] for plan in _forward_rows() if str(plan[4]).encode() not in code]
    if not code.startswith(b"\x7fELF") or missing:
        raise BuildError(
            f"{path} is no cubin of these kernels. Make it with this version: "
            "python -m rt_ris_kernels.build --nvrtc /path/to/libnvrtc.so.12."
        )
    return code


def _attribute(name: str) -> str:
    default = SPEC.attributes[name]
    if isinstance(default, int):
        return f"ONE(int32_t, {name}, {default})"
    return f"ONE(float, {name}, {ctypes.c_float(default).value.hex()}f)"


def _rows(rows: Iterator[tuple[object, ...]]) -> str:
    return "".join(f"    {{{', '.join(json.dumps(value) for value in row)}}},\n" for row in rows)


def _forward_rows() -> Iterator[tuple[object, ...]]:
    for dtype in DTYPES:
        for channels in CHANNELS:
            for capacity in WORD_CAPACITIES:
                full = _plan(dtype, channels, words=capacity, pixels=MAX_BLOCKS * TILE_PIXELS)
                short = _plan(dtype, channels, words=capacity, pixels=1)
                launch = full.forward
                key = (dtype == "float16", channels, capacity, full.splits)
                yield (
                    *key,
                    launch.kernel,
                    launch.threads,
                    launch.shared_bytes,
                    short.forward.shared_bytes,
                )


def _reduce_rows() -> Iterator[tuple[object, ...]]:
    """One row for each run of splits that are reduced by equal launches."""
    for dtype in DTYPES:
        for channels in CHANNELS:
            last: dict[Launch, int] = {}
            for splits in range(1, MAX_BLOCKS + 1):
                plan = _plan(
                    dtype,
                    channels,
                    words=1,
                    pixels=splits * TILE_PIXELS,
                    multiprocessors=MAX_BLOCKS,
                )
                last[plan.reduce] = plan.splits
            for launch, splits in last.items():
                key = (dtype == "float16", channels, splits)
                yield *key, launch.kernel, launch.threads, launch.shared_bytes


def _plan(
    dtype: str, channels: int, *, words: int, pixels: int, multiprocessors: int = 1
) -> Geometry:
    return geometry(
        expressions=1,
        pixels=pixels,
        words=words,
        channels=channels,
        dtype=dtype,
        multiprocessors=multiprocessors,
    )
