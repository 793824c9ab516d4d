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
from typing import NamedTuple

from rt_ris.bundle import replace_file, storage_error
from rt_ris.errors import BuildError
from rt_ris_kernels.arguments import Arguments
from rt_ris_kernels.binary import CUDA, CUDA_12, Binary, load_binary
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
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-Wall", "-Wextra")
_C_TYPES = {
    ctypes.c_void_p: "const void*",
    ctypes.c_longlong: "long long",
    ctypes.c_int: "int",
    ctypes.c_float: "float",
}


def build_library(out: Path, *, headers: Path, cuda: Path | None = None) -> int:
    """Compiles the plugin with the kernels inside; nothing of TensorRT is linked.

    Args:
        out: the file to write; it appears whole or not at all.
        headers: folder of TensorRT's or TensorRT-RTX's ``NvInferRuntime.h``.
        cuda: folder of ``cuda.h``; that of NVIDIA's Python packages by default.

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
        binary = load_binary()
        (Path(folder) / _GENERATED).write_text(constants(binary))
        for code in _codes(binary):
            (Path(folder) / code.file).write_bytes(code.content)
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


class _Code(NamedTuple):
    """Compiled kernels in the library: for drivers from a CUDA version on, and for which GPU."""

    file: str
    content: bytes
    cuda: int
    capability: int


def _codes(binary: Binary) -> list[_Code]:
    """What is embedded, in the order in which it is tried; 0 stands for every GPU."""
    older = [_Code(f"sm_{sm}.cubin", code, CUDA_12, sm) for sm, code in binary.for_cuda_12.items()]
    return [_Code("kernels.fatbin", binary.code, CUDA, 0), *older]


def constants(binary: Binary) -> str:
    """The header of ``csrc/plugin.cpp``: everything that Python decides."""
    codes = "".join(
        f" \\\n  ONE(rt_ris_code_{index}, {json.dumps(code.file)}, {code.cuda}, {code.capability})"
        for index, code in enumerate(_codes(binary))
    )
    fields = "".join(f"  {_C_TYPES[kind]} {name};\n" for name, kind in Arguments._fields_)
    attributes = "".join(f" \\\n  {_attribute(name)}" for name in SPEC.attributes)
    return f"""// Written by rt_ris_kernels/plugin_library.py for one build; not to be edited.
#pragma once
#include <cstdint>

// ONE(name, file, least CUDA version of the driver, compute capability or 0 for all).
#define RT_RIS_CODES(ONE){codes}
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
