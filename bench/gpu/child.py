"""A few calls of the kernels without PyTorch, for compute-sanitizer and ncu to look at.

compute-sanitizer --tool racecheck python bench/gpu/child.py
"""

from __future__ import annotations

import sys

import numpy as np
from cases import Case, draw

from rt_ris_kernels.launch import MaskedMutualAttentionLauncher

SMALL = (
    Case(pixels=301, words=25, expressions=2),
    Case(pixels=290, words=80, expressions=2, shared=False, normalize=1),
    Case(pixels=65, words=17, channels=128, normalize=1),
    Case(pixels=10007, words=5, channels=128, expressions=3),
    Case(dtype="float32", pixels=101, words=33, normalize=1),
    Case(dtype="float32", pixels=70, words=9, channels=128, expressions=2),
)
TIMED = (Case(), Case(expressions=16))


class Memory:
    """Device memory that describes itself as other libraries' arrays do."""

    def __init__(self, values: np.ndarray) -> None:
        from cuda.bindings import driver

        self._driver = driver
        self.values = values
        status, self.pointer = driver.cuMemAlloc(max(values.nbytes, 16))
        assert status == driver.CUresult.CUDA_SUCCESS, status
        self._done(driver.cuMemcpyHtoD(self.pointer, values.ctypes.data, values.nbytes))

    @property
    def __cuda_array_interface__(self) -> dict[str, object]:
        return {
            "shape": self.values.shape,
            "typestr": self.values.dtype.str,
            "data": (int(self.pointer), False),
            "version": 3,
        }

    def read(self) -> np.ndarray:
        """Its contents now."""
        self._done(
            self._driver.cuMemcpyDtoH(self.values.ctypes.data, self.pointer, self.values.nbytes)
        )
        return self.values

    def _done(self, result: tuple[object, ...]) -> None:
        assert result[0] == self._driver.CUresult.CUDA_SUCCESS, result


def call(launcher: MaskedMutualAttentionLauncher, case: Case) -> list[np.ndarray]:
    """One checked call; outputs and workspace are poisoned."""
    arrays, _ = draw(case)
    plan = launcher.geometry(**case.sizes)
    shapes = [(case.expressions, case.pixels, case.channels), arrays[1].shape]
    outputs = [Memory(np.full(shape, np.nan, case.dtype)) for shape in shapes]
    workspace = Memory(np.full(plan.workspace_bytes // 4, np.nan, np.float32))
    inputs = [Memory(array) for array in arrays]
    launcher.launch(inputs, outputs, workspace=workspace, stream=0, attributes=case.attributes)
    return [output.read() for output in outputs]


def main() -> int:
    from cuda.bindings import driver

    driver.cuInit(0)
    driver.cuCtxSetCurrent(driver.cuDevicePrimaryCtxRetain(0)[1])
    launcher = MaskedMutualAttentionLauncher()
    for case in TIMED if "--timed" in sys.argv else SMALL:
        assert all(np.isfinite(output).all() for output in call(launcher, case)), case.name
    return 0


if __name__ == "__main__":
    sys.exit(main())
