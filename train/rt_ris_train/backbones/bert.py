"""BERT as a text encoder whose layers may train (transformers' BertModel, Apache-2.0)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from transformers import BertConfig, BertModel


@dataclass(frozen=True, kw_only=True)
class BertSize:
    """Sizes of bert-base-uncased, and the layers that train; None trains everything."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    hidden: int = 3072
    vocabulary: int = 30522
    trained: Sequence[int] | None = tuple(range(10))


class Bert(nn.Module):
    """The last hidden state of every token, special ones and pads included."""

    def __init__(self, size: BertSize) -> None:
        super().__init__()
        config = BertConfig(
            vocab_size=size.vocabulary,
            hidden_size=size.width,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=size.hidden,
        )
        self.network = BertModel(config, add_pooling_layer=False)
        if size.trained is not None:
            self.network.requires_grad_(False)
            for layer in size.trained:
                self.network.encoder.layer[layer].requires_grad_(True)

    def forward(self, token_ids: Tensor, token_mask: Tensor) -> Tensor:
        """int32 [N, L] and bool [N, L] to float32 [N, L, D]; padding is never attended to."""
        visible = token_mask[:, None, None, :].expand(-1, 1, token_ids.shape[1], -1)
        found: Tensor = self.network(
            input_ids=token_ids, attention_mask=visible, use_cache=False
        ).last_hidden_state
        return found
