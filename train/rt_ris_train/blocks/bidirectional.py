"""DMMI's multi-scale bidirectional attention (toggle1995/RIS-DMMI @753cd60, class PWAM).

Pixels look at words through windows of one, three and five cells, words at pixels through runs of
one, two and three words. The authors unfold a window and multiply; here a convolution does it.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from rt_ris_train.blocks.attention import to_grid, to_tokens

MASKED: Final = -1e4
EPSILON: Final = 1e-5
WINDOWS: Final = (1, 3, 5)
RUNS: Final = (1, 2, 3)


def instance_norm(tokens: Tensor) -> Tensor:
    """[N, P, C] with mean 0 and variance 1 of each channel over P, as InstanceNorm1d."""
    centred = tokens - tokens.mean(1, keepdim=True)
    return centred * torch.rsqrt(centred.square().mean(1, keepdim=True) + EPSILON)


class PixelQuery(nn.Module):
    """What a window of cells asks for."""

    def __init__(self, *, width: int, inner: int, words: int, window: int) -> None:
        super().__init__()
        self.key = nn.Linear(words, width)
        self.squeeze = nn.Linear(width, inner)
        self.gather = nn.Conv2d(inner, width, window, padding=window // 2)

    def forward(self, pixels: Tensor, words: Tensor, real: Tensor, cells: int) -> Tensor:
        """Scores before scaling, [N, P, L], of pixels [N, P, C] and words [N, L, D]."""
        squeezed = instance_norm(self.squeeze(pixels))
        asked = instance_norm(to_tokens(self.gather(to_grid(squeezed, cells))))
        keys = self.key(words) * real
        scores: Tensor = asked @ keys.mT
        return scores


class WordQuery(nn.Module):
    """What a run of words asks for; the first and last words are repeated outside."""

    def __init__(self, *, width: int, inner: int, words: int, run: int) -> None:
        super().__init__()
        self.run = run
        self.key = nn.Linear(width, words)
        self.squeeze = nn.Linear(words, inner)
        self.gather = nn.Conv1d(inner, words, run)

    def forward(self, pixels: Tensor, words: Tensor, real: Tensor) -> Tensor:
        """Scores before scaling, [N, L, P]."""
        line = self.squeeze(words).transpose(1, 2)
        around = (self.run // 2, (self.run - 1) // 2)
        first, last = line[:, :, :1], line[:, :, -1:]
        padded = torch.cat((first,) * around[0] + (line,) + (last,) * around[1], dim=2)
        asked = self.gather(padded).transpose(1, 2) * real
        keys = instance_norm(self.key(pixels))
        scores: Tensor = asked @ keys.mT
        return scores


class BidirectionalAttention(nn.Module):
    """Both directions from the same inputs."""

    def __init__(self, *, width: int, words: int) -> None:
        super().__init__()
        self.scale = (
            width**-0.5
        )  # both directions: the dot products of words are over D all the same
        self.vis_project, self.project_mm = nn.Linear(width, width), nn.Linear(width, width)
        self.word_value, self.pixel_value = nn.Linear(words, width), nn.Linear(width, words)
        self.to_pixels, self.to_words = nn.Linear(width, width), nn.Linear(words, words)
        self.vis_weight, self.lan_weight = (nn.Parameter(torch.ones(3)) for _ in range(2))
        self.pixel_queries = nn.ModuleList(
            PixelQuery(width=width, inner=width // divisor, words=words, window=window)
            for window, divisor in zip(WINDOWS, (1, 2, 4), strict=True)
        )
        self.word_queries = nn.ModuleList(
            WordQuery(width=width, inner=width // run, words=words, run=run) for run in RUNS
        )

    def forward(
        self, pixels: Tensor, words: Tensor, token_mask: Tensor, cells: int
    ) -> tuple[Tensor, Tensor]:
        """What the words give the pixels, [N, P, C], and the pixels the words, [N, L, D].

        Args:
            pixels: [N, P, C].
            words: [N, L, D].
            token_mask: bool [N, L].
            cells: h = w.
        """
        real = token_mask.to(words.dtype)[..., None]
        hidden = MASKED * (1 - real)
        shares = self.vis_weight.softmax(0)
        seen = [
            share * (query(pixels, words, real, cells) * self.scale + hidden.mT).softmax(-1)
            for share, query in zip(shares, self.pixel_queries, strict=True)
        ]
        language = sum(seen[1:], seen[0]) @ (self.word_value(words) * real)
        visual = functional.gelu(self.vis_project(pixels))
        joined = visual * instance_norm(self.to_pixels(language))
        return functional.gelu(self.project_mm(joined)), self._to_words(pixels, words, real)

    def _to_words(self, pixels: Tensor, words: Tensor, real: Tensor) -> Tensor:
        hidden = MASKED * (1 - real)
        shares = self.lan_weight.softmax(0)
        read = [
            share * (query(pixels, words, real) * self.scale + hidden).softmax(-1)
            for share, query in zip(shares, self.word_queries, strict=True)
        ]
        values = instance_norm(self.pixel_value(pixels))
        found: Tensor = self.to_words(sum(read[1:], read[0]) @ values)
        return found


class Exchange(nn.Module):
    """The attention behind one stage, the gate that lets pixels take it, and the words' share."""

    def __init__(self, *, width: int, words: int) -> None:
        super().__init__()
        self.fusion = BidirectionalAttention(width=width, words=words)
        self.res_gate = nn.Sequential(
            nn.Linear(width, width, bias=False),
            nn.ReLU(),
            nn.Linear(width, width, bias=False),
            nn.Tanh(),
        )
        self.word_share = nn.Linear(words, words)

    def forward(
        self, pixels: Tensor, words: Tensor, token_mask: Tensor, cells: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels and words with what they gained, and the pixels' gain itself."""
        gained, read = self.fusion(pixels, words, token_mask, cells)
        pixels = pixels + self.res_gate(gained) * gained
        return pixels, words + functional.gelu(self.word_share(read)), gained
