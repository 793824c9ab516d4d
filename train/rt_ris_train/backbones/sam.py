"""SAM's image encoder with taps (segment-anything's ``ImageEncoderViT``, Apache-2.0)."""

from __future__ import annotations

from functools import partial
from typing import Final

from segment_anything.modeling.image_encoder import ImageEncoderViT
from torch import Tensor, nn

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
            features = block(features)
            if index in self.taps:
                found.append(features)
        return tuple(found)


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
