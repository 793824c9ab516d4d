"""Multi-head attention in the form that exporters and engines fuse."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    visible: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Scaled dot-product attention of projected queries, keys and values.

    Args:
        query: [N, Q, C].
        key: [N, K, C].
        value: [N, K, C].
        heads: that share C.
        visible: bool [N, K], false for keys that nobody may see; each row has a true one.
        dropout: share of weights that is dropped.

    Returns:
        [N, Q, C].
    """
    mixed = functional.scaled_dot_product_attention(
        _split(query, heads),
        _split(key, heads),
        _split(value, heads),
        attn_mask=None if visible is None else visible[:, None, None, :],
        dropout_p=dropout,
    )
    return mixed.transpose(1, 2).flatten(2)


def _split(value: Tensor, heads: int) -> Tensor:
    count, length, width = value.shape
    return value.reshape(count, length, heads, width // heads).transpose(1, 2)


def to_tokens(grid: Tensor) -> Tensor:
    """[N, C, h, w] to [N, P, C]."""
    return grid.flatten(2).transpose(1, 2)


def to_grid(tokens: Tensor, cells: int) -> Tensor:
    """[N, P, C] to [N, C, h, w] with h = w = ``cells``."""
    count, _, width = tokens.shape
    return tokens.transpose(1, 2).reshape(count, width, cells, cells)


class MultiHeadAttention(nn.Module):
    """Attention with biased projections, batch first, no dropout."""

    def __init__(self, *, width: int, heads: int) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"A width of {width} cannot be shared by {heads} heads.")
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, visible: Tensor | None = None
    ) -> Tensor:
        """Attend from [N, Q, C] to [N, K, C]; ``visible`` as in ``attend``."""
        asked, keys, values = self.query(query), self.key(key), self.value(value)
        merged: Tensor = self.out(attend(asked, keys, values, heads=self.heads, visible=visible))
        return merged


class PackedAttention(nn.Module):
    """Attention whose weights are packed as in ``torch.nn.MultiheadAttention``, so that files fit.

    The query, key and value projections lie on one another in ``in_proj_weight`` [3C, C].
    """

    def __init__(self, *, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, *, visible: Tensor | None = None
    ) -> Tensor:
        """Attend from [N, Q, C] to [N, K, C]; ``visible`` as in ``attend``."""
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        mixed = attend(
            functional.linear(query, weights[0], biases[0]),
            functional.linear(key, weights[1], biases[1]),
            functional.linear(value, weights[2], biases[2]),
            heads=self.heads,
            visible=visible,
            dropout=self.dropout if self.training else 0.0,
        )
        merged: Tensor = self.out_proj(mixed)
        return merged
