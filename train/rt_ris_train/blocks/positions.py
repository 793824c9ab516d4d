"""Fixed two-dimensional sine positions (Carion et al., DETR, arXiv 2005.12872, section A.4)."""

from __future__ import annotations

import torch
from torch import Tensor


def sine_positions(*, cells: int, width: int, temperature: float = 10000.0) -> Tensor:
    """float32 [P, C]: the first half of the channels encodes the row, the second the column.

    Positions run from 0 to 2 pi over the grid; sines and cosines alternate.
    """
    half = width // 2
    scale = 2 * torch.pi / cells
    place = (torch.arange(cells, dtype=torch.float32) + 0.5) * scale
    period = temperature ** (2 * torch.div(torch.arange(half), 2, rounding_mode="floor") / half)
    angle = place[:, None] / period
    wave = torch.stack((angle[:, 0::2].sin(), angle[:, 1::2].cos()), dim=-1).flatten(1)
    rows = wave[:, None, :].expand(cells, cells, half)
    columns = wave[None, :, :].expand(cells, cells, half)
    return torch.cat((rows, columns), dim=-1).reshape(cells * cells, width)
