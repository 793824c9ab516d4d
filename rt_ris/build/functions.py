"""An ONNX file without its model-local functions, on devices that have no onnx.

A node of ours carries its function for runtimes without our plugin. Where the plugin is wanted the
function has to go: TensorRT before 10.7 takes a function whatever is registered. The file is cut
along protocol buffers' own frames; what is kept is kept byte by byte.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rt_ris.errors import BundleError

FUNCTIONS: Final = 25
"""Number of the field ``functions`` in ONNX's ModelProto."""

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_FIXED: Final = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}


def without_functions(graph: bytes) -> bytes:
    """The file without its functions.

    Raises:
        BundleError: it is no protocol buffer.
    """
    view = memoryview(graph)
    kept = [view[start:end] for field, start, end in _fields(graph) if field != FUNCTIONS]
    return b"".join(kept)


def _fields(raw: bytes) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of each field of the outermost message."""
    at = 0
    while at < len(raw):
        start = at
        key, at = _varint(raw, at)
        field, kind = key >> 3, key & 7
        if kind == _VARINT:
            _, at = _varint(raw, at)
        elif kind == _LENGTH:
            length, at = _varint(raw, at)
            at += length
        elif kind in _FIXED:
            at += _FIXED[kind]
        else:
            raise _broken()
        if at > len(raw) or not field:
            raise _broken()
        yield field, start, at


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where the next thing begins."""
    value = 0
    for shift in range(0, 64, 7):
        if at >= len(raw):
            break
        byte = raw[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise _broken()


def _broken() -> BundleError:
    return BundleError("A graph of the bundle is no ONNX file. Export the bundle again.")
