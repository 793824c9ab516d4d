"""Masks out of COCO segmentations: polygons, compressed and uncompressed run lengths.

pycocotools draws polygons and encodes, so that masks agree with COCO's to the pixel. Run lengths
are decoded here: its decoder reads damaged ones without complaint, and with NumPy 2 it warns at
every call (pycocotools 2.0.11).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from pycocotools import mask as coco_mask

from rt_ris.errors import DataError

BoolMask: TypeAlias = npt.NDArray[np.bool_]
Segmentation: TypeAlias = "Sequence[Sequence[float]] | Mapping[str, Any]"

_FARTHEST = 1.0e5
_MIN_COORDINATES = 6  # three points; pycocotools would take four numbers for a box


def decode_segmentation(segmentation: Segmentation, *, height: int, width: int) -> BoolMask:
    """Decode one annotation's segmentation, as COCO writes it.

    Several polygons of one annotation are united. (Summing them, as some readers do, gives 2 where
    they overlap, and a later `== 1` then cuts holes.) Polygons of fewer than three points are
    skipped.

    Args:
        segmentation: a list of flat polygons [x0, y0, x1, y1, ...] in pixels, or a run-length
            mapping with `size` [H, W] and `counts` (a string, bytes, or a list of ints).
        height: H of the image in pixels.
        width: W of the image in pixels.

    Returns:
        bool [H, W].

    Raises:
        DataError: if the run lengths do not fit the image or the form is unknown.
    """
    if isinstance(segmentation, Mapping):
        return _decode_rle(segmentation, height=height, width=width)
    polygons = [polygon for polygon in _polygons(segmentation) if len(polygon) >= _MIN_COORDINATES]
    united = np.zeros((height, width), dtype=np.bool_)
    if polygons:
        for rle in coco_mask.frPyObjects(polygons, height, width):
            united |= _decode_rle(rle, height=height, width=width)
    return united


def _polygons(segmentation: object) -> list[list[float]]:
    """Flat polygons of plain numbers; pycocotools would crash on what is far outside."""
    try:
        polygons = [list(map(float, polygon)) for polygon in segmentation]  # type: ignore[attr-defined]
    except (TypeError, ValueError) as error:
        raise DataError(
            f"A segmentation is neither a list of polygons nor a run-length mapping: {error}."
        ) from error
    if not all(abs(number) <= _FARTHEST for polygon in polygons for number in polygon):
        raise DataError(
            f"A polygon has a coordinate that is no number or beyond {_FARTHEST:.0f} pixels."
        )
    return polygons


def union_of(segmentations: Iterable[Segmentation], *, height: int, width: int) -> BoolMask:
    """Unite the masks of several annotations; none at all gives an empty mask. bool [H, W]."""
    united = np.zeros((height, width), dtype=np.bool_)
    for segmentation in segmentations:
        united |= decode_segmentation(segmentation, height=height, width=width)
    return united


def encode_mask(mask: BoolMask) -> dict[str, Any]:
    """Encode bool [H, W] as compressed run lengths that `json` can write."""
    rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": [int(n) for n in rle["size"]], "counts": rle["counts"].decode("ascii")}


def _decode_rle(rle: Mapping[str, Any], *, height: int, width: int) -> BoolMask:
    stated = rle.get("size")
    size = list(stated) if isinstance(stated, list | tuple) else [stated]
    if size != [height, width]:
        raise DataError(
            f"A run-length mask has size {size}; the image is {[height, width]} [H, W]. "
            "instances.json and the image list do not belong together."
        )
    counts = _read_counts(rle.get("counts"))
    if (counts < 0).any() or counts.sum() != height * width:
        raise DataError(
            f"A run-length mask counts {counts.sum()} pixels; the image has {height} x {width} = "
            f"{height * width}. The annotation is damaged."
        )
    zeros_and_ones = np.arange(len(counts)) % 2 == 1
    return np.repeat(zeros_and_ones, counts).reshape((height, width), order="F")


def _read_counts(counts: object) -> npt.NDArray[np.int64]:
    """Lengths of the alternating runs of zeros and ones, column by column, zeros first."""
    if isinstance(counts, str):
        counts = counts.encode("ascii", errors="replace")
    if isinstance(counts, bytes):
        return np.asarray(_unpack_counts(counts), dtype=np.int64)
    if isinstance(counts, list) and all(isinstance(n, int) for n in counts):
        return np.asarray(counts, dtype=np.int64)
    raise DataError(
        f"A run-length mask has counts of type {type(counts).__name__}; accepted are COCO's "
        "compressed string and a list of ints."
    )


def _unpack_counts(packed: bytes) -> list[int]:
    """Undo COCO's packing (maskApi.c, rleFrString).

    Each character, less 48, carries five bits, lowest first; bit 32 says that more follow, bit 16
    of the last one is the sign. From the fourth number on, the difference to the number two before
    is stored.
    """
    counts: list[int] = []
    value = shift = 0
    for character in packed:
        bits = character - 48
        if not 0 <= bits < 64:
            raise DataError(f"A run-length mask holds the character {chr(character)!r}.")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = shift = 0
    return counts
