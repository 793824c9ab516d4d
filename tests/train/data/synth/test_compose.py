"""How objects and shadows are painted."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from rt_ris_train.data.synth import compose


def placed(*, left: int, top: int, height: int, width: int, lies: bool) -> compose._Placed:
    """An object that only its alpha and its way to stand matter of."""
    role = SimpleNamespace(sprite=SimpleNamespace(may_lie=lies))
    rgba = np.full((height, width, 4), 255, dtype=np.uint8)
    return compose._Placed(role=cast(Any, role), rgba=rgba, left=left, top=top)


@pytest.mark.parametrize("lies", [True, False])
@pytest.mark.parametrize("left", [-500, -20, 30, 90, 600])
@pytest.mark.parametrize("top", [-700, -50, 20, 95, 700])
def test_a_shadow_may_fall_beside_the_picture(left: int, top: int, lies: bool) -> None:
    canvas = np.full((100, 120, 3), 200, dtype=np.float32)
    item = placed(left=left, top=top, height=150, width=40, lies=lies)
    compose._paint_shadow(canvas, item, slant=0.1, darkness=0.4)
    assert np.isfinite(canvas).all()
    assert (canvas.min() < 200) == (abs(left) < 500 and -100 < top < 100 and (top < 0 or lies))


def test_what_lies_beside_the_picture_covers_nothing_of_it() -> None:
    for left, top in ((-50, 0), (0, -50), (200, 0), (0, 200)):
        item = placed(left=left, top=top, height=40, width=40, lies=True)
        window, part = compose._clip(item, 120, 100)
        assert np.zeros((100, 120))[window].size == 0
        assert np.zeros((40, 40))[part].shape == np.zeros((100, 120))[window].shape
