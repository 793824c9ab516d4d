"""The kernels, one file each, and the table that names them."""

from __future__ import annotations

from rt_ris_kernels.kernel import KernelSpec
from rt_ris_kernels.ops.masked_mutual_attention import MASKED_MUTUAL_ATTENTION

KERNELS: tuple[KernelSpec, ...] = (MASKED_MUTUAL_ATTENTION,)


def find(domain: str, op_type: str) -> KernelSpec | None:
    """The kernel behind an ONNX node, or None if there is none of that name."""
    for kernel in KERNELS:
        if (kernel.domain, kernel.op_type) == (domain, op_type):
            return kernel
    return None
