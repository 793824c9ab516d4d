"""Multi-head attention in the form that exporters and engines fuse."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional


class MultiHeadAttention(nn.Module):
    """Scaled dot-product attention with biased projections, batch first, no dropout."""

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
        """Attend from [N, Q, C] to [N, K, C].

        Args:
            query: [N, Q, C].
            key: [N, K, C].
            value: [N, K, C].
            visible: bool [N, K], false for keys that nobody may see; each row has a true one.
        """
        mask = None if visible is None else visible[:, None, None, :]
        mixed = functional.scaled_dot_product_attention(
            self._split(self.query(query)),
            self._split(self.key(key)),
            self._split(self.value(value)),
            attn_mask=mask,
        )
        merged: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return merged

    def _split(self, value: Tensor) -> Tensor:
        count, length, width = value.shape
        return value.reshape(count, length, self.heads, width // self.heads).transpose(1, 2)
