"""Ids of a converted sentencepiece model are sentencepiece's own, in XLM-RoBERTa's counting."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from rt_ris.errors import CheckpointError
from rt_ris.spec import TextSpec
from rt_ris.text import Tokenizer
from rt_ris_train.backbones.spm import tokenizer_json

SENTENCES = [
    f"{article} {colour} {noun} {place}"
    for article in ("the", "a", "The")
    for colour in ("red", "dark blue", "yellow", "light-green")
    for noun in ("bus", "man", "woman's hat", "bottle", "kid", "2nd chair")
    for place in ("on the left", "behind the table", "in front", "at the café", "near you!")
]


def trained(options: Mapping[str, Any] | None = None) -> bytes:
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES),
        model_writer=out,
        minloglevel=2,
        vocab_size=400,
        hard_vocab_limit=False,
        **(options or {}),
    )
    return out.getvalue()


CONTENT = trained()
ORIGINAL = sentencepiece.SentencePieceProcessor(model_proto=CONTENT)
CONVERTED = Tokenizer(tokenizer_json(CONTENT).encode(), TextSpec(max_tokens=256, pad_id=1))


def original_ids(sentence: str) -> list[int]:
    return [0, *(piece + 1 if piece else 3 for piece in ORIGINAL.encode(sentence)), 2]


def converted_ids(sentence: str) -> list[int]:
    tokens = CONVERTED.encode([sentence])
    ids: list[int] = tokens.token_ids[0][tokens.token_mask[0]].tolist()
    return ids


@pytest.mark.parametrize(
    "sentence",
    [
        *SENTENCES[::7],
        "  two   spaces  ",
        "tab\tand\nline",
        "\uff26\uff35\uff2c\uff2c \uff57idth",
        "日本 unknown 字 letters",
        "<s> the </s>",
        "▁ the man",
        "Ünïcode½",
        "the\u00a0man",
    ],
)
def test_ids_are_those_of_sentencepiece(sentence: str) -> None:
    assert converted_ids(sentence) == original_ids(sentence)


@given(st.text("the redbusman ABCxyz.,'!?0123456789-éßñ日 ", min_size=1, max_size=40))
def test_any_line_of_letters_has_the_same_ids(sentence: str) -> None:
    if sentence.strip() and len(original_ids(sentence)) > 2:
        assert converted_ids(sentence) == original_ids(sentence)


def test_pads_are_ones() -> None:
    spec = TextSpec(max_tokens=20, pad_id=1)
    tokens = Tokenizer(tokenizer_json(CONTENT).encode(), spec).encode(["red bus"])
    assert (tokens.token_ids[0] == 1).sum() == 20 - int(tokens.token_mask.sum())
    assert np.array_equal(tokens.token_ids[0] == 1, ~tokens.token_mask[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"model_type": "bpe"}, "is no unigram model"),
        ({"byte_fallback": True}, "falls back to bytes"),
        ({"user_defined_symbols": ["<mask>"]}, "has user-defined pieces"),
        ({"bos_id": -1}, "does not begin with"),
    ],
)
def test_other_kinds_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(CheckpointError, match=said):
        tokenizer_json(trained(options))


@pytest.mark.parametrize("content", [b"", b"<html>not found</html>", CONTENT[: len(CONTENT) // 3]])
def test_what_is_no_vocabulary_is_refused(content: bytes) -> None:
    with pytest.raises(CheckpointError, match="sentencepiece"):
        tokenizer_json(content)
