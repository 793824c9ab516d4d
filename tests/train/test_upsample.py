"""The runtime's resizing of logits against PyTorch's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional

from rt_ris.image import Box
from rt_ris.mask import Placement, place
from rt_ris.spec import Upsample

MODES: dict[Upsample, tuple[str, bool]] = {
    "bilinear": ("bilinear", False),
    "bilinear_corners": ("bilinear", True),
    "bicubic_corners": ("bicubic", True),
}


@pytest.mark.parametrize("upsample", MODES)
@pytest.mark.parametrize(("cells", "side"), [(26, 104), (15, 480), (7, 23), (12, 12)])
def test_the_input_is_reached_as_in_pytorch(upsample: Upsample, cells: int, side: int) -> None:
    grid = np.random.default_rng(cells).normal(size=(cells, cells)).astype(np.float32)
    mode, corners = MODES[upsample]
    truth = functional.interpolate(
        torch.from_numpy(grid)[None, None], size=(side, side), mode=mode, align_corners=corners
    )[0, 0]
    ours = place(grid, Placement.on_input(side), upsample=upsample)
    np.testing.assert_allclose(ours, truth.numpy(), atol=2e-5)


@pytest.mark.parametrize("upsample", MODES)
def test_the_picture_is_cut_out_and_resized_bilinearly(upsample: Upsample) -> None:
    grid = np.random.default_rng(1).normal(size=(16, 16)).astype(np.float32)
    mode, corners = MODES[upsample]
    on_input = functional.interpolate(
        torch.from_numpy(grid)[None, None], size=(64, 64), mode=mode, align_corners=corners
    )
    truth = functional.interpolate(on_input[..., 8:56, :], size=(90, 120), mode="bilinear")[0, 0]
    placement = Placement(side=64, box=Box(8, 0, 56, 64), size=(90, 120))
    np.testing.assert_allclose(place(grid, placement, upsample=upsample), truth.numpy(), atol=2e-5)
