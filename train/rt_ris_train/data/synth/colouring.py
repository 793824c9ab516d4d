"""Changes of an object's colour that leave its shading as it is."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from PIL import Image

# Hue of Pillow's HSV (0-255), factor on saturation, exponent on value. Yellow, orange and pink
# are only seen as such when they are bright; a dark yellow is olive and a dark orange brown.
_PAINTS: dict[str, tuple[int, float, float]] = {
    "red": (0, 1.15, 0.9),
    "orange": (18, 1.2, 0.6),
    "yellow": (37, 1.15, 0.45),
    "green": (85, 1.0, 0.9),
    "blue": (155, 1.05, 0.9),
    "purple": (197, 0.9, 0.85),
    "pink": (233, 0.55, 0.45),
}
PAINTS: tuple[str, ...] = tuple(_PAINTS)
_GREY_BELOW = 50  # saturation under which a pixel keeps its colour: chrome, tyres, highlights
_TINT_SATURATION = 190


def repaint(rgba: npt.NDArray[np.uint8], colour: str, *, tint: bool) -> npt.NDArray[np.uint8]:
    """Give the coloured parts of an object another hue; with `tint`, colour its grey parts.

    Args:
        rgba: uint8 [H, W, 4], alpha not multiplied in.
        colour: one of `PAINTS`.
        tint: for objects that are white or grey all over.

    Returns:
        uint8 [H, W, 4], a new array.
    """
    hue, saturation_factor, value_exponent = _PAINTS[colour]
    hsv = np.array(Image.fromarray(rgba[..., :3]).convert("HSV"))
    chosen = hsv[..., 2] > 0 if tint else hsv[..., 1] >= _GREY_BELOW
    saturation = hsv[..., 1].astype(np.float32)
    if tint:
        saturation[:] = _TINT_SATURATION
    else:
        saturation = np.maximum(saturation, 110)
    value = 255 * (hsv[..., 2].astype(np.float32) / 255) ** value_exponent
    painted = np.stack(
        [np.full_like(value, hue), np.minimum(saturation * saturation_factor, 255), value], axis=-1
    )
    hsv[chosen] = painted[chosen].astype(np.uint8)
    rgb = np.asarray(Image.fromarray(hsv, "HSV").convert("RGB"))
    return np.dstack([rgb, rgba[..., 3]])
