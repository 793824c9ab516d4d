"""SAM's image encoder with taps (segment-anything's ``ImageEncoderViT``, Apache-2.0).

The weights and windows are that library's; its attention is written anew, exactly equal, in a form
that engines fuse: the relative positions are one bias on the scores of a plain softmax attention.
As the library writes them, in five dimensions on a merged axis, no engine sees an attention there.
"""

from __future__ import annotations

from functools import partial
from typing import Final

from segment_anything.modeling.image_encoder import (
    Attention,
    Block,
    ImageEncoderViT,
    get_rel_pos,
    window_partition,
    window_unpartition,
)
from torch import Tensor, nn
from torch.nn.functional import linear

from rt_ris_train.architecture import OfficialFile
from rt_ris_train.backbones.sam_sizes import SamSize

PREFIX: Final = "image_encoder."
MEAN: Final = (123.675, 116.28, 103.53)
STD: Final = (58.395, 57.12, 57.375)


class SamEncoder(nn.Module):
    """Outputs of the second, third and fourth global-attention block, before the neck."""

    def __init__(self, size: SamSize) -> None:
        super().__init__()
        self.taps = size.global_blocks[1:]
        self.network = ImageEncoderViT(
            img_size=size.image_size,
            embed_dim=size.width,
            depth=size.depth,
            num_heads=size.heads,
            norm_layer=partial(nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=size.window,
            global_attn_indexes=size.global_blocks,
        )
        # The neck serves SAM's own decoder; nothing here reads it.
        self.network.neck = nn.Identity()

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """float32 [B, 3, S, S], normalised, to three maps [B, S/16, S/16, width]."""
        features = self.network.patch_embed(image) + self.network.pos_embed
        found = []
        for index, block in enumerate(self.network.blocks):
            features = _block(block, features)
            if index in self.taps:
                found.append(features)
        return tuple(found)


def _block(block: Block, features: Tensor) -> Tensor:
    """What the library's block does, [B, h, w, C] to the same shape."""
    normal = block.norm1(features)
    if block.window_size:
        mixed = _in_windows(block.attn, normal, block.window_size)
    else:
        mixed = biased_attention(block.attn, block.attn.qkv(normal))
    features = features + block.attn.proj(mixed)
    merged: Tensor = features + block.mlp(block.norm2(features))
    return merged


def _in_windows(attention: Attention, features: Tensor, window: int) -> Tensor:
    """Attention within windows, whose padding costs no projection.

    The library pads features with zeros and projects them; zeros stay zeros until the bias. What
    attention makes of padding is cropped before the last projection.
    """
    projected = linear(features, attention.qkv.weight)
    windows, padded = window_partition(projected, window)
    mixed = biased_attention(attention, windows + attention.qkv.bias)
    cropped: Tensor = window_unpartition(mixed, window, padded, features.shape[1:3])
    return cropped


def biased_attention(attention: Attention, packed: Tensor) -> Tensor:
    """The library's attention between its projections, its relative positions as one bias.

    Args:
        attention: its weights.
        packed: [B, h, w, 3 C], queries, keys and values.

    Returns:
        [B, h, w, C].
    """
    count, rows, columns, three = packed.shape
    cells, heads, width = rows * columns, attention.num_heads, three // 3
    split = packed.reshape(count, cells, 3, heads, width // heads)
    query, key, value = split.permute(2, 0, 3, 1, 4).unbind(0)
    placed = query.reshape(count, heads, rows, columns, width // heads)
    by_row = placed @ get_rel_pos(rows, rows, attention.rel_pos_h).transpose(1, 2)
    by_column = placed.transpose(2, 3) @ get_rel_pos(
        columns, columns, attention.rel_pos_w
    ).transpose(1, 2)
    bias = by_row[..., :, None] + by_column.transpose(2, 3)[..., None, :]
    scores = (query * attention.scale) @ key.transpose(2, 3)
    weights = (scores + bias.reshape(count, heads, cells, cells)).softmax(-1)
    mixed: Tensor = (weights @ value).transpose(1, 2).reshape(count, rows, columns, width)
    return mixed


def official_file(encoder: SamEncoder, prefix: str) -> OfficialFile:
    """How a released SAM file fills the encoder; ``prefix`` is the encoder's place in a network."""
    keys = {f"{prefix}network.{name}": PREFIX + name for name in encoder.network.state_dict()}
    return OfficialFile(
        title="SAM, sam_vit_*.pth",
        keys=keys,
        unused={
            PREFIX + "neck.": "taps are taken before the neck",
            "prompt_encoder.": "of SAM's own decoder",
            "mask_decoder.": "of SAM's own decoder",
        },
    )
