"""Erasing of nouns, for training that rebuilds them (RIS-DMMI @753cd60)."""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import numpy.typing as npt
from textblob.taggers import PatternTagger

NOUNS = frozenset({"NN", "NNS"})


def erase_nouns(
    token_ids: npt.NDArray[np.int32], sentences: Sequence[str], *, seed: int, pad_id: int = 0
) -> npt.NDArray[np.int32]:
    """Token ids with one run of nouns of each sentence replaced by pads.

    The i-th word is taken to be the (i+1)-th token, behind the start token, as the authors do; that
    is off by some where a word is split. A sentence without a noun stays as it is. Tags are those
    of the pattern tagger, whose lexicon ships with its package; the authors' tagger needs a
    download.

    Args:
        token_ids: int32 [N, L].
        sentences: the N texts.
        seed: decides, with the text, which run is erased.
        pad_id: what is written.

    Returns:
        A new int32 [N, L].
    """
    erased: npt.NDArray[np.int32] = token_ids.copy()
    for row, sentence in enumerate(sentences):
        runs = noun_runs(sentence.lower(), longest=token_ids.shape[1] - 1)
        if runs:
            draw = np.random.default_rng([seed, zlib.crc32(sentence.encode())])
            chosen = runs[int(draw.integers(len(runs)))]
            erased[row, [word + 1 for word in chosen]] = pad_id
    return erased


@lru_cache(maxsize=65536)
def noun_runs(sentence: str, *, longest: int) -> tuple[tuple[int, ...], ...]:
    """Indices of the nouns among the first ``longest`` words, neighbours together."""
    places = [index for index, tag in enumerate(_tags(sentence)) if tag in NOUNS]
    places = [index for index in places if index < longest]
    runs: list[list[int]] = [[index] for index in places[:1]]
    for before, index in pairwise(places):
        if index == before + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return tuple(map(tuple, runs))


def _tags(sentence: str) -> list[str]:
    with warnings.catch_warnings():
        # textblob 0.20 leaves the file of its lexicon to the garbage collector.
        warnings.simplefilter("ignore", ResourceWarning)
        return [tag for _, tag in PatternTagger().tag(sentence, tokenize=True)]
