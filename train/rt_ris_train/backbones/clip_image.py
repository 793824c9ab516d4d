"""CLIP's image towers, cut where ETRIS's Bridger enters (open_clip's parts, MIT).

Both are taken from their pictures [B, 3, S, S] to a feature that depends on the picture alone
(``front``) and from there on step by step.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from open_clip.modified_resnet import ModifiedResNet
from open_clip.transformer import QuickGELU, Transformer
from torch import Tensor, nn
from torch.nn import functional

from rt_ris_train.blocks.attention import attend, to_grid, to_tokens


@dataclass(frozen=True, kw_only=True)
class ResNetSize:
    """Blocks of the four layers, width of the stem, D' and the positions of the released pool."""

    layers: tuple[int, int, int, int]
    outputs: int
    width: int = 64
    pool_cells: int = 7


class SpatialAttentionPool(nn.Module):
    """CLIP's attention pool as CRIS and ETRIS have it: every cell asks, and a residual joins.

    ``connect`` is no part of CLIP: it is drawn at random and never trained, so that fine-tuned
    files carry it. The positions are resized by a fixed matrix.
    """

    resize: Tensor

    def __init__(self, size: ResNetSize, *, cells: int) -> None:
        super().__init__()
        width = 32 * size.width
        self.heads = width // 64
        self.positional_embedding = nn.Parameter(
            torch.randn(size.pool_cells**2 + 1, width) / width**0.5
        )
        self.k_proj, self.q_proj, self.v_proj = (nn.Linear(width, width) for _ in range(3))
        self.c_proj = nn.Linear(width, size.outputs)
        self.connect = nn.Sequential(
            nn.Conv2d(width, size.outputs, 1, bias=False), nn.BatchNorm2d(size.outputs)
        )
        matrix = resize_matrix(size.pool_cells, cells)
        self.register_buffer("resize", matrix, persistent=False)

    def forward(self, features: Tensor) -> Tensor:
        """[N, C, h, w] to [N, D', h, w]."""
        tokens = to_tokens(features) + self.resize @ self.positional_embedding[1:]
        asked, keys, values = self.q_proj(tokens), self.k_proj(tokens), self.v_proj(tokens)
        pooled = self.c_proj(attend(asked, keys, values, heads=self.heads))
        joined: Tensor = to_grid(pooled, features.shape[2]) + self.connect(features)
        return joined.relu()


class ClipResNet(nn.Module):
    """CLIP's ResNet; ``front`` is the stem to layer 2."""

    def __init__(self, size: ResNetSize, *, image_size: int) -> None:
        super().__init__()
        made = ModifiedResNet(
            list(size.layers),
            output_dim=size.outputs,
            heads=size.width * 32 // 64,
            image_size=32 * size.pool_cells,
            width=size.width,
        )
        made.attnpool = SpatialAttentionPool(size, cells=image_size // 32)
        self.network = made

    def front(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] to [B, 8W, S/8, S/8], W the width of the stem."""
        found: Tensor = self.network.layer2(self.network.layer1(self.network.stem(image)))
        return found

    def step(self, depth: int, feature: Tensor) -> Tensor:
        """To the feature of the next depth: layer 3 behind depth 0, layer 4 behind depth 1."""
        found: Tensor = (self.network.layer3, self.network.layer4)[depth](feature)
        return found

    def end(self, feature: Tensor) -> Tensor:
        """The pool: [N, 32W, h, w] to [N, D', h, w]."""
        found: Tensor = self.network.attnpool(feature)
        return found

    def grid(self, feature: Tensor) -> Tensor:
        """A feature as a map [N, C, h, w]."""
        return feature

    def back(self, feature: Tensor, grid: Tensor) -> Tensor:
        """The feature with its map in the place of its own."""
        return grid


@dataclass(frozen=True, kw_only=True)
class VitSize:
    """Width, depth and heads of the tower, and D'."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    patch: int = 16
    outputs: int = 512


class ClipVit(nn.Module):
    """CLIP's ViT without its class token at the end; ``front`` is the first third of its blocks."""

    def __init__(self, size: VitSize, *, image_size: int) -> None:
        super().__init__()
        self.size, self.cells = size, image_size // size.patch
        width, scale = size.width, size.width**-0.5
        self.conv1 = nn.Conv2d(3, width, size.patch, stride=size.patch, bias=False)
        self.class_embedding = nn.Parameter(scale * torch.randn(width))
        self.positional_embedding = nn.Parameter(scale * torch.randn(self.cells**2 + 1, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = Transformer(
            width=width, layers=size.layers, heads=size.heads, act_layer=QuickGELU
        )
        self.proj = nn.Parameter(scale * torch.randn(width, size.outputs))

    def front(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] to tokens [B, 1 + P, C], the class token first."""
        return self._blocks(0, self.embed(image))

    def embed(self, image: Tensor) -> Tensor:
        """Patches, class token and positions, normed: [B, 1 + P, C]."""
        patches = to_tokens(self.conv1(image))
        first = self.class_embedding.expand(patches.shape[0], 1, -1)
        found: Tensor = self.ln_pre(torch.cat((first, patches), dim=1) + self.positional_embedding)
        return found

    def step(self, depth: int, feature: Tensor) -> Tensor:
        """The second or the last third of the blocks."""
        return self._blocks(depth + 1, feature)

    def end(self, feature: Tensor) -> Tensor:
        """Tokens [N, 1 + P, C] to [N, D', h, w]."""
        return to_grid(self.ln_post(feature[:, 1:]) @ self.proj, self.cells)

    def grid(self, feature: Tensor) -> Tensor:
        """The patch tokens as a map [N, C, h, w]."""
        return to_grid(feature[:, 1:], self.cells)

    def back(self, feature: Tensor, grid: Tensor) -> Tensor:
        """The class token as it was, the patch tokens from the map."""
        return torch.cat((feature[:, :1], to_tokens(grid)), dim=1)

    def _blocks(self, third: int, tokens: Tensor) -> Tensor:
        each = self.size.layers // 3
        for block in self.transformer.resblocks[third * each : (third + 1) * each]:
            tokens = block(tokens)
        return tokens


def resize_matrix(before: int, after: int) -> Tensor:
    """Bicubic resize of a square grid as one matrix [after^2, before^2] (no aligned corners)."""
    units = torch.eye(before**2).reshape(before**2, 1, before, before)
    resized = functional.interpolate(units, size=(after, after), mode="bicubic")
    return resized.flatten(1).T.contiguous()


def resize_positions(table: Tensor, *, after: int) -> Tensor:
    """Positions [1 + g^2, C] of a square grid for another one; the first row stays."""
    before = round((table.shape[0] - 1) ** 0.5)
    return torch.cat((table[:1], resize_matrix(before, after) @ table[1:]))
