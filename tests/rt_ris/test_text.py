from __future__ import annotations

import warnings
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from rt_ris.errors import BundleError, TextError
from rt_ris.spec import TextSpec
from rt_ris.text import Tokenizer, TruncationWarning

DOCUMENT = (Path(__file__).parents[1] / "fixtures" / "tiny" / "tokenizer.json").read_bytes()
START, END, UNKNOWN = 1, 2, 0


def tokenizer(max_tokens: int = 8, **spec: int) -> Tokenizer:
    return Tokenizer(DOCUMENT, TextSpec(max_tokens=max_tokens, **spec))


def test_ids_are_padded_on_the_right() -> None:
    tokens = tokenizer(8, padded_tokens=12, pad_id=9).encode(["the red thing", "blue"])
    assert tokens.token_ids.dtype == np.int32
    assert tokens.token_mask.dtype == np.bool_
    assert tokens.token_ids.tolist() == [
        [START, 3, 4, UNKNOWN, END, *[9] * 7],
        [START, 6, END, *[9] * 9],
    ]
    assert tokens.token_mask.sum(axis=1).tolist() == [5, 3]
    assert tokens.truncated_after == (None, None)
    assert tokens.sentences == ("the red thing", "blue")


def test_a_long_sentence_keeps_its_end_and_a_warning_says_where() -> None:
    with pytest.warns(TruncationWarning, match="cut after 'blue'"):
        tokens = tokenizer(5).encode(["red green blue white the", "red"])
    assert tokens.token_ids[0].tolist() == [START, 4, 5, 6, END]
    assert tokens.token_mask[0].all()
    assert tokens.truncated_after == ("blue", None)


def test_a_sentence_that_just_fits_is_not_cut() -> None:
    assert tokenizer(5).encode(["red green blue"]).truncated_after == (None,)


def test_without_an_end_token_the_rest_is_cut_off() -> None:
    engine = tokenizers.Tokenizer.from_str(DOCUMENT.decode())
    engine.post_processor = tokenizers.processors.TemplateProcessing(single="$A")
    plain = Tokenizer(engine.to_str().encode(), TextSpec(max_tokens=2))
    with pytest.warns(TruncationWarning, match="after 'green'"):
        tokens = plain.encode(["red green blue"])
    assert tokens.token_ids.tolist() == [[4, 5]]


def test_truncation_and_padding_of_the_document_are_not_used() -> None:
    engine = tokenizers.Tokenizer.from_str(DOCUMENT.decode())
    engine.enable_truncation(3)
    engine.enable_padding(length=20)
    tokens = Tokenizer(engine.to_str().encode(), TextSpec(max_tokens=8)).encode(["red green blue"])
    assert tokens.token_mask.sum() == 5


@pytest.mark.parametrize(
    "sentence", ["🙂", "красная чашка", "红色的杯子", "قدح أحمر", "e\u0301", "\u200b"]
)
def test_other_scripts_are_read(sentence: str) -> None:
    assert tokenizer().encode([sentence]).token_mask.sum() >= 3


@pytest.mark.parametrize("sentence", ["", " ", "\t\n", None, 7, b"red", "\ud83d"])
def test_what_is_no_sentence_is_refused(sentence: object) -> None:
    with pytest.raises(TextError):
        tokenizer().encode(["red", sentence])  # type: ignore[list-item]


def test_a_sentence_without_tokens_is_refused() -> None:
    engine = tokenizers.Tokenizer.from_str(DOCUMENT.decode())
    engine.normalizer = tokenizers.normalizers.Replace("\u200b", "")
    document = engine.to_str().encode()
    with pytest.raises(TextError, match="no word"):
        Tokenizer(document, TextSpec(max_tokens=8)).encode(["\u200b"])


def test_a_list_is_asked_for() -> None:
    with pytest.raises(TextError, match="list"):
        tokenizer().encode("red")
    with pytest.raises(TextError, match="list"):
        tokenizer().encode([])


def test_a_broken_document_is_refused() -> None:
    with pytest.raises(BundleError, match="cannot be read"):
        Tokenizer(b"{}", TextSpec(max_tokens=8))


@given(
    st.lists(st.text(min_size=1).filter(lambda text: bool(text.strip())), min_size=1, max_size=4)
)
def test_any_text_fits_in_and_does_not_touch_its_neighbours(sentences: list[str]) -> None:
    used = tokenizer(6)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", TruncationWarning)
        try:
            together = used.encode(sentences)
        except TextError:
            return  # half a surrogate pair
        alone = [used.encode([sentence]) for sentence in sentences]
    for row, one in enumerate(alone):
        assert np.array_equal(together.token_ids[row], one.token_ids[0])
        assert np.array_equal(together.token_mask[row], one.token_mask[0])
        assert together.truncated_after[row] == one.truncated_after[0]
    real = together.token_mask
    assert (real[:, :-1] >= real[:, 1:]).all()


def test_a_cut_sentence_loses_its_end_where_the_authors_cut_it_off() -> None:
    document = (Path(__file__).parents[1] / "fixtures" / "tiny" / "tokenizer.json").read_bytes()
    for keep_end in (True, False):
        spec = TextSpec(max_tokens=4, keep_end=keep_end)
        with pytest.warns(TruncationWarning):
            (row,) = Tokenizer(document, spec).encode(["red green blue red green"]).token_ids
        whole = Tokenizer(document, TextSpec(max_tokens=16)).encode(["red green blue red green"])
        expected = whole.token_ids[0, :4].copy()
        if keep_end:
            expected[-1] = whole.token_ids[0][whole.token_mask[0]][-1]
        assert row.tolist() == expected.tolist()
