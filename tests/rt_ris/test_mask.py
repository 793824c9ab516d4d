from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rt_ris.cli.overlay import overlay
from rt_ris.errors import ShapeError
from rt_ris.image import fit_box
from rt_ris.mask import Mask, Placement, logit, place, sigmoid
from rt_ris.spec import Fit, ImageSpec, Interpolate, MaskSpec

SIZES = [(1, 1), (48, 64), (3, 20_000), (20_000, 3), (97, 31)]
FITS: tuple[Fit, ...] = ("longest_side", "letterbox", "stretch")


def placement(size: tuple[int, int], *, side: int = 64, fit: Fit = "letterbox") -> Placement:
    spec = ImageSpec(size=side, fit=fit, mean=(0, 0, 0), std=(1, 1, 1))
    return Placement(side=side, box=fit_box(*size, spec), size=size)


def mask(
    logits: npt.NDArray[np.float32],
    *,
    existence: float | None = None,
    interpolate: Interpolate = "logits",
    threshold: float = 0.5,
    size: tuple[int, int] = (48, 64),
) -> Mask:
    return Mask(
        sentence="a thing",
        logits=logits,
        existence=existence,
        truncated_after=None,
        placement=placement(size),
        spec=MaskSpec(
            size=len(logits),
            interpolate=interpolate,
            threshold=threshold,
            existence_threshold=None if existence is None else 0.5,
        ),
    )


def grid(seed: int = 0, cells: int = 16) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 3, (cells, cells)).astype(np.float32)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize(("cells", "side"), [(16, 64), (13, 64), (64, 64), (1, 8)])
def test_one_matrix_equals_two_resizes_of_torch(
    size: tuple[int, int], fit: Fit, cells: int, side: int
) -> None:
    torch = pytest.importorskip("torch")
    lies, logits = placement(size, side=side, fit=fit), grid(cells=cells)
    box = lies.box

    def resize(tensor: object, to: tuple[int, int]) -> object:
        return torch.nn.functional.interpolate(
            tensor, size=to, mode="bilinear", align_corners=False
        )

    full = resize(torch.from_numpy(logits)[None, None].double(), (side, side))
    cropped = full[..., box.top : box.bottom, box.left : box.right]  # type: ignore[index]
    expected = resize(cropped, size)[0, 0].numpy()  # type: ignore[index]
    assert np.abs(place(logits, lies) - expected).max() < 1e-5


@given(st.sampled_from(SIZES), st.sampled_from(FITS), st.floats(-8, 8))
def test_a_constant_stays_constant(size: tuple[int, int], fit: Fit, value: float) -> None:
    placed = place(np.full((16, 16), value, dtype=np.float32), placement(size, fit=fit))
    assert placed.shape == size
    assert placed.dtype == np.float32
    assert np.allclose(placed, value, atol=1e-5)


def test_placing_is_linear_and_stays_in_range() -> None:
    one, two, lies = grid(1), grid(2), placement((48, 64))
    total = place(one + two, lies)
    assert np.allclose(total, place(one, lies) + place(two, lies), atol=1e-4)
    assert one.min() - 1e-5 <= place(one, lies).min() <= place(one, lies).max() <= one.max() + 1e-5


def test_sigmoid_does_not_overflow() -> None:
    extreme = np.array([-1e30, -100, 0, 100, 1e30], dtype=np.float32)
    assert sigmoid(extreme).tolist() == [0, 0, 0.5, 1, 1]


@pytest.mark.parametrize("interpolate", ["logits", "probabilities"])
@pytest.mark.parametrize("threshold", [0.35, 0.5, 0.8])
def test_binary_is_probability_above_the_threshold(
    interpolate: Interpolate, threshold: float
) -> None:
    found = mask(grid(), interpolate=interpolate, threshold=threshold)
    clear = np.abs(found.probability - threshold) > 1e-5
    assert np.array_equal(found.binary[clear], (found.probability > threshold)[clear])
    assert found.binary.dtype == np.bool_
    assert found.binary.shape == found.probability.shape == found.size == (48, 64)
    assert logit(threshold) == pytest.approx(np.log(threshold / (1 - threshold)))


def test_score_and_box_of_a_mask() -> None:
    logits = np.full((16, 16), -9, dtype=np.float32)
    logits[6:9, 4:8] = 9
    found = mask(logits)
    assert found.score == pytest.approx(found.probability[found.binary].mean())
    box = found.box
    assert box is not None
    inside = found.binary[box.top : box.bottom, box.left : box.right]
    assert inside.sum() == found.binary.sum()
    assert inside[0].any()
    assert inside[-1].any()
    assert inside[:, 0].any()
    assert inside[:, -1].any()


def test_nothing_found() -> None:
    found = mask(np.full((16, 16), -9, dtype=np.float32))
    assert found.exists
    assert (found.score, found.box) == (0.0, None)


def test_what_does_not_exist_has_an_empty_mask() -> None:
    absent = mask(np.full((16, 16), 9, dtype=np.float32), existence=0.49)
    assert not absent.exists
    assert not absent.binary.any()
    assert (absent.score, absent.box) == (0.0, None)
    assert absent.probability.min() > 0.9
    present = mask(np.full((16, 16), 9, dtype=np.float32), existence=0.5)
    assert present.exists
    assert present.binary.all()


def test_pixels_are_computed_once() -> None:
    found = mask(grid())
    assert found.probability is found.probability
    assert found.binary is found.binary


def test_logits_of_several_sentences_are_refused() -> None:
    with pytest.raises(ShapeError, match="one sentence"):
        mask(np.zeros((2, 16, 16), dtype=np.float32))


def test_overlay_tints_inside_only_and_outlines() -> None:
    image = np.full((40, 50, 3), 100, dtype=np.uint8)
    binary = np.zeros((40, 50), dtype=np.bool_)
    binary[10:30, 10:40] = True
    drawn = overlay(image, binary, colour=(200, 0, 0), opacity=0.5)
    assert (drawn[~binary] == 100).all()
    assert drawn[20, 20].tolist() == [150, 50, 50]
    assert drawn[10, 10].tolist() == [200, 0, 0]
    assert (image == 100).all()
    with pytest.raises(ShapeError, match="same size"):
        overlay(image, binary[:-1])
