"""Sentences: from text to the token tensors of a network."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import tokenizers

from rt_ris.errors import BundleError, TextError
from rt_ris.spec import TextSpec


class TruncationWarning(UserWarning):
    """A sentence was longer than the network was trained for; its end was not read."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Tokens:
    """N sentences as a network takes them.

    Attributes:
        sentences: the N texts.
        token_ids: int32 [N, L], padded on the right.
        token_mask: bool [N, L], true where a token is real.
        truncated_after: for each sentence the last word that was read, or None if all were.
    """

    sentences: tuple[str, ...]
    token_ids: npt.NDArray[np.int32]
    token_mask: npt.NDArray[np.bool_]
    truncated_after: tuple[str | None, ...]


class Tokenizer:
    """Splits sentences into the tokens that a network was trained with; safe to share by threads.

    Args:
        document: a ``tokenizers`` JSON document, in UTF-8.
        spec: how many tokens the network takes.

    Raises:
        BundleError: the document is not a tokenizer.
    """

    def __init__(self, document: bytes, spec: TextSpec) -> None:
        try:
            self._engine = tokenizers.Tokenizer.from_buffer(document)
        except Exception as error:  # the library raises bare Exception
            raise BundleError(f"The tokenizer cannot be read: {error}. Export it again.") from error
        self._engine.no_truncation()
        self._engine.no_padding()
        self.spec = spec

    def encode(self, sentences: Sequence[str]) -> Tokens:
        """Tokenize N sentences.

        A sentence longer than ``max_tokens`` is cut and a ``TruncationWarning`` says after which
        word. It keeps its end token, if there is one and unless ``TextSpec.keep_end`` is false.

        Raises:
            TextError: no sentence, or one that is empty, not text, or without any token.
        """
        listed = isinstance(sentences, Sequence) and not isinstance(sentences, str)
        if not listed or not sentences:
            raise TextError(
                f"Sentences were given as {type(sentences).__name__}; accepted is a list of at "
                "least one text, such as ['the cup on the left']."
            )
        shape = (len(sentences), self.spec.length)
        token_ids = np.full(shape, self.spec.pad_id, dtype=np.int32)
        token_mask = np.zeros(shape, dtype=np.bool_)
        truncated: list[str | None] = []
        for row, sentence in enumerate(sentences):
            ids, last_word = self._encode_one(sentence)
            token_ids[row, : len(ids)] = ids
            token_mask[row, : len(ids)] = True
            truncated.append(last_word)
        return Tokens(
            sentences=tuple(sentences),
            token_ids=token_ids,
            token_mask=token_mask,
            truncated_after=tuple(truncated),
        )

    def _encode_one(self, sentence: str) -> tuple[list[int], str | None]:
        """The ids of one sentence, and its last word that was read if it was cut."""
        _check_sentence(sentence)
        encoding = self._engine.encode(sentence)
        if all(encoding.special_tokens_mask):
            raise TextError(f"The sentence {sentence!r} has no word the network knows; use words.")
        limit = self.spec.max_tokens
        if len(encoding.ids) <= limit:
            return encoding.ids, None
        ends = self.spec.keep_end and encoding.special_tokens_mask[-1] == 1
        kept = limit - 1 if ends else limit
        ids = encoding.ids[:kept] + (encoding.ids[-1:] if ends else [])
        last_word = _last_word(sentence, encoding.offsets[:kept])
        _warn(sentence, last_word=last_word, tokens=len(encoding.ids), limit=limit)
        return ids, last_word


def _check_sentence(sentence: object) -> None:
    if not isinstance(sentence, str):
        raise TextError(
            f"A sentence was given as {type(sentence).__name__}; accepted is text, such as "
            "'the cup on the left'."
        )
    if not sentence.strip():
        raise TextError("A sentence is empty; describe one thing, such as 'the cup on the left'.")
    if not sentence.isascii() and any("\ud800" <= letter <= "\udfff" for letter in sentence):
        raise TextError(
            f"The sentence {sentence!r} holds half a surrogate pair; decode the text as UTF-8."
        )


def _last_word(sentence: str, offsets: Sequence[tuple[int, int]]) -> str:
    """The word, or the piece of one, in which the last token that was kept ends."""
    end = max((stop for _, stop in offsets), default=0)
    words = sentence[:end].split()
    return words[-1] if words else ""


def _warn(sentence: str, *, last_word: str, tokens: int, limit: int) -> None:
    shown = sentence if len(sentence) <= 80 else sentence[:77] + "..."
    warnings.warn(
        f"The sentence '{shown}' has {tokens} tokens; the network reads {limit}. It was cut after "
        f"'{last_word}'; a shorter description is read whole.",
        TruncationWarning,
        stacklevel=2,
    )
