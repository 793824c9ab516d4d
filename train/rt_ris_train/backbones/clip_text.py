"""CLIP's text tower (open_clip's ``TextTransformer`` parts, MIT) and its tokenizer."""

from __future__ import annotations

import gzip
from dataclasses import dataclass
from importlib import resources
from typing import Final

import torch
from open_clip.transformer import QuickGELU, Transformer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn

from rt_ris_train.architecture import OfficialFile

VOCABULARY: Final = 49408
START: Final = 49406
END: Final = 49407
POSITIONS: Final = 77
MERGES: Final = 48894


@dataclass(frozen=True, kw_only=True)
class ClipTextSize:
    """Width, heads and layers of the tower."""

    width: int = 512
    heads: int = 8
    layers: int = 12


class ClipText(nn.Module):
    """CLIP's text tower: word features, and where a projection is asked for the sentence's.

    Padding stands after the end token and attention is causal, so no real token sees a pad.

    Args:
        size: of the tower.
        length: L, number of token positions.
        projection: D', width of the sentence feature; None where nobody reads it.
    """

    causal: Tensor

    def __init__(self, size: ClipTextSize, *, length: int, projection: int | None = None) -> None:
        super().__init__()
        self.length = length
        self.token_embedding = nn.Embedding(VOCABULARY, size.width)
        self.positional_embedding = nn.Parameter(torch.empty(POSITIONS, size.width))
        self.transformer = Transformer(
            width=size.width, layers=size.layers, heads=size.heads, act_layer=QuickGELU
        )
        self.ln_final = nn.LayerNorm(size.width)
        nn.init.normal_(self.token_embedding.weight, std=0.02)
        nn.init.normal_(self.positional_embedding, std=0.01)
        self.text_projection: nn.Parameter | None = None
        if projection is not None:
            drawn = torch.randn(size.width, projection) * size.width**-0.5
            self.text_projection = nn.Parameter(drawn)
        causal = torch.full((length, length), float("-inf")).triu(1)
        self.register_buffer("causal", causal, persistent=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        """Word features: int32 [N, L] to ``ln_final`` of every token, float32 [N, L, width]."""
        found: Tensor = self.ln_final(self.blocks(self.embed(token_ids)))
        return found

    def embed(self, token_ids: Tensor) -> Tensor:
        """int32 [N, L] to what enters the first block, [N, L, width]."""
        words: Tensor = self.token_embedding(token_ids)
        return words + self.positional_embedding[: self.length]

    def blocks(self, words: Tensor, *, first: int = 0, stop: int | None = None) -> Tensor:
        """Some of the blocks in a row, [N, L, width]."""
        for block in self.transformer.resblocks[first:stop]:
            words = block(words, attn_mask=self.causal)
        return words

    def sentence(self, words: Tensor, token_ids: Tensor) -> Tensor:
        """The projected feature of the end token, not normalised, [N, D'].

        Args:
            words: what ``forward`` gives.
            token_ids: int32 [N, L]; the end token has the greatest id.
        """
        assert self.text_projection is not None
        at_end = (token_ids == END).to(words.dtype)[:, None]
        return (at_end @ words)[:, 0] @ self.text_projection


UNUSED: Final = {
    "visual.": "the image tower",
    "logit_scale": "of CLIP's own loss",
    "input_resolution": "a number, no weight",
    "context_length": "a number, no weight",
    "vocab_size": "a number, no weight",
}
"""What CLIP's files hold beside the text tower."""


def official_file(encoder: ClipText, prefix: str) -> OfficialFile:
    """How a released CLIP state dict fills the tower; names are OpenAI's and open_clip's."""
    unused = dict(UNUSED)
    if encoder.text_projection is None:
        unused["text_projection"] = "words are not projected"
    return OfficialFile(
        title="CLIP, a state dict with OpenAI's names",
        keys={prefix + name: name for name in encoder.state_dict()},
        unused=unused,
    )


def tokenizer_json() -> str:
    """CLIP's byte-level BPE as a ``tokenizers`` document, with start and end token.

    The authors' tokenizer also repairs broken Unicode (ftfy) and unescapes HTML; neither is part
    of this document.
    """
    merges = _merges()
    alphabet = _byte_alphabet()
    vocabulary = [*alphabet, *(symbol + "</w>" for symbol in alphabet)]
    vocabulary += ["".join(pair) for pair in merges]
    vocabulary += ["<start_of_text>", "<end_of_text>"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(vocabulary)},
            merges=merges,
            end_of_word_suffix="</w>",
            unk_token="<end_of_text>",
        )
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.BPEDecoder(suffix="</w>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start_of_text> $A <end_of_text>",
        special_tokens=[("<start_of_text>", START), ("<end_of_text>", END)],
    )
    document: str = tokenizer.to_str()
    return document


def _merges() -> list[tuple[str, str]]:
    packed = resources.files("open_clip").joinpath("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    lines = gzip.decompress(packed).decode("utf-8").split("\n")[1 : MERGES + 1]
    pairs = [line.split() for line in lines]
    return [(first, second) for first, second in pairs]


def _byte_alphabet() -> list[str]:
    """One printable character per byte, in the order of GPT-2's and CLIP's vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(hidden))]
