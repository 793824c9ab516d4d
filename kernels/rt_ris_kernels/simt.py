"""The CUDA source run on the host, thread by thread, to prove it without a GPU.

``csrc/machine_simt.h`` imitates what the kernels ask of the machine and stops on races, on memory
that is read before it is written and on addresses outside the buffers. Slow by design: about five
milliseconds for a tile of 32 pixels.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from rt_ris.errors import BackendError, BuildError
from rt_ris_kernels.arguments import Arguments, fill
from rt_ris_kernels.geometry import Launch, geometry
from rt_ris_kernels.kernel import Array

CSRC = Path(__file__).with_name("csrc")
SOURCE = CSRC / "masked_mutual_attention.cu"
_FLAGS = ("-std=c++17", "-O2", "-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", "-shared", "-fPIC")


class Emulator:
    """A kernel source compiled for the host.

    Args:
        source: a ``.cu`` file that includes ``machine.cuh``.

    Raises:
        BuildError: no C++ compiler, or it refused the source.
    """

    def __init__(self, source: Path = SOURCE) -> None:
        self._library = ctypes.CDLL(str(_compile(source.read_text())))
        self._library.simt_problem.restype = ctypes.c_char_p

    def run(
        self,
        arrays: Sequence[Array],
        *,
        threshold: float = 0.5,
        scale: float = 1.0,
        epsilon: float = 1e-5,
        normalize: int = 0,
        multiprocessors: int = 4,
    ) -> tuple[Array, Array]:
        """The operator on inputs in operator order, all float16 or all float32.

        Args:
            arrays: as ``MASKED_MUTUAL_ATTENTION.inputs``; C contiguous.
            threshold: see the reference.
            scale: see the reference.
            epsilon: see the reference.
            normalize: see the reference.
            multiprocessors: of the imagined GPU; decides how pixels are split among blocks.

        Returns:
            f_lav and f_val, which held NaN before.

        Raises:
            BackendError: the kernel raced, read what nothing wrote, left its buffers or hung.
            ShapeError: no kernel for these sizes.
        """
        z_v, z_l = arrays[0], arrays[1]
        expressions, words, channels = z_l.shape
        plan = geometry(
            expressions=expressions,
            pixels=z_v.shape[1],
            words=words,
            channels=channels,
            dtype=str(z_v.dtype),
            multiprocessors=multiprocessors,
        )
        f_lav = np.full((expressions, z_v.shape[1], channels), np.nan, z_v.dtype)
        f_val = np.full_like(z_l, np.nan)
        workspace = np.full(plan.workspace_bytes // 4, np.nan, np.float32)
        arguments = fill(
            [array.ctypes.data for array in (*arrays, f_lav, f_val)],
            workspace=workspace.ctypes.data,
            plan=plan,
            shared=z_v.shape[0] == 1,
            pixels=z_v.shape[1],
            words=words,
            attributes={
                "threshold": threshold,
                "scale": scale,
                "epsilon": epsilon,
                "normalize": normalize,
            },
        )
        self._launch(plan.forward, arguments, [*arrays], [f_lav, workspace])
        self._launch(plan.reduce, arguments, [*arrays, workspace], [f_val])
        return f_lav, f_val

    def _launch(
        self, launch: Launch, arguments: Arguments, read: list[Array], written: list[Array]
    ) -> None:
        buffers = [*read, *written]
        count = len(buffers)
        failed = self._library.simt_launch(
            ctypes.cast(getattr(self._library, launch.kernel), ctypes.c_void_p),
            ctypes.byref(arguments),
            *launch.grid,
            launch.threads,
            ctypes.c_long(launch.shared_bytes),
            count,
            (ctypes.c_void_p * count)(*(each.ctypes.data for each in buffers)),
            (ctypes.c_long * count)(*(each.nbytes for each in buffers)),
            (ctypes.c_int * count)(*([0] * len(read) + [1] * len(written))),
        )
        if failed:
            problem = self._library.simt_problem().decode()
            raise BackendError(f"Kernel {launch.kernel} is wrong: {problem}.")


def host_compiler() -> str:
    """The C++ compiler: the one named by CXX, or g++ or c++ of the PATH.

    Raises:
        BuildError: there is none.
    """
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise BuildError(
            "No C++ compiler was found: neither g++ nor c++ is on the PATH. Install one, or name "
            "it with CXX=/path/to/g++."
        )
    return compiler


@lru_cache(maxsize=64)
def _compile(text: str) -> Path:
    compiler = host_compiler()
    name = hashlib.sha256(text.encode()).hexdigest()[:16]
    folder = Path(tempfile.mkdtemp(prefix="rt-ris-simt-"))
    source, library = folder / f"{name}.cu", folder / f"{name}.so"
    source.write_text(text)
    command = [compiler, *_FLAGS, f"-I{CSRC}", f'-DRT_RIS_SOURCE="{source}"']
    command += [str(CSRC / "simt_launch.cpp"), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{compiler} refused the kernel source:\n{done.stderr.strip()}")
    return library
