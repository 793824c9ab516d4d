"""ETRIS's head: hierarchical and global alignment, and the projector (kkakkkka/ETRIS @cdc6d8e).

Global alignment and projector are those of CRIS. Two forms differ from the authors' and compute the
same: an attention to a single token is a gate, and the convolution with a kernel that a sentence
makes is a matrix product and a fixed convolution.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rt_ris_train.blocks.attention import PackedAttention, to_grid, to_tokens


def conv_layer(inputs: int, outputs: int, *, kernel: int, stride: int = 1) -> nn.Sequential:
    """Convolution without bias, BatchNorm, ReLU; an odd kernel keeps the size."""
    padding = kernel // 2 if stride == 1 else 0
    convolution = nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


class Gate(nn.Module):
    """Attention to one token: its softmax is 1, so every pixel sees the same vector.

    The authors' query and key projections are without effect; only value and output are kept.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.value, self.out = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, image: Tensor, sentence: Tensor) -> Tensor:
        """[N, C, h, w] and [N, C] to [N, C, h, w]."""
        gate: Tensor = self.out(self.value(sentence))
        return image * gate[:, :, None, None]


class CoordinateConv(nn.Module):
    """A 3x3 convolution that is told where it is: two planes, column and row from -1 to 1."""

    planes: Tensor

    def __init__(self, inputs: int, outputs: int, *, cells: int) -> None:
        super().__init__()
        self.conv1 = conv_layer(inputs + 2, outputs, kernel=3)
        line = torch.linspace(-1, 1, cells)
        columns = line[None, :].expand(cells, cells)
        planes = torch.stack((columns, columns.T))[None]
        self.register_buffer("planes", planes.contiguous(), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """[N, C, h, w] to [N, C', h, w]."""
        planes = self.planes.expand(image.shape[0], -1, -1, -1)
        found: Tensor = self.conv1(torch.cat((image, planes), dim=1))
        return found


class HierarchicalAlignment(nn.Module):
    """Three image features on one grid, each gated by the sentence, and joined."""

    def __init__(
        self,
        *,
        channels: tuple[int, int, int],
        strides: tuple[int, int, int],
        sentence: int,
        width: int,
        cells: int,
    ) -> None:
        super().__init__()
        first, second, third = channels
        self.txt_proj = nn.Linear(sentence, width)
        self.f3_proj = conv_layer(first, width, kernel=strides[0], stride=strides[0])
        self.f4_proj = conv_layer(second, width, kernel=strides[1], stride=strides[1])
        self.f5_proj = nn.Sequential(
            nn.ConvTranspose2d(third, width, strides[2], stride=strides[2], bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.fusion3, self.fusion4, self.fusion5 = (Gate(width) for _ in range(3))
        self.aggr = conv_layer(3 * width, width, kernel=1)
        self.coordconv = nn.Sequential(
            CoordinateConv(width, width, cells=cells), conv_layer(width, width, kernel=3)
        )

    def forward(self, features: tuple[Tensor, Tensor, Tensor], sentence: Tensor) -> Tensor:
        """Three maps [N, C_i, h_i, w_i] and F_s [N, D'] to [N, C, h, w]."""
        asked = self.txt_proj(sentence)
        third, fourth, fifth = features
        joined = torch.cat(
            (
                self.fusion3(self.f3_proj(third), asked),
                self.fusion4(self.f4_proj(fourth), asked),
                self.fusion5(self.f5_proj(fifth), asked),
            ),
            dim=1,
        )
        found: Tensor = self.coordconv(self.aggr(joined))
        return found


class GlobalLayer(nn.Module):
    """Self-attention of pixels, attention to words, feed-forward; norms before and after each."""

    def __init__(self, *, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn_norm, self.cross_attn_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.self_attn = PackedAttention(width=width, heads=heads, dropout=dropout)
        self.multihead_attn = PackedAttention(width=width, heads=heads, dropout=dropout)
        self.ffn = nn.Sequential(
            nn.Linear(width, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.LayerNorm(hidden),
            nn.Linear(hidden, width),
        )
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, pixels: Tensor, words: Tensor, visible: Tensor, places: tuple[Tensor, Tensor]
    ) -> Tensor:
        """One layer.

        Args:
            pixels: [N, P, C].
            words: [N, L, C].
            visible: bool [N, L], false for pads.
            places: positions of pixels [P, C] and of words [L, C].
        """
        of_pixels, of_words = places
        normed = self.norm1(pixels)
        placed = normed + of_pixels
        found = self.self_attn_norm(self.self_attn(placed, placed, normed))
        pixels = pixels + self.dropout(found)
        asked = self.norm2(pixels) + of_pixels
        found = self.multihead_attn(asked, words + of_words, words, visible=visible)
        pixels = pixels + self.dropout(self.cross_attn_norm(found))
        deeper: Tensor = self.dropout(self.ffn(self.norm3(pixels)))
        return pixels + deeper


class GlobalAlignment(nn.Module):
    """A stack of layers over all pixels, with a norm at the end.

    The paper's equation 8 attends to the sentence; the code, and so the weights, to the words.
    """

    of_pixels: Tensor
    of_words: Tensor

    def __init__(
        self, *, layers: int, width: int, heads: int, hidden: int, cells: int, words: int
    ) -> None:
        super().__init__()
        self.cells = cells
        self.layers = nn.ModuleList(
            GlobalLayer(width=width, heads=heads, hidden=hidden, dropout=0.1) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.register_buffer("of_pixels", square_positions(cells, width), persistent=False)
        self.register_buffer("of_words", line_positions(words, width), persistent=False)

    def forward(self, image: Tensor, words: Tensor, visible: Tensor) -> Tensor:
        """[N, C, h, w], words [N, L, C] and bool [N, L] to [N, C, h, w]."""
        pixels = to_tokens(image)
        places = (self.of_pixels, self.of_words)
        for layer in self.layers:
            pixels = layer(pixels, words, visible, places)
        return to_grid(self.norm(pixels), self.cells)


def line_positions(length: int, width: int) -> Tensor:
    """Sines and cosines of an index, by turns [length, width]."""
    factor = torch.exp(torch.arange(0, width, 2) * (-torch.log(torch.tensor(10000.0)) / width))
    angle = torch.arange(length)[:, None] * factor
    return torch.stack((angle.sin(), angle.cos()), dim=2).flatten(1)


def square_positions(cells: int, width: int) -> Tensor:
    """The column in the first half of the channels, the row in the second [cells^2, width]."""
    line = line_positions(cells, width // 2)
    grid = (cells, cells, width // 2)
    columns, rows = line[None].expand(grid), line[:, None].expand(grid)
    return torch.cat((columns, rows), dim=2).flatten(0, 1)


class Projector(nn.Module):
    """The sentence becomes a 3x3 kernel and a bias for the image feature.

    The authors run a grouped convolution whose weights are an input, which engines do not take.
    Here the kernel's nine vectors are multiplied with every pixel, and a fixed convolution adds
    the nine products at the nine neighbours. The 1x1 convolution before it joins the vectors.
    """

    gather: Tensor

    def __init__(self, *, width: int, sentence: int) -> None:
        super().__init__()
        inner = width // 2
        self.vis = nn.Sequential(
            nn.Upsample(scale_factor=2, mode="bilinear"),
            conv_layer(width, width, kernel=3),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            conv_layer(width, inner, kernel=3),
            nn.Conv2d(inner, inner, 1),
        )
        self.txt = nn.Linear(sentence, inner * 9 + 1)
        self.register_buffer("gather", torch.eye(9).reshape(1, 9, 3, 3), persistent=False)

    def forward(self, image: Tensor, sentence: Tensor) -> Tensor:
        """[N, C, h, w] and F_s [N, D'] to logits [N, 4h, 4w]."""
        fine = self.vis[:4](image)
        kernel, bias = self._kernel(sentence)
        last = self.vis[4]
        assert isinstance(last, nn.Conv2d)
        assert last.bias is not None
        joined = kernel @ last.weight[:, :, 0, 0]
        products = joined @ fine.flatten(2) + kernel @ last.bias[:, None]
        nine = products.unflatten(2, fine.shape[2:])
        return functional.conv2d(nine, self.gather, padding=1)[:, 0] + bias

    def _kernel(self, sentence: Tensor) -> tuple[Tensor, Tensor]:
        """The kernel [N, 9, C'] and the bias [N, 1, 1]."""
        made = self.txt(sentence)
        kernel = made[:, :-1].unflatten(1, (-1, 9)).transpose(1, 2)
        return kernel, made[:, -1:, None]
