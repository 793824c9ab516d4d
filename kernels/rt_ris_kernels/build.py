"""Compiles the CUDA source to one binary for all GPUs, and records what it holds.

    python -m rt_ris_kernels.build            writes binaries/ anew
    python -m rt_ris_kernels.build --check    compiles and compares, writes nothing
    python -m rt_ris_kernels.build --plugin /path/to/tensorrt/include
                                              the TensorRT plugin as a C++ library

The kernels' compilers are nvcc 13.0 of the package ``nvidia-cuda-nvcc`` and, for the drivers of
JetPack 6, which load nothing of CUDA 13, NVRTC 12.6 of ``nvidia-cuda-nvrtc-cu12``. The same
versions write the same bytes anywhere. Users need no compiler: the binaries ship with the package.
The plugin's compiler is the host's, and TensorRT's headers are the user's.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from rt_ris.errors import BuildError, RtRisError
from rt_ris_kernels.binary import BINARIES, INTERFACE, NAME, cuda_12_name
from rt_ris_kernels.plugin_library import LIBRARY, build_library

CSRC = Path(__file__).with_name("csrc")
SOURCE = CSRC / f"{NAME}.cu"
ARCHITECTURES = (80, 86, 87, 89, 90, 100, 110, 120)
"""Compute capabilities, times ten, that get machine code; m16n8k16 products need 80."""
PTX = 80
"""Later GPUs than those above let their driver compile this."""
NVCC_VERSION = "13.0"
NVRTC_VERSION = "12.6"
JETPACK_6 = (87,)
"""Compute capabilities of the devices whose drivers end at CUDA 12.6: Orin."""

Resources = Mapping[str, Mapping[str, Mapping[str, int]]]
"""Registers, stack, spills and static shared bytes by architecture and kernel."""

_FLAGS = ("-std=c++17", "-Xptxas", "-v")


def find_nvcc() -> str:
    """Nvcc of the Python package, or the one on the PATH; NVCC names another.

    Raises:
        BuildError: there is none.
    """
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin" / "nvcc"
    found = os.environ.get("NVCC") or (
        str(packaged) if packaged.is_file() else shutil.which("nvcc")
    )
    if not found:
        raise BuildError(
            "nvcc was not found. Install the packages of the group 'cuda-build' "
            f"(nvidia-cuda-nvcc {NVCC_VERSION}), or name it with NVCC=/path/to/nvcc."
        )
    return found


def find_nvrtc() -> Path:
    """NVRTC 12.6 of the Python package; NVRTC names another library.

    Raises:
        BuildError: there is none.
    """
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia" / "cuda_nvrtc" / "lib"
    found = Path(os.environ.get("NVRTC") or packaged / "libnvrtc.so.12")
    if not found.is_file():
        raise BuildError(
            f"NVRTC was not found at {found}. Install the packages of the group 'cuda-build' "
            f"(nvidia-cuda-nvrtc-cu12 {NVRTC_VERSION}), or name it with NVRTC=/path/libnvrtc.so.12."
        )
    return found


def compile_fatbin(nvcc: str) -> tuple[bytes, Resources]:
    """The binary and, per architecture and kernel, what ptxas says of it.

    Raises:
        BuildError: nvcc is of another version, or refused the source.
    """
    version = _run([nvcc, "--version"])
    if f"release {NVCC_VERSION}," not in version:
        raise BuildError(f"{nvcc} is {version.strip().splitlines()[-1]}; {NVCC_VERSION} is needed.")
    targets = [f"-gencode=arch=compute_{sm},code=sm_{sm}" for sm in ARCHITECTURES]
    targets.append(f"-gencode=arch=compute_{PTX},code=compute_{PTX}")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "kernels.fatbin"
        command = [nvcc, *_FLAGS, "-fatbin", "-compress-mode=size", *targets, SOURCE.name]
        report = _run([*command, "-o", str(out)], cwd=CSRC)
        return out.read_bytes(), resources(report)


def resources(report: str) -> Resources:
    """Registers, stack, spills and static shared bytes from the output of ``ptxas -v``."""
    entry = re.compile(
        r"Compiling entry function '(?P<kernel>\w+)' for 'sm_(?P<sm>\d+)'"
        r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
        r"(?P<loads>\d+) bytes spill loads"
        r".*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
        re.DOTALL,
    )
    found: dict[str, dict[str, dict[str, int]]] = {}
    for match in entry.finditer(report):
        shared = re.search(r"(\d+) bytes smem", match["rest"])
        found.setdefault(match["sm"], {})[match["kernel"]] = {
            "registers": int(match["registers"]),
            "stack_bytes": int(match["stack"]),
            "spilled_bytes": int(match["stores"]) + int(match["loads"]),
            "static_shared_bytes": int(shared[1]) if shared else 0,
        }
    return {sm: dict(sorted(found[sm].items())) for sm in sorted(found, key=int)}


def source_sha256() -> str:
    """Of the files that decide the binary."""
    digest = hashlib.sha256()
    for path in (SOURCE, CSRC / "machine.cuh"):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def build() -> dict[str, bytes]:
    """The files of ``binaries``, by name; the record is the last.

    Raises:
        BuildError: see ``compile_fatbin`` and ``compile_cubin``; or a kernel spills registers.
    """
    binary, used = compile_fatbin(find_nvcc())
    older = {sm: compile_cubin(find_nvrtc(), sm) for sm in JETPACK_6}
    _check_registers(used)
    for _, figures in older.values():
        _check_registers(figures)
    record = {
        "interface": INTERFACE,
        "sha256": hashlib.sha256(binary).hexdigest(),
        "source_sha256": source_sha256(),
        "compiler": f"nvcc {NVCC_VERSION}",
        "architectures": list(ARCHITECTURES),
        "ptx": PTX,
        "resources": used,
        "cuda_12": {
            str(sm): {
                "sha256": hashlib.sha256(code).hexdigest(),
                "compiler": f"NVRTC {NVRTC_VERSION}",
                "resources": figures[str(sm)],
            }
            for sm, (code, figures) in older.items()
        },
    }
    return {
        f"{NAME}.fatbin": binary,
        **{cuda_12_name(sm): code for sm, (code, _) in older.items()},
        f"{NAME}.json": (json.dumps(record, indent=1) + "\n").encode(),
    }


def _check_registers(used: Resources) -> None:
    spilling = [
        f"{kernel} on sm_{sm}"
        for sm, kernels in used.items()
        for kernel, figures in kernels.items()
        if figures["spilled_bytes"] or figures["stack_bytes"]
    ]
    if spilling:
        raise BuildError(f"Registers spill to memory in: {', '.join(spilling)}.")


def compile_cubin(nvrtc: Path, sm: int, *, version: str = NVRTC_VERSION) -> tuple[bytes, Resources]:
    """Machine code for one architecture by NVRTC, and what ptxas says of it.

    Raises:
        BuildError: the library cannot be loaded, is of another version or refuses the source.
    """
    try:
        library = ctypes.CDLL(str(nvrtc))
    except OSError as error:
        raise BuildError(f"{nvrtc} cannot be loaded as NVRTC: {error}.") from error
    major, minor = ctypes.c_int(), ctypes.c_int()
    library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor))
    if f"{major.value}.{minor.value}" != version:
        raise BuildError(f"{nvrtc} is NVRTC {major.value}.{minor.value}; {version} is needed.")
    program = ctypes.c_void_p()
    header = (ctypes.c_char_p * 1)((CSRC / "machine.cuh").read_bytes())
    names = (ctypes.c_char_p * 1)(b"machine.cuh")
    made = library.nvrtcCreateProgram(
        ctypes.byref(program), SOURCE.read_bytes(), SOURCE.name.encode(), 1, header, names
    )
    if made:
        raise BuildError(f"NVRTC could not take {SOURCE.name} (code {made}).")
    options = [f"--gpu-architecture=sm_{sm}", "--std=c++17", "--ptxas-options=-v"]
    encoded = [option.encode() for option in options]
    failed = library.nvrtcCompileProgram(
        program, len(encoded), (ctypes.c_char_p * len(encoded))(*encoded)
    )
    log = _log(library, program)
    if failed:
        raise BuildError(f"NVRTC refused {SOURCE.name} for sm_{sm}: {log}")
    size = ctypes.c_size_t()
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, code)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw, resources(log)


def _log(library: ctypes.CDLL, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t()
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, text)
    return text.value.decode()


def _run(command: Sequence[str], *, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)} failed:\n{done.stderr.strip()}")
    return done.stdout + done.stderr


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module; returns an exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m rt_ris_kernels.build",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="compare with what is stored")
    what.add_argument("--plugin", type=Path, help="folder of TensorRT's NvInferRuntime.h")
    parser.add_argument("--out", type=Path, help=f"with --plugin: the library [{LIBRARY}]")
    parser.add_argument("--cuda", type=Path, help="with --plugin: folder of cuda.h")
    given = parser.parse_args(arguments)
    for name in ("out", "cuda"):
        if getattr(given, name) and not given.plugin:
            parser.error(f"--{name} goes with --plugin")
    try:
        if given.plugin:
            out = given.out or Path(LIBRARY)
            print(f"{out}: {build_library(out, headers=given.plugin, cuda=given.cuda)} bytes")
            return 0
        return _build_binaries(check=given.check)
    except RtRisError as error:
        print(error, file=sys.stderr)
        return error.exit_code


def _build_binaries(*, check: bool) -> int:
    files = build()
    if check:
        same = {path.name: path.read_bytes() for path in BINARIES.iterdir()} == files
        print("The stored binaries are what this source compiles to." if same else "They differ.")
        return 0 if same else 1
    BINARIES.mkdir(exist_ok=True)
    for name, content in files.items():
        (BINARIES / name).write_bytes(content)
        print(f"{name}: {len(content)} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
