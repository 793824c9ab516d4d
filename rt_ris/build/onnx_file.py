"""What has to be known of ONNX files on devices without onnx, by protocol buffers' own frames."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from rt_ris.errors import BundleError

GRAPH: Final = 7
FUNCTIONS: Final = 25
"""Numbers of fields in ONNX's ModelProto."""
NODE: Final = 1
"""Number of a field in its GraphProto."""

_VARINT, _EIGHT_BYTES, _LENGTH, _FOUR_BYTES = 0, 1, 2, 5
_FIXED: Final = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}


def without_functions(graph: bytes) -> bytes:
    """The file without its functions; what is kept is kept byte by byte.

    A node of ours carries its function for runtimes without our plugin. Where the plugin is wanted
    the function has to go: TensorRT before 10.7 takes a function whatever is registered.

    Raises:
        BundleError: it is no protocol buffer.
    """
    view = memoryview(graph)
    kept = [part.whole(view) for part in _fields(view) if part.field != FUNCTIONS]
    return b"".join(kept)


def node_count(graph: bytes) -> int:
    """Number of nodes, a function's not counted.

    Raises:
        BundleError: it is no protocol buffer.
    """
    view = memoryview(graph)
    inner = (part.content(view) for part in _fields(view) if part.field == GRAPH)
    return sum(part.field == NODE for content in inner for part in _fields(content))


class _Part(NamedTuple):
    """One field of a message: its number, where it starts, where its content does, its end."""

    field: int
    start: int
    inside: int
    end: int

    def whole(self, view: memoryview) -> memoryview:
        return view[self.start : self.end]

    def content(self, view: memoryview) -> memoryview:
        return view[self.inside : self.end]


def _fields(raw: memoryview) -> Iterator[_Part]:
    """The fields of a message, those inside others not entered."""
    at = 0
    while at < len(raw):
        start = at
        key, at = _varint(raw, at)
        field, kind, inside = key >> 3, key & 7, at
        if kind == _VARINT:
            _, at = _varint(raw, at)
        elif kind == _LENGTH:
            length, inside = _varint(raw, at)
            at = inside + length
        elif kind in _FIXED:
            at += _FIXED[kind]
        else:
            raise _broken()
        if at > len(raw) or not field:
            raise _broken()
        yield _Part(field, start, inside, at)


def _varint(raw: memoryview, at: int) -> tuple[int, int]:
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
