"""Pictures with masks drawn on them, for people to look at."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from rt_ris.errors import ShapeError
from rt_ris.image import Pixels


def overlay(
    image: Pixels,
    binary: npt.NDArray[np.bool_],
    *,
    colour: tuple[int, int, int] = (64, 255, 0),
    opacity: float = 0.45,
) -> Pixels:
    """Tint the pixels of a mask and draw its outline.

    Args:
        image: uint8 [H, W, 3].
        binary: bool [H, W].
        colour: RGB, 0..255.
        opacity: 0..1 of the tint; the outline is opaque.

    Returns:
        A new uint8 [H, W, 3].

    Raises:
        ShapeError: picture and mask differ in size.
    """
    if image.shape[:2] != binary.shape:
        raise ShapeError(
            f"The picture is {list(image.shape[:2])} and the mask {list(binary.shape)}; overlay() "
            "takes both at the same size."
        )
    tint = np.array(colour, dtype=np.float32)
    drawn: Pixels = image.copy()
    mixed = image[binary].astype(np.float32) * (1 - opacity) + tint * opacity
    drawn[binary] = np.round(mixed).astype(np.uint8)
    drawn[_outline(binary, width=max(1, max(binary.shape) // 400))] = tint.astype(np.uint8)
    return drawn


def _outline(binary: npt.NDArray[np.bool_], *, width: int) -> npt.NDArray[np.bool_]:
    """The mask's pixels within ``width`` steps of a pixel outside it."""
    inner = binary
    for _ in range(width):
        padded = np.pad(inner, 1)
        vertical = padded[:-2, 1:-1] & padded[2:, 1:-1]
        inner = inner & vertical & padded[1:-1, :-2] & padded[1:-1, 2:]
    return binary & ~inner
