"""HARIS's human-like attention, hierarchy and decoder (arXiv 2405.10707, section III).

The paper's text has lost its formulas; what stands here is reconstructed from its prose and from
MARIS, by the same authors. Fidelity to printed equations is not claimed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rt_ris_train.blocks.attention import to_grid
from rt_ris_train.blocks.positions import sine_positions
from rt_ris_train.blocks.transformer import TransformerLayer

MASKED = -1e4
NORM_FLOOR = 1e-6


class HumanLikeAttention(nn.Module):
    """Pixels take from words and words from pixels; the sentence then sends pixels round again.

    In the second round each pixel starts from what it was plus a feedback, made of the first
    round's pixels where they resemble the sentence. The last layer of the feedback begins at zero.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale: float = width**-0.5
        self.ask_v, self.ask_w, self.give_w, self.give_v = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.norm_v, self.norm_w = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feedback = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
        last = self.feedback[2]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(
        self, pixels: Tensor, words: Tensor, sentence: Tensor, token_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            pixels: V, [N or 1, P, C].
            words: W, [N, L, C].
            sentence: s, [N, C].
            token_mask: bool [N, L].

        Returns:
            V'' [N, P, C] and W' [N, L, C].
        """
        keys, values = self.ask_w(words), self.give_w(words)
        hidden = MASKED * (1 - token_mask.to(words.dtype))[:, None]
        scores = self._scores(pixels, keys)
        first = self.norm_v((scores + hidden).softmax(-1) @ values + pixels)
        # Each word's share of every pixel: a softmax over pixels, safe where a sum is not.
        collected = scores.mT.softmax(-1) @ self.give_v(pixels)
        again = pixels + self.feedback(self._gate(first, sentence) * first)
        second = (self._scores(again, keys) + hidden).softmax(-1) @ values
        return self.norm_v(second + again), self.norm_w(collected + words)

    def _scores(self, pixels: Tensor, keys: Tensor) -> Tensor:
        scores: Tensor = self.ask_v(pixels) @ keys.mT
        return scores * self.scale

    def _gate(self, pixels: Tensor, sentence: Tensor) -> Tensor:
        """How much a pixel resembles the sentence, 0 to 1, [N, P, 1]."""
        product = (pixels * sentence[:, None]).sum(-1, keepdim=True)
        lengths = pixels.norm(dim=-1, keepdim=True).clamp(min=NORM_FLOOR)
        own = sentence.norm(dim=-1).clamp(min=NORM_FLOOR)[:, None, None]
        cosine: Tensor = product / lengths / own
        return cosine.clamp(0, 1)


class Hierarchy(nn.Module):
    """A 3x3 convolution over what a block gave and the next tap, joined; then norm and GELU.

    The convolution is linear, so it is split: the half over the tap depends on the picture alone.
    """

    def __init__(self, width: int, *, cells: int) -> None:
        super().__init__()
        self.cells = cells
        self.of_block = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.of_tap = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        for half in (self.of_block, self.of_tap):
            # As one convolution over both would be drawn.
            half.weight.data.mul_(0.5**0.5)

    def forward(self, block: Tensor, tap: Tensor) -> Tensor:
        """V'' [N, P, C] and the tap's half [N or 1, C, h, w] to the next V [N, P, C]."""
        joined = self.of_block(to_grid(block, self.cells)) + tap
        return functional.gelu(self.norm(joined)).flatten(2).mT


class QueryDecoder(nn.Module):
    """A learned query and the words look at the pixels; the query becomes a kernel for the mask."""

    places: Tensor

    def __init__(self, *, width: int, layers: int, heads: int, hidden: int, cells: int) -> None:
        super().__init__()
        self.cells = cells
        self.query = nn.Parameter(0.02 * torch.randn(1, width))
        self.layers = nn.ModuleList(
            TransformerLayer(width=width, heads=heads, hidden=hidden, dropout=0.0)
            for _ in range(layers)
        )
        fine, finest = width // 4, width // 8
        self.up_first = _up(width, fine)
        self.up_second = _up(fine, finest)
        self.head = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, finest))
        places = sine_positions(cells=cells, width=width)
        self.register_buffer("places", places, persistent=False)

    def forward(self, pixels: Tensor, words: Tensor, token_mask: Tensor) -> Tensor:
        """V'' [N, P, C], W' [N, L, C] and bool [N, L] to logits [N, 4h, 4w]."""
        count = words.shape[0]
        queries = torch.cat((self.query.expand(count, 1, -1), words), dim=1)
        visible = torch.cat((token_mask.new_ones(count, 1), token_mask), dim=1)
        for layer in self.layers:
            queries = layer(queries, pixels, visible=visible, places=self.places)
        grid = self.up_first(to_grid(pixels, self.cells))
        grid = self.up_second(functional.interpolate(grid, scale_factor=2, mode="bilinear"))
        # The product before the last doubling: interpolation is linear, one channel is cheaper.
        product = self.head(queries[:, :1]) @ grid.flatten(2)
        product = product.reshape(-1, 1, 2 * self.cells, 2 * self.cells)
        return functional.interpolate(product, scale_factor=2, mode="bilinear")[:, 0]


def _up(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )
