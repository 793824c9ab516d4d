"""Shared-RIS's feature pyramid and mask decoder, over image and text tokens alike.

arXiv 2408.15521, sections III-B and III-C. No code was published; what the paper leaves open is
chosen so that its table of parameters and multiply-adds comes out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from rt_ris_train.backbones.beit3 import Streams
from rt_ris_train.blocks.attention import MultiHeadAttention, to_grid


class SharedTap(nn.Module):
    """One tap: projected, then each token looks at all others (p + MSA(LN(p)))."""

    def __init__(self, *, inputs: int, width: int, heads: int) -> None:
        super().__init__()
        self.project_v, self.project_t = nn.Linear(inputs, width), nn.Linear(inputs, width)
        self.norm = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width=width, heads=heads)

    def forward(self, streams: Streams, visible: Tensor) -> Tensor:
        """Image and text tokens and bool [N, 1 + P + L] to [N, 1 + P + L, C]."""
        projected = (self.project_v(streams[0]), self.project_t(streams[1]))
        tokens = torch.cat(projected, dim=1)
        normed = self.norm(tokens)
        seen: Tensor = self.attention(normed, normed, normed, visible=visible)
        return tokens + seen


class SharedPyramid(nn.Module):
    """All taps, joined."""

    def __init__(self, *, taps: int, inputs: int, width: int, heads: int) -> None:
        super().__init__()
        self.taps = nn.ModuleList(
            SharedTap(inputs=inputs, width=width, heads=heads) for _ in range(taps)
        )
        self.out = nn.Linear(taps * width, width)

    def forward(self, features: Sequence[Streams], visible: Tensor) -> Tensor:
        """Features of the taps to [N, 1 + P + L, C]."""
        seen = [tap(streams, visible) for tap, streams in zip(self.taps, features, strict=True)]
        found: Tensor = self.out(torch.cat(seen, dim=2))
        return found


class SharedDecoder(nn.Module):
    """One layer over all tokens; the picture is enlarged, the text's class token asks.

    The last 1x1 convolution and the product with the text vector are one product: the convolution
    goes into the vector, which changes nothing but the order of two sums.
    """

    def __init__(self, *, width: int, heads: int, cells: int) -> None:
        super().__init__()
        self.cells = cells
        self.attention_norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width=width, heads=heads)
        self.feed = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.up = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
            )
            for _ in range(2)
        )
        self.last = nn.Conv2d(width, width, 1)
        self.ask = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))

    def forward(self, tokens: Tensor, visible: Tensor) -> Tensor:
        """[N, 1 + P + L, C] and bool [N, 1 + P + L] to logits [N, 4h, 4w]."""
        normed = self.attention_norm(tokens)
        tokens = tokens + self.attention(normed, normed, normed, visible=visible)
        tokens = tokens + self.feed(self.feed_norm(tokens))
        text = 1 + self.cells**2
        fine = self.enlarge(to_grid(tokens[:, 1:text], self.cells))
        vector = self.ask(tokens[:, text])
        assert self.last.bias is not None
        joined = vector @ self.last.weight[:, :, 0, 0]
        product: Tensor = joined[:, None] @ fine.flatten(2)
        product = product + (vector @ self.last.bias)[:, None, None]
        return product.reshape(-1, 4 * self.cells, 4 * self.cells)

    def enlarge(self, grid: Tensor) -> Tensor:
        """[N, C, h, w] to [N, C, 4h, 4w], before the last convolution."""
        for block in self.up:
            grid = block(functional.interpolate(grid, scale_factor=2, mode="bilinear"))
        return grid
