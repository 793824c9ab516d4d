"""DMMI's two decoders: from text to the mask, and back to the text (RIS-DMMI @753cd60)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from rt_ris_train.blocks.attention import to_grid, to_tokens
from rt_ris_train.blocks.transformer import TransformerLayer


@dataclass(frozen=True, kw_only=True)
class Decoded:
    """What the decoder gives.

    Attributes:
        logits: of the foreground less the background, [N, h, w].
        middle: G, the feature that the sentence is rebuilt from, [N, C, h/2, w/2].
        pooled: features of the three steps, each [N, C].
    """

    logits: Tensor
    middle: Tensor
    pooled: tuple[Tensor, Tensor, Tensor]


class MergeBlock(nn.Module):
    """A deep map brought to a finer one's size and joined with it; two 3x3 convolutions."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, deep: Tensor, fine: Tensor) -> Tensor:
        """[N, C, h, w] and [N, C', h', w'] to [N, C, h', w']."""
        if deep.shape[2:] != fine.shape[2:]:
            deep = functional.interpolate(
                deep, size=fine.shape[2:], mode="bilinear", align_corners=True
            )
        joined = torch.cat((deep, fine), dim=1)
        joined = self.bn1(self.conv1(joined)).relu()
        found: Tensor = self.bn2(self.conv2(joined)).relu()
        return found


class TextToImage(nn.Module):
    """Three merges with a Transformer layer after the first two. Pads are attended to."""

    def __init__(
        self, channels: tuple[int, int, int, int], *, width: int, hidden: int, heads: int
    ) -> None:
        super().__init__()
        first, second, third, fourth = channels
        self.block4 = MergeBlock(fourth + third, width)
        self.block3 = MergeBlock(width + second, width)
        self.block2 = MergeBlock(width + first, width)
        self.fusion1, self.fusion2 = (
            TransformerLayer(width=width, heads=heads, hidden=hidden, dropout=0.1) for _ in range(2)
        )
        self.conv1_1 = nn.Conv2d(width, 2, 1)

    def forward(self, features: tuple[Tensor, Tensor, Tensor, Tensor], words: Tensor) -> Decoded:
        """Decode.

        The authors' last convolution has a channel for the background and one for the foreground;
        only their difference is read, so that one channel is computed.

        Args:
            features: four maps [N, C_i, h_i, w_i], fine to deep.
            words: refined words [N, L, D] with D the decoder's width.
        """
        c1, c2, c3, c4 = features
        deep = self.block4(c4, c3)
        middle = self.block3(self._attend(self.fusion1, deep, words), c2)
        fine = self.block2(self._attend(self.fusion2, middle, words), c1)
        weight, bias = self.conv1_1.weight, self.conv1_1.bias
        assert bias is not None
        logits = functional.conv2d(fine, weight[1:] - weight[:1], bias[1:] - bias[:1])[:, 0]
        pooled = (deep.mean((2, 3)), middle.mean((2, 3)), fine.mean((2, 3)))
        return Decoded(logits=logits, middle=middle, pooled=pooled)

    def _attend(self, layer: nn.Module, grid: Tensor, words: Tensor) -> Tensor:
        return to_grid(layer(to_tokens(grid), words), grid.shape[2])


class ImageToText(nn.Module):
    """Training only: rebuilds the words of an erased sentence from what was decoded."""

    def __init__(self, *, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.layer = TransformerLayer(width=width, heads=heads, hidden=hidden, dropout=0.1)

    def forward(self, middle: Tensor, erased: Tensor) -> Tensor:
        """G [N, C, h, w] and words of the erased sentence [N, L, D] to [N, L, D]."""
        found: Tensor = self.layer(erased, to_tokens(self.bn1(self.conv1(middle)).relu()))
        return found


class Contrast(nn.Module):
    """Training only: one vector for what was decoded and one for the sentence."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.crossfuse1, self.crossfuse2 = nn.Linear(2 * width, width), nn.Linear(2 * width, width)
        self.align_lan = nn.Linear(width, width)

    def forward(self, decoded: Decoded, words: Tensor) -> tuple[Tensor, Tensor]:
        """Both vectors, [N, C], not normalised."""
        first, second, third = decoded.pooled
        joined = self.crossfuse1(torch.cat((first, second), dim=1))
        image = self.crossfuse2(torch.cat((joined, third), dim=1))
        return image, self.align_lan(words).mean(1)
