"""Sizes of SAM's encoder and what is published about them; needs no package of SAM's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Final

import torch

from rt_ris_train.architecture import Figure, ReferringNetwork
from rt_ris_train.counting import multiply_adds


@dataclass(frozen=True, kw_only=True)
class SamSize:
    """Width, depth and heads of the encoder, and its global-attention blocks (0-based)."""

    width: int
    depth: int
    heads: int
    global_blocks: tuple[int, int, int, int]
    image_size: int = 1024
    window: int = 14

    @property
    def cells(self) -> int:
        """H = w of the feature maps."""
        return self.image_size // 16


SIZES: Final[Mapping[str, SamSize]] = {
    "tiny": SamSize(
        width=32, depth=4, heads=2, global_blocks=(0, 1, 2, 3), image_size=128, window=3
    ),
    "vit_b": SamSize(width=768, depth=12, heads=12, global_blocks=(2, 5, 8, 11)),
    "vit_l": SamSize(width=1024, depth=24, heads=16, global_blocks=(5, 11, 17, 23)),
    "vit_h": SamSize(width=1280, depth=32, heads=16, global_blocks=(7, 15, 23, 31)),
}

PUBLISHED: Final[Mapping[str, tuple[float, float]]] = {
    "vit_b": (89.67e6, 486.0e9),
    "vit_l": (308.28e6, 1492.8e9),
    "vit_h": (632e6, 2976e9),
}
"""Parameters and multiply-adds of the encoders at 1024 pixels: of ViT-H as MobileSAM's page prints
them, of the others as counted on segment-anything's code."""

NECK: Final = 256 * 256 * 9 + 4 * 256
"""Weights of the neck beside its first convolution, which has the encoder's width."""


def figures(size: str, count: Callable[[ReferringNetwork], int]) -> tuple[Figure, ...]:
    """What is published about a network on this encoder, whose parameters ``count`` counts."""
    chosen, at = SIZES[size], "1024 x 1024"
    weights, cost = PUBLISHED[size]
    printed = "MobileSAM's page" if size == "vit_h" else "segment-anything's code, counted"
    dead = "the neck, which taps do without"
    cells = chosen.cells**2
    neck = cells * 256 * (chosen.width + 9 * 256)
    return (
        Figure(
            quantity="parameters",
            part="image encoder",
            at=at,
            published=weights,
            source=printed,
            count=count,
            added=NECK + 256 * chosen.width,
            note=dead,
        ),
        Figure(
            quantity="multiply_adds",
            part="image encoder",
            at=at,
            published=cost,
            source=printed,
            count=partial(_encoder_cost, chosen),
            added=neck + _padding_cost(chosen),
            note=f"{dead}; projections of windows' padding",
        ),
        Figure(
            quantity="parameters",
            part="what trains",
            at="1024 x 1024, 17 tokens",
            published=None,
            source="",
            count=trained,
        ),
    )


def _padding_cost(size: SamSize) -> int:
    """Multiply-adds of the four projections of cells that only fill up windows."""
    side = -(-size.cells // size.window) * size.window
    blocks = size.depth - len(size.global_blocks)
    return blocks * (side**2 - size.cells**2) * 4 * size.width**2


def _encoder_cost(size: SamSize, network: ReferringNetwork) -> int:
    from rt_ris_train.backbones.sam import SamEncoder

    with torch.device("meta"):
        encoder = SamEncoder(size)
        image = torch.zeros(1, 3, size.image_size, size.image_size)
    return multiply_adds(partial(encoder, image))


def trained(network: ReferringNetwork) -> int:
    """Number of weights that train."""
    return sum(value.numel() for value in network.parameters() if value.requires_grad)
