"""The Transformer decoder layer that several systems share."""

from __future__ import annotations

from torch import Tensor, nn

from rt_ris_train.blocks.attention import PackedAttention


class TransformerLayer(nn.Module):
    """Self-attention, attention to a memory, feed-forward with ReLU; a norm after each.

    Names and arithmetic are those of ``torch.nn.TransformerDecoderLayer`` with its defaults, and of
    the interactor of ETRIS.
    """

    def __init__(self, *, width: int, heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = PackedAttention(width=width, heads=heads, dropout=dropout)
        self.multihead_attn = PackedAttention(width=width, heads=heads, dropout=dropout)
        self.linear1, self.linear2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        own: Tensor,
        memory: Tensor,
        *,
        visible: Tensor | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """One layer.

        Args:
            own: [N, P, C].
            memory: [N, L, C].
            visible: bool [N, P], false for own tokens that nobody may see.
            places: positions that are added to the memory as keys, [L, C].

        Returns:
            [N, P, C].
        """
        own = self.norm1(own + self.dropout(self.self_attn(own, own, own, visible=visible)))
        keys = memory if places is None else memory + places
        own = self.norm2(own + self.dropout(self.multihead_attn(own, keys, memory)))
        hidden = self.dropout(self.linear1(own).relu())
        found: Tensor = self.norm3(own + self.dropout(self.linear2(hidden)))
        return found
