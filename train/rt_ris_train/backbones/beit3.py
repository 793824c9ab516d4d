"""BEiT-3's encoder on a picture and a sentence (microsoft/unilm @768a3c8, torchscale @4d1e0e8).

Every weight is there twice, for image tokens and for text tokens; only the attention mixes the two.
torchscale splits one sequence before each layer and joins it behind; here the two streams stay
apart and are joined for the attention alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from rt_ris_train.architecture import Conversion, OfficialFile
from rt_ris_train.backbones.clip_image import resize_matrix
from rt_ris_train.blocks.attention import attend, to_tokens

OFFSET: Final = 2
"""Rows of both position tables that stand before the first token and are never read."""

TEXT_POSITIONS: Final = 1024
Streams = tuple[Tensor, Tensor]
"""Image tokens [N, 1 + P, d], the class token first, and text tokens [N, L, d]."""


@dataclass(frozen=True, kw_only=True)
class Beit3Size:
    """Sizes of the encoder; ``taps`` are the layers, counted from 1, whose outputs are read."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    taps: tuple[int, ...] = (3, 6, 9, 12)
    vocabulary: int = 64010
    patch: int = 16
    drop_path: float = 0.1


class Expert(nn.Module):
    """One layer's weights for one kind of token."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention_norm, self.inner_norm, self.feed_norm = (
            nn.LayerNorm(width) for _ in range(3)
        )
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))
        self.widen, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.wide_norm = nn.LayerNorm(4 * width)

    def project(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values."""
        normed = self.attention_norm(tokens)
        return self.query(normed), self.key(normed), self.value(normed)

    def attended(self, mixed: Tensor) -> Tensor:
        """What the attention gave, normed and projected."""
        found: Tensor = self.out(self.inner_norm(mixed))
        return found

    def feed(self, tokens: Tensor) -> Tensor:
        """The feed-forward branch."""
        hidden = functional.gelu(self.widen(self.feed_norm(tokens)))
        found: Tensor = self.narrow(self.wide_norm(hidden))
        return found


class Layer(nn.Module):
    """Two experts around one attention."""

    def __init__(self, size: Beit3Size, *, drop_path: float) -> None:
        super().__init__()
        self.heads, self.drop_path = size.heads, drop_path
        self.image, self.text = Expert(size.width), Expert(size.width)

    def forward(self, image: Tensor, text: Tensor, visible: Tensor) -> Streams:
        """One layer; ``visible`` is bool [N, 1 + P + L]."""
        split = image.shape[1]
        pairs = zip(self.image.project(image), self.text.project(text), strict=True)
        joined = [torch.cat(pair, dim=1) for pair in pairs]
        mixed = attend(joined[0], joined[1], joined[2], heads=self.heads, visible=visible)
        kept = self._kept(image)
        image = image + kept * self.image.attended(mixed[:, :split])
        text = text + kept * self.text.attended(mixed[:, split:])
        kept = self._kept(image)
        return image + kept * self.image.feed(image), text + kept * self.text.feed(text)

    def _kept(self, tokens: Tensor) -> Tensor | float:
        """Stochastic depth: in training some samples skip the branch, both streams of them."""
        if not self.training or self.drop_path == 0:
            return 1.0
        keep = 1 - self.drop_path
        drawn = tokens.new_empty(tokens.shape[0], 1, 1).bernoulli_(keep)
        return drawn / keep


class Beit3(nn.Module):
    """The encoder with taps."""

    def __init__(self, size: Beit3Size, *, image_size: int, length: int) -> None:
        super().__init__()
        self.size, self.length, self.cells = size, length, image_size // size.patch
        self.patches = nn.Conv2d(3, size.width, size.patch, stride=size.patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, size.width))
        self.words = nn.Embedding(size.vocabulary, size.width)
        rows = self.cells**2 + 1 + OFFSET
        self.image_positions = nn.Parameter(torch.empty(rows, size.width))
        self.text_positions = nn.Parameter(torch.empty(TEXT_POSITIONS, size.width))
        steps = max(size.layers - 1, 1)
        self.layers = nn.ModuleList(
            Layer(size, drop_path=size.drop_path * index / steps) for index in range(size.layers)
        )
        self.image_norm, self.text_norm = nn.LayerNorm(size.width), nn.LayerNorm(size.width)
        for table in (self.words.weight, self.image_positions, self.text_positions):
            nn.init.normal_(table, std=size.width**-0.5)

    def forward(self, image: Tensor, token_ids: Tensor, token_mask: Tensor) -> list[Streams]:
        """The tapped layers' outputs; the last of them went through the encoder's norm.

        Args:
            image: normalised, [N or 1, 3, S, S].
            token_ids: int32 [N, L].
            token_mask: bool [N, L].
        """
        count = token_ids.shape[0]
        seen = self._embed_image(image)
        seen = seen.expand(count, -1, -1)
        read = self.words(token_ids) + self.text_positions[OFFSET : OFFSET + self.length]
        read = read * token_mask[..., None]
        visible = torch.cat((token_mask.new_ones(count, seen.shape[1]), token_mask), dim=1)
        found: list[Streams] = []
        for number, layer in enumerate(self.layers, start=1):
            seen, read = layer(seen, read, visible)
            if number in self.size.taps:
                found.append((seen, read))
        last = found.pop()
        return [*found, (self.image_norm(last[0]), self.text_norm(last[1]))]

    def _embed_image(self, image: Tensor) -> Tensor:
        patches = to_tokens(self.patches(image))
        first = self.class_token.expand(patches.shape[0], -1, -1)
        return torch.cat((first, patches), dim=1) + self.image_positions[OFFSET:]


def official_file(encoder: Beit3, prefix: str) -> OfficialFile:
    """How a released BEiT-3 fills the encoder; ``prefix`` is the encoder's place in a network."""
    size = encoder.size
    released = (224 // size.patch) ** 2 + 1 + OFFSET

    def resized(table: Tensor) -> Tensor:
        first = 1 + OFFSET
        matrix = resize_matrix(224 // size.patch, encoder.cells)
        return torch.cat((table[:first], matrix @ table[first:]))

    return OfficialFile(
        title="BEiT-3, beit3_*_patch16_224.pth",
        keys={f"{prefix}{name}": _released_name(name) for name in encoder.state_dict()},
        unused={
            "beit3.vision_embed.mask_token": "of the pre-training that hides patches",
            "mlm_head.": "a head of the pre-training",
            "mim_head.": "a head of the pre-training",
        },
        conversions={
            f"{prefix}image_positions": Conversion(shape=(released, size.width), apply=resized)
        },
    )


_OUTSIDE: Final[Mapping[str, str]] = {
    "patches.": "beit3.vision_embed.proj.",
    "class_token": "beit3.vision_embed.cls_token",
    "words.": "beit3.text_embed.",
    "image_positions": "beit3.encoder.embed_positions.A.weight",
    "text_positions": "beit3.encoder.embed_positions.B.weight",
    "image_norm.": "beit3.encoder.layer_norm.A.",
    "text_norm.": "beit3.encoder.layer_norm.B.",
}
_INSIDE: Final[Mapping[str, str]] = {
    "attention_norm": "self_attn_layer_norm.{}",
    "inner_norm": "self_attn.inner_attn_ln.{}",
    "feed_norm": "final_layer_norm.{}",
    "query": "self_attn.q_proj.{}",
    "key": "self_attn.k_proj.{}",
    "value": "self_attn.v_proj.{}",
    "out": "self_attn.out_proj.{}",
    "widen": "ffn.{}.fc1",
    "narrow": "ffn.{}.fc2",
    "wide_norm": "ffn.{}.ffn_layernorm",
}


def _released_name(name: str) -> str:
    for own, released in _OUTSIDE.items():
        if name.startswith(own):
            return released + name[len(own) :]
    _, index, expert, part, kind = name.split(".")
    inside = _INSIDE[part].format("A" if expert == "image" else "B")
    return f"beit3.encoder.layers.{index}.{inside}.{kind}"
