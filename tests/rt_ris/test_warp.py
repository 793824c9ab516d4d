"""The warp against stored results of OpenCV 4.12 (``tests/fixtures/make_opencv_vectors.py``)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rt_ris.image import Box, prepare
from rt_ris.mask import Placement, place
from rt_ris.spec import ImageSpec
from rt_ris.warp import Taps, affine, bicubic_corners, bilinear

VECTORS = np.load(Path(__file__).parents[1] / "fixtures" / "opencv.npz")
SIDE = 48
CASES = sorted({int(name.split(".")[0]) for name in VECTORS})
SPEC = ImageSpec(
    size=SIDE,
    fit="warp",
    resample="bicubic",
    fill=(123, 117, 104),
    mean=(0.0, 0.0, 0.0),
    std=(1.0, 1.0, 1.0),
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kind", ["noise", "smooth"])
def test_a_picture_is_warped_as_opencv_does(case: int, kind: str) -> None:
    prepared = prepare(VECTORS[f"{case}.{kind}"], SPEC)
    off = np.abs(prepared.pixels[0].astype(int) - VECTORS[f"{case}.{kind}.warped"].astype(int))
    assert off.max() <= 1
    assert (off > 0).mean() < 0.005
    assert prepared.box == Box(0, 0, SIDE, SIDE)


@pytest.mark.parametrize("case", CASES)
def test_the_way_back_is_opencvs(case: int) -> None:
    picture, grid = VECTORS[f"{case}.noise"], VECTORS[f"{case}.grid"]
    placement = Placement.of(prepare(picture, SPEC))
    back = place(grid, placement, upsample="bicubic_corners")  # 48 to 48: nothing to do
    np.testing.assert_allclose(back, VECTORS[f"{case}.grid.back"], atol=2e-6)


@pytest.mark.parametrize("make", [bilinear, bicubic_corners])
def test_constants_stay_what_they_are(make: Callable[[int, int], Taps]) -> None:
    for before, after in ((5, 17), (17, 5), (1, 4), (4, 1)):
        np.testing.assert_allclose(make(before, after).apply(np.full(before, 3.0)), 3.0)


def test_corners_are_kept_where_they_are_aligned() -> None:
    values = np.array([1.0, 5.0, -2.0, 7.0])
    for taps in (bilinear(4, 10, corners=True), bicubic_corners(4, 10)):
        resized = taps.apply(values)
        np.testing.assert_allclose(resized[[0, -1]], values[[0, -1]], atol=1e-12)
        np.testing.assert_allclose(resized[[3, 6]], values[[1, 2]], atol=1e-12)


def test_what_lies_outside_weighs_nothing() -> None:
    taps = affine(4, 20, scale=1.0, offset=-8.0, rows=True)
    assert (taps.apply(np.ones(4))[[0, 5, 14, 19]] == 0).all()
    np.testing.assert_array_equal(taps.apply(np.arange(4.0))[8:12], np.arange(4.0))
