"""The one parameter of the kernels: a structure of pointers and numbers, as C lays it out."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence

from rt_ris_kernels.geometry import Geometry
from rt_ris_kernels.ops.masked_mutual_attention import logit


class Arguments(ctypes.Structure):
    """``struct Arguments`` of ``csrc/masked_mutual_attention.cu``, field by field."""

    _fields_ = (
        ("z_v", ctypes.c_void_p),
        ("z_l", ctypes.c_void_p),
        ("word_mask", ctypes.c_void_p),
        ("gamma_v", ctypes.c_void_p),
        ("beta_v", ctypes.c_void_p),
        ("gamma_l", ctypes.c_void_p),
        ("beta_l", ctypes.c_void_p),
        ("f_lav", ctypes.c_void_p),
        ("f_val", ctypes.c_void_p),
        ("sums", ctypes.c_void_p),
        ("masses", ctypes.c_void_p),
        ("z_v_step", ctypes.c_longlong),
        ("pixels", ctypes.c_int),
        ("words", ctypes.c_int),
        ("splits", ctypes.c_int),
        ("tiles_per_block", ctypes.c_int),
        ("longer_blocks", ctypes.c_int),
        ("threshold", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("epsilon", ctypes.c_float),
        ("normalize", ctypes.c_int),
    )


def fill(
    pointers: Sequence[int],
    *,
    workspace: int,
    plan: Geometry,
    shared: bool,
    pixels: int,
    words: int,
    attributes: Mapping[str, float | int],
) -> Arguments:
    """The structure for one call.

    Args:
        pointers: the operator's inputs, then its outputs, in operator order.
        workspace: address of ``plan.workspace_bytes`` bytes.
        plan: the call's geometry.
        shared: whether all expressions share one z_v.
        pixels: P.
        words: L.
        attributes: all of the operator's attributes.
    """
    expressions = plan.forward.grid[1]
    masses = plan.workspace_bytes // 4 - expressions * plan.splits * words
    channels = masses // (expressions * plan.splits * words)
    return Arguments(
        *pointers,
        workspace,
        workspace + 4 * masses,
        0 if shared else pixels * channels,
        pixels,
        words,
        plan.splits,
        plan.tiles // plan.splits,
        plan.tiles % plan.splits,
        logit(float(attributes["threshold"])),
        attributes["scale"],
        attributes["epsilon"],
        int(attributes["normalize"]),
    )
