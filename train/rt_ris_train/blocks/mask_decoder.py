"""Mask decoder of MARIS (arXiv 2311.15727 v1, section 3.3, equations 6 to 8)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from rt_ris_train.blocks.attention import MultiHeadAttention
from rt_ris_train.blocks.feature_enhancement import ConvBlock
from rt_ris_train.blocks.positions import sine_positions


class DecoderBlock(nn.Module):
    """Self-attention of pixels and of the query set, then attention from pixels to queries.

    The printed equations have a residual around each attention and no norm; the norm sits inside
    (on the attention's inputs), so the equations hold as printed.
    """

    def __init__(self, *, width: int, heads: int, cells: int, key_pool: int) -> None:
        super().__init__()
        self.cells, self.key_pool = cells, key_pool
        self.norm_v = nn.LayerNorm(width)
        self.norm_q = nn.LayerNorm(width)
        self.norm_cross_v = nn.LayerNorm(width)
        self.norm_cross_q = nn.LayerNorm(width)
        self.self_v = MultiHeadAttention(width=width, heads=heads)
        self.self_q = MultiHeadAttention(width=width, heads=heads)
        self.cross = MultiHeadAttention(width=width, heads=heads)

    def forward(
        self, pixels: Tensor, queries: Tensor, visible: Tensor, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        """One block.

        Args:
            pixels: V, [N, P, C].
            queries: Q, [N, 1 + L, C].
            visible: bool [N, 1 + L], false for padded words.
            places: position encodings [P, C], zeros where they are switched off.
        """
        normed = self.norm_v(pixels)
        placed = normed + places
        pixels = pixels + self.self_v(placed, self._pooled(placed), self._pooled(normed))
        normed_q = self.norm_q(queries)
        queries = queries + self.self_q(normed_q, normed_q, normed_q, visible=visible)
        keys = self.norm_cross_q(queries)
        asked = self.norm_cross_v(pixels) + places
        return pixels + self.cross(asked, keys, keys, visible=visible), queries

    def _pooled(self, pixels: Tensor) -> Tensor:
        """Means over squares of cells, [N, P, C] to [N, P / key_pool^2, C]."""
        if self.key_pool == 1:
            return pixels
        width = pixels.shape[2]
        grid = pixels.transpose(1, 2).reshape(-1, width, self.cells, self.cells)
        return functional.avg_pool2d(grid, self.key_pool).flatten(2).transpose(1, 2)


class QueryHead(nn.Module):
    """Three linear layers with ReLU, as SAM's hypernetwork heads."""

    def __init__(self, *, width: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, outputs),
        )

    def forward(self, query: Tensor) -> Tensor:
        """[N, C] to [N, C']."""
        found: Tensor = self.layers(query)
        return found


class MaskDecoder(nn.Module):
    """Language-aware pixels and vision-aware words to mask logits.

    The product with the query is taken before the last doubling: interpolation is linear, so the
    order does not change the logits, and one channel is interpolated instead of C/8.
    """

    places: Tensor

    def __init__(
        self,
        *,
        width: int,
        heads: int,
        blocks: int,
        cells: int,
        key_pool: int,
        positions: bool,
        edges: bool,
        existence: bool,
    ) -> None:
        super().__init__()
        self.cells = cells
        self.query = nn.Parameter(torch.empty(1, width))
        nn.init.normal_(self.query, std=0.02)
        self.blocks = nn.ModuleList(
            DecoderBlock(width=width, heads=heads, cells=cells, key_pool=key_pool)
            for _ in range(blocks)
        )
        places = sine_positions(cells=cells, width=width) if positions else torch.zeros(1, width)
        self.register_buffer("places", places, persistent=False)
        self.norm_v = nn.LayerNorm(width)
        self.norm_q = nn.LayerNorm(width)
        self.up_first = ConvBlock(inputs=width, outputs=width // 4)
        self.up_second = ConvBlock(inputs=width // 4, outputs=width // 8)
        self.head = QueryHead(width=width, outputs=width // 8)
        self.existence = ExistenceHead(width=width) if existence else None
        self.edges = edges

    def forward(
        self, f_lav: Tensor, f_val: Tensor, token_mask: Tensor, edges: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Decode N sentences.

        Args:
            f_lav: language-aware pixels [N, P, C].
            f_val: vision-aware words [N, L, C].
            token_mask: bool [N, L].
            edges: fine features [N or 1, C/4, 2h, 2w] added after the first doubling.

        Returns:
            Logits [N, 4h, 4w] and, with an existence head, its logit [N].
        """
        count = f_val.shape[0]
        queries = torch.cat((self.query.expand(count, 1, -1), f_val), dim=1)
        visible = torch.cat((torch.ones_like(token_mask[:, :1]), token_mask), dim=1)
        pixels = f_lav
        for block in self.blocks:
            pixels, queries = block(pixels, queries, visible, self.places)
        pixels, query = self.norm_v(pixels), self.norm_q(queries)[:, 0]
        logits = self._logits(pixels, query, edges)
        if self.existence is None:
            return (logits,)
        return logits, self.existence(pixels, query)

    def _logits(self, pixels: Tensor, query: Tensor, edges: Tensor | None) -> Tensor:
        """[N, P, C] and [N, C] to [N, 4h, 4w]."""
        grid = pixels.transpose(1, 2).reshape(-1, pixels.shape[2], self.cells, self.cells)
        fine = functional.interpolate(self.up_first(grid), scale_factor=2, mode="bilinear")
        if edges is not None:
            fine = fine + edges
        fine = self.up_second(fine)
        kernel = self.head(query)
        product = kernel[:, None, :] @ fine.flatten(2)
        product = product.reshape(-1, 1, fine.shape[2], fine.shape[3])
        return functional.interpolate(product, scale_factor=2, mode="bilinear")[:, 0]


class ExistenceHead(nn.Module):
    """Whether the sentence names something in the picture; an extension, not of the paper.

    The query looks once over all pixels; what it finds and the query itself decide.
    """

    def __init__(self, *, width: int) -> None:
        super().__init__()
        self.look = nn.Linear(width, width)
        self.layers = nn.Sequential(nn.Linear(2 * width, width), nn.ReLU(), nn.Linear(width, 1))

    def forward(self, pixels: Tensor, query: Tensor) -> Tensor:
        """[N, P, C] and [N, C] to [N]."""
        scores = self.look(query)[:, None, :] @ pixels.transpose(1, 2)
        found = (scores * pixels.shape[-1] ** -0.5).softmax(-1) @ pixels
        decided: Tensor = self.layers(torch.cat((found[:, 0], query), dim=-1))
        return decided[:, 0]
