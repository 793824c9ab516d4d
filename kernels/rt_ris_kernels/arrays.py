"""Arrays that lie in GPU memory, whoever made them.

torch tensors, CuPy arrays and pycuda's GPUArrays describe themselves by
``__cuda_array_interface__`` or DLPack; nothing is copied and none of those is imported here.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

from rt_ris.errors import ShapeError

_CAI_DTYPES = {"<f2": "float16", "<f4": "float32", "<f8": "float64"}
_DLPACK_KINDS = {0: "int", 1: "uint", 2: "float", 4: "bfloat", 5: "complex", 6: "bool"}
_DLPACK_CUDA = 2
_BYTES = {"float16": 2, "float32": 4}


@dataclass(frozen=True, kw_only=True)
class DeviceArray:
    """A contiguous array in GPU memory; the caller keeps its owner alive.

    Attributes:
        pointer: address on the device.
        shape: sizes, C order.
        dtype: numpy's name of the type.
    """

    pointer: int
    shape: tuple[int, ...]
    dtype: str

    @property
    def nbytes(self) -> int:
        """Size in bytes; types that no kernel takes count as zero."""
        total = _BYTES.get(self.dtype, 0)
        for size in self.shape:
            total *= size
        return total


def device_array(source: object, *, name: str, writable: bool = False) -> DeviceArray:
    """Reads where an array lies.

    Args:
        source: offers ``__cuda_array_interface__`` or ``__dlpack__``.
        name: for messages.
        writable: whether a kernel will write to it.

    Raises:
        ShapeError: not an array in GPU memory, not contiguous, or read-only where it is written.
    """
    if isinstance(source, DeviceArray):
        return source
    interface = _interface(source)
    if interface is not None:
        return _from_interface(interface, name=name, writable=writable)
    if hasattr(source, "__dlpack__"):
        return _from_dlpack(source, name=name)
    raise ShapeError(
        f"'{name}' is {type(source).__name__}; an array in GPU memory is needed, with "
        "__cuda_array_interface__ or __dlpack__ (torch, CuPy, pycuda, Numba)."
    )


def _interface(source: object) -> dict[str, Any] | None:
    try:
        found = getattr(source, "__cuda_array_interface__", None)
    except (TypeError, RuntimeError):  # torch: on the CPU, or it requires a gradient
        return None
    return found if isinstance(found, dict) else None


def _from_interface(interface: dict[str, Any], *, name: str, writable: bool) -> DeviceArray:
    shape = tuple(int(size) for size in interface["shape"])
    dtype = _CAI_DTYPES.get(interface["typestr"], str(interface["typestr"]))
    pointer, read_only = interface["data"]
    if writable and read_only:
        raise ShapeError(f"'{name}' is read-only; the kernel writes to it.")
    strides = interface.get("strides")
    if strides is not None:
        itemsize = int(interface["typestr"][2:])
        if any(step % itemsize for step in strides):
            raise ShapeError(_not_contiguous(name, shape, tuple(strides)))
        _check_strides(name, shape, tuple(step // itemsize for step in strides))
    return DeviceArray(pointer=int(pointer or 0), shape=shape, dtype=dtype)


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("index", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    """``DLTensor`` of dlpack.h, also the start of an unversioned managed tensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


def _from_dlpack(source: Any, *, name: str) -> DeviceArray:
    kind, _ = source.__dlpack_device__()
    if int(kind) != _DLPACK_CUDA:
        raise ShapeError(
            f"'{name}' lies in memory of kind {int(kind)} (DLPack); the kernels read GPU memory "
            f"({_DLPACK_CUDA}). Copy it to the GPU first."
        )
    capsule = source.__dlpack__()
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    tensor = ctypes.cast(get(capsule, b"dltensor"), ctypes.POINTER(_Tensor)).contents
    shape = tuple(int(tensor.shape[axis]) for axis in range(tensor.ndim))
    if tensor.strides:
        _check_strides(name, shape, tuple(int(tensor.strides[i]) for i in range(tensor.ndim)))
    dtype = f"{_DLPACK_KINDS.get(tensor.dtype.code, '?')}{tensor.dtype.bits}"
    pointer = int(tensor.data or 0) + int(tensor.byte_offset)
    return DeviceArray(pointer=pointer, shape=shape, dtype=dtype)


def _check_strides(name: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> None:
    expected = 1
    for size, step in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and step != expected:
            raise ShapeError(_not_contiguous(name, shape, strides))
        expected *= size


def _not_contiguous(name: str, shape: tuple[int, ...], strides: tuple[int, ...]) -> str:
    return (
        f"'{name}' has shape {list(shape)} with strides {list(strides)}; the kernels read "
        "contiguous arrays (C order). Make a contiguous copy."
    )
