"""ETRIS's Bridger: an adapter between the two towers of CLIP (kkakkkka/ETRIS @cdc6d8e).

At three depths it brings both sides to 64 channels, lets them look at each other, and adds what it
found to both towers. Padded words take part: there is no mask anywhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from rt_ris_train.blocks.attention import PackedAttention, to_grid, to_tokens
from rt_ris_train.blocks.transformer import TransformerLayer

Tower = Literal["resnet", "vit"]
STAGES = 3


class GateInteractor(nn.Module):
    """What is seen on the other side, as a factor (ViTs): no norm, no feed-forward."""

    def __init__(self, *, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.multihead_attn = PackedAttention(width=width, heads=heads, dropout=dropout)

    def forward(self, own: Tensor, other: Tensor) -> Tensor:
        """[N, P, C] and [N, L, C] to [N, P, C]."""
        gate: Tensor = self.multihead_attn(own, other, other)
        return own * gate


@dataclass(frozen=True, kw_only=True)
class BridgerSize:
    """Sizes of a Bridger.

    Attributes:
        tower: of the image side; decides the kind of the interactors and of the zooms.
        channels: of the three image features.
        words: D, channels of the text tower.
        cells: h = w at which both sides meet; of the first and third feature of a ResNet twice and
            half as many.
        heads: of every attention.
        width: channels inside.
        dropout: in training.
    """

    tower: Tower
    channels: tuple[int, int, int]
    words: int
    cells: int
    heads: int
    width: int = 64
    dropout: float = 0.1


class Bridger(nn.Module):
    """All three meetings; ``meet`` is called once per depth, from shallow to deep."""

    def __init__(self, size: BridgerSize) -> None:
        super().__init__()
        self.size = size
        width = size.width
        self.zoom_in = nn.ModuleList(_zoom_in(size))
        self.zoom_out = nn.ModuleList(_zoom_out(size))
        self.linear1 = nn.ModuleList(nn.Linear(size.words, width) for _ in range(STAGES))
        self.linear2 = nn.ModuleList(nn.Linear(width, size.words) for _ in range(STAGES))
        self.ln_v = nn.ModuleList(nn.LayerNorm(width) for _ in range(STAGES - 1))
        self.ln_t = nn.ModuleList(nn.LayerNorm(width) for _ in range(STAGES - 1))
        self.fusion_v = nn.ModuleList(_interactor(size) for _ in range(STAGES))
        self.fusion_t = nn.ModuleList(_interactor(size) for _ in range(STAGES))
        self.apply(_initialise)

    def meet(
        self, depth: int, image: Tensor, words: Tensor, before: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Let both sides of one depth see each other.

        The paper adds the interactors' earlier *outputs*; the code, and so the published weights,
        their earlier *inputs*, and normalises the sum.

        Args:
            depth: 0, 1 or 2.
            image: feature of the image tower [N, C, h, w].
            words: feature of the text tower [N, L, D].
            before: the interactors' inputs at the depth before, None at the first.

        Returns:
            Both features with what was found added, and the interactors' inputs.
        """
        seen = to_tokens(self.zoom_in[depth](image))
        read = self.linear1[depth](words)
        if before is not None:
            seen = self.ln_v[depth - 1](seen + before[0])
            read = self.ln_t[depth - 1](read + before[1])
        to_image, to_words = self.fusion_v[depth](seen, read), self.fusion_t[depth](read, seen)
        image = image + self.zoom_out[depth](to_grid(to_image, self.size.cells))
        return image, words + self.linear2[depth](to_words), (seen, read)


def _interactor(size: BridgerSize) -> nn.Module:
    if size.tower == "vit":
        return GateInteractor(width=size.width, heads=size.heads, dropout=size.dropout)
    return TransformerLayer(
        width=size.width, heads=size.heads, hidden=2 * size.width, dropout=size.dropout
    )


def _zoom_in(size: BridgerSize) -> Sequence[nn.Module]:
    """From the towers' features to the meeting: a ResNet's are twice, once and half as fine."""
    first, second, third = size.channels
    if size.tower == "resnet":
        return (
            nn.Conv2d(first, size.width, 2, stride=2, bias=False),
            nn.Conv2d(second, size.width, 1, bias=False),
            nn.ConvTranspose2d(third, size.width, 2, stride=2, bias=False),
        )
    return (
        _normed(nn.Conv2d(first, size.width, 1, bias=False), size.width),
        _normed(nn.Conv2d(second, size.width, 1, bias=False), size.width),
        _normed(nn.ConvTranspose2d(third, size.width, 1, bias=False), size.width),
    )


def _zoom_out(size: BridgerSize) -> Sequence[nn.Module]:
    first, second, third = size.channels
    if size.tower == "resnet":
        return (
            nn.ConvTranspose2d(size.width, first, 2, stride=2, bias=False),
            nn.ConvTranspose2d(size.width, second, 1, bias=False),
            nn.Conv2d(size.width, third, 2, stride=2, bias=False),
        )
    return (
        _normed(nn.ConvTranspose2d(size.width, first, 1, bias=False), first),
        _normed(nn.ConvTranspose2d(size.width, second, 1, bias=False), second),
        _normed(nn.Conv2d(size.width, third, 1, bias=False), third),
    )


def _normed(layer: nn.Module, channels: int) -> nn.Sequential:
    return nn.Sequential(layer, nn.BatchNorm2d(channels), nn.ReLU())


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
