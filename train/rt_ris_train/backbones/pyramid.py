"""Image backbones of four stages, cut between them (torchvision's parts, BSD-3-Clause).

Both hand on tokens: ``front`` makes those of the first stage, ``step`` goes one stage deeper.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torchvision.models.resnet import Bottleneck, ResNet
from torchvision.models.swin_transformer import PatchMerging, SwinTransformerBlock

from rt_ris_train.blocks.attention import to_grid, to_tokens


@dataclass(frozen=True, kw_only=True)
class SwinSize:
    """Channels of the first stage, blocks and heads of each, side of a window in cells."""

    width: int = 128
    depths: tuple[int, int, int, int] = (2, 2, 18, 2)
    heads: tuple[int, int, int, int] = (4, 8, 16, 32)
    window: int = 12
    drop_path: float = 0.3

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Of the four stages."""
        return (self.width, 2 * self.width, 4 * self.width, 8 * self.width)


@dataclass(frozen=True, kw_only=True)
class ResNetSize:
    """Bottleneck blocks of each stage; torchvision's ResNet, stride in the 3x3 convolution."""

    layers: tuple[int, int, int, int] = (3, 4, 23, 3)

    @property
    def channels(self) -> tuple[int, int, int, int]:
        """Of the four stages."""
        return (256, 512, 1024, 2048)


class PatchEmbedding(nn.Module):
    """4x4 patches, normed."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, 4, stride=4)
        self.norm = nn.LayerNorm(width)

    def forward(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] to [B, S/4, S/4, C]."""
        found: Tensor = self.norm(self.proj(image).permute(0, 2, 3, 1))
        return found


class SwinLayer(nn.Module):
    """The blocks of one stage, and the merging of patches that follows it."""

    def __init__(self, size: SwinSize, stage: int) -> None:
        super().__init__()
        width, total = size.channels[stage], sum(size.depths)
        before = sum(size.depths[:stage])
        self.blocks = nn.ModuleList(
            SwinTransformerBlock(
                width,
                size.heads[stage],
                window_size=[size.window] * 2,
                shift_size=[size.window // 2 if block % 2 else 0] * 2,
                stochastic_depth_prob=size.drop_path * (before + block) / max(total - 1, 1),
            )
            for block in range(size.depths[stage])
        )
        self.downsample = PatchMerging(width) if stage < 3 else None


class SwinTrunk(nn.Module):
    """Swin without the norms of its outputs, which belong to who reads them."""

    def __init__(self, size: SwinSize) -> None:
        super().__init__()
        self.size = size
        self.patch_embed = PatchEmbedding(size.width)
        self.layers = nn.ModuleList(SwinLayer(size, stage) for stage in range(4))

    def front(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] to tokens [B, (S/4)^2, C]."""
        return self._blocks(0, self.patch_embed(image))

    def step(self, stage: int, tokens: Tensor, cells: int) -> Tensor:
        """Through stage 1, 2 or 3, from the tokens of the one before and their h = w."""
        layer = self.layers[stage - 1]
        assert isinstance(layer, SwinLayer)
        merging = layer.downsample
        assert merging is not None
        grid = tokens.reshape(-1, cells, cells, tokens.shape[2])
        return self._blocks(stage, merging(grid))

    def _blocks(self, stage: int, grid: Tensor) -> Tensor:
        layer = self.layers[stage]
        assert isinstance(layer, SwinLayer)
        for block in layer.blocks:
            grid = block(grid)
        return grid.flatten(1, 2)


class ResNetTrunk(nn.Module):
    """A ResNet of bottlenecks; its first stage holds the stem."""

    def __init__(self, size: ResNetSize) -> None:
        super().__init__()
        self.size = size
        made = ResNet(Bottleneck, list(size.layers))
        self.layer1 = nn.Sequential(made.conv1, made.bn1, made.relu, made.maxpool, made.layer1)
        self.layer2, self.layer3, self.layer4 = made.layer2, made.layer3, made.layer4

    def front(self, image: Tensor) -> Tensor:
        """[B, 3, S, S] to tokens [B, (S/4)^2, 256]."""
        return to_tokens(self.layer1(image))

    def step(self, stage: int, tokens: Tensor, cells: int) -> Tensor:
        """Through stage 1, 2 or 3, from the tokens of the one before and their h = w."""
        layer = (self.layer2, self.layer3, self.layer4)[stage - 1]
        return to_tokens(layer(to_grid(tokens, cells)))
