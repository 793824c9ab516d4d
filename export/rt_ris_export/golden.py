"""Golden vectors: what PyTorch answered, for replaying on the device.

``golden.npz`` holds for each picture, numbered from 0, the arrays ``<number>/<name>``:

    picture      uint8 [H, W, 3]      the picture itself
    sentences    unicode [N]          what was asked
    pixels, valid_box                 what ``prepare`` made of the picture
    token_ids, token_mask             what the tokenizer made of the sentences
    logits, existence                 what PyTorch made of those (existence where there is one)

The first picture also has every tensor between the stages, so that a device that differs can name
the stage. Image tensors are [1, ...], the others [N, ...].
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from rt_ris.image import Pixels
from rt_ris.spec import EXISTENCE, LOGITS, PIXELS, TOKEN_IDS, TOKEN_MASK, VALID_BOX
from rt_ris.text import Tokens

STORED = (PIXELS, VALID_BOX, TOKEN_IDS, TOKEN_MASK, LOGITS, EXISTENCE)


@dataclass(frozen=True, kw_only=True, eq=False)
class GoldenCase:
    """One picture, its sentences and PyTorch's values for them.

    Attributes:
        picture: uint8 [H, W, 3].
        tokens: the N sentences.
        values: at least those that are stored.
    """

    picture: Pixels
    tokens: Tokens
    values: Mapping[str, npt.NDArray[Any]]


def pack_golden(cases: Sequence[GoldenCase]) -> bytes:
    """The bytes of ``golden.npz``; nothing in it needs pickle."""
    arrays: dict[str, npt.NDArray[Any]] = {}
    for number, case in enumerate(cases):
        stored = case.values if number == 0 else STORED
        named = {name: case.values[name] for name in stored if name in case.values}
        named |= {"picture": case.picture, "sentences": np.array(case.tokens.sentences)}
        arrays |= {f"{number}/{name}": array for name, array in named.items()}
    stream = io.BytesIO()
    np.savez_compressed(stream, **arrays)  # type: ignore[arg-type] # stubs mistake arrays for flags
    return stream.getvalue()
