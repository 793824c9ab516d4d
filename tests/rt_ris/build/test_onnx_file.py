"""ONNX files are read along the frames of protocol buffers."""

from __future__ import annotations

from pathlib import Path

import pytest

from rt_ris.build.onnx_file import node_count, without_functions
from rt_ris.errors import BundleError


def frame(field: int, content: bytes) -> bytes:
    """A field of a length below 128."""
    key = field << 3 | 2
    head = bytes([key]) if key < 128 else bytes([key & 0x7F | 0x80, key >> 7])
    return head + bytes([len(content)]) + content


KEPT = b"\x08\x0a" + frame(7, b"graph") + b"\x11" + bytes(8) + b"\x1d" + bytes(4)


def test_everything_else_stays_byte_by_byte() -> None:
    functions = frame(25, b"one"), frame(25, b"")
    assert without_functions(functions[0] + KEPT + functions[1] + frame(8, b"opset")) == (
        KEPT + frame(8, b"opset")
    )
    assert without_functions(KEPT) == KEPT


@pytest.mark.parametrize("cut", [1, 3, 8, 15])
def test_what_is_cut_short_is_refused(cut: int) -> None:
    with pytest.raises(BundleError, match="no ONNX file"):
        without_functions(KEPT[:-cut] if cut != 8 else b"\x0b" + KEPT)


def test_a_graph_of_the_exporter(tiny: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    model = onnx.load(tiny / "fusion.onnx")
    before = model.SerializeToString(deterministic=True)
    assert node_count(before) == len(model.graph.node) > 1
    node = helper.make_node("Identity", ["x"], ["y"])
    opset = [helper.make_opsetid("", 20)]
    model.functions.append(helper.make_function("own", "f", ["x"], ["y"], [node], opset))
    assert onnx.load_from_string(without_functions(model.SerializeToString())) == (
        onnx.load_from_string(before)
    )
