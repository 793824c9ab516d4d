"""What every image stage begins with: normalisation inside the graph, and where the picture is."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rt_ris.spec import ImageSpec


class Normalise(nn.Module):
    """uint8 pixels to a normalised float image whose padding is exactly zero.

    The padding is zero *after* normalisation, as the encoders were trained; a graph that takes
    raw bytes must therefore know which part shows the picture.
    """

    mean: Tensor
    std: Tensor
    index: Tensor

    def __init__(self, image: ImageSpec) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(image.mean), persistent=False)
        self.register_buffer("std", torch.tensor(image.std), persistent=False)
        self.register_buffer("index", torch.arange(image.size), persistent=False)

    def forward(self, pixels: Tensor, valid_box: Tensor) -> Tensor:
        """uint8 [B, S, S, 3] and int32 [B, 4] to float32 [B, 3, S, S]."""
        normal = (pixels.to(torch.float32) - self.mean) / self.std
        top, left, bottom, right = valid_box[:, :, None].unbind(1)
        rows = (self.index >= top) & (self.index < bottom)
        columns = (self.index >= left) & (self.index < right)
        valid = (rows[:, :, None] & columns[:, None, :]).to(normal.dtype)
        return (normal * valid[..., None]).permute(0, 3, 1, 2)


class Coordinates(nn.Module):
    """Where each feature cell lies in the picture, so that words such as "left" have a meaning.

    Three planes per cell: column and row in -1..1 across the picture (beyond 1 in the padding)
    and 1 inside the picture, 0 in the padding.
    """

    centre: Tensor

    def __init__(self, *, size: int, cells: int) -> None:
        super().__init__()
        centre = (torch.arange(cells) + 0.5) * (size / cells)
        self.register_buffer("centre", centre, persistent=False)
        self.cells = cells

    def forward(self, valid_box: Tensor) -> Tensor:
        """int32 [B, 4] to float32 [B, P, 3]."""
        top, left, bottom, right = valid_box.to(torch.float32)[:, :, None].unbind(1)
        y = (self.centre - top) / (bottom - top) * 2 - 1
        x = (self.centre - left) / (right - left) * 2 - 1
        inside = ((y.abs() <= 1)[:, :, None] & (x.abs() <= 1)[:, None, :]).to(torch.float32)
        grid = (-1, self.cells, self.cells)
        planes = (x[:, None, :].expand(grid), y[:, :, None].expand(grid), inside)
        return torch.stack(planes, dim=-1).flatten(1, 2)
