"""Feature Enhancement of MARIS (arXiv 2311.15727 v1, section 3.1, equations 1 and 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional


class PixelMlp(nn.Module):
    """Linear, GELU, Linear on every pixel, with an optional LayerNorm before."""

    def __init__(self, *, inputs: int, width: int, normed: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(inputs) if normed else nn.Identity()
        self.first = nn.Linear(inputs, width)
        self.second = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """[B, h, w, C'] to [B, h, w, C]."""
        hidden = functional.gelu(self.first(self.norm(features)))
        mapped: Tensor = self.second(hidden)
        return mapped


class ConvBlock(nn.Module):
    """Conv3x3 without bias, BatchNorm, GELU."""

    def __init__(self, *, inputs: int, outputs: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, features: Tensor) -> Tensor:
        """[B, C', h, w] to [B, C, h, w]."""
        return functional.gelu(self.norm(self.conv(features)))


class FeatureEnhancement(nn.Module):
    """Three taps of an image encoder, shallow to deep, to one map on a common grid."""

    def __init__(self, *, taps: Sequence[int], width: int, cells: int, tap_norm: bool) -> None:
        super().__init__()
        self.cells = cells
        self.mlps = nn.ModuleList(
            PixelMlp(inputs=channels, width=width, normed=tap_norm) for channels in taps
        )
        self.mlp_mixed = PixelMlp(inputs=width, width=width, normed=False)
        self.mix_shallow = ConvBlock(inputs=2 * width, outputs=width)
        self.mix_deep = ConvBlock(inputs=2 * width, outputs=width)

    def forward(self, taps: Sequence[Tensor]) -> Tensor:
        """Three maps [B, h_i, w_i, C_i] to F_v [B, P, C]."""
        shallow, middle, deep = (
            self._on_grid(mlp(tap)) for mlp, tap in zip(self.mlps, taps, strict=True)
        )
        mixed = self.mix_shallow(torch.cat((shallow, middle), dim=1))
        mixed = self.mlp_mixed(mixed.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        found: Tensor = self.mix_deep(torch.cat((mixed, deep), dim=1))
        return found.flatten(2).transpose(1, 2)

    def _on_grid(self, features: Tensor) -> Tensor:
        """[B, h_i, w_i, C] to [B, C, h, w]: larger maps are averaged, smaller ones interpolated."""
        channels_first = features.permute(0, 3, 1, 2)
        side = features.shape[1]
        if side > self.cells:
            return functional.avg_pool2d(channels_first, side // self.cells)
        if side < self.cells:
            factor = self.cells // side
            return functional.interpolate(channels_first, scale_factor=factor, mode="bilinear")
        return channels_first
