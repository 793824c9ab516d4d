"""A sentencepiece vocabulary as a ``tokenizers`` document, with XLM-RoBERTa's ids.

``<s>`` is 0, ``<pad>`` 1, ``</s>`` 2, ``<unk>`` 3, and piece n of the file n + 1. The call that
BEiT-3's page gives for its file builds a vocabulary of five entries with a current transformers,
without a word; hence this conversion, whose ids are compared with sentencepiece's own.
"""

from __future__ import annotations

import importlib
from typing import Any, Final

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from rt_ris.errors import CheckpointError

START, PAD, END, UNKNOWN = "<s>", "<pad>", "</s>", "<unk>"
SPECIAL: Final = (START, PAD, END, UNKNOWN)
_UNIGRAM, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
_FIRST: Final = (_UNKNOWN, _CONTROL, _CONTROL)
"""Kinds of the first three pieces of a file: unknown, start, end."""


def tokenizer_json(content: bytes) -> str:
    """The document of a unigram model.

    Args:
        content: the bytes of a ``.spm`` or ``.model`` file.

    Raises:
        CheckpointError: the bytes are no such model, or of a kind that is not read.
    """
    model = _parse(content)
    _check(model)
    pieces = [(piece.piece, piece.score) for piece in model.pieces[len(_FIRST) :]]
    # A space can stand in no text by then, so that typing "<s>" does not give the token.
    vocabulary = [(f" {token}", 0.0) for token in SPECIAL] + pieces
    tokenizer = Tokenizer(models.Unigram(vocabulary, unk_id=SPECIAL.index(UNKNOWN)))
    tokenizer.normalizer = _normalizer(model.normalizer_spec)
    prepend = "always" if model.normalizer_spec.add_dummy_prefix else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}",
        special_tokens=[(START, SPECIAL.index(START)), (END, SPECIAL.index(END))],
    )
    document: str = tokenizer.to_str()
    return document


def _normalizer(spec: Any) -> normalizers.Normalizer:  # noqa: ANN401 # a generated class
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        # Only the plain space: what else is white has become one by the file's own table.
        steps.append(normalizers.Replace(Regex("^ +| +$"), ""))
        steps.append(normalizers.Replace(Regex(" {2,}"), " "))
    return normalizers.Sequence(steps)


def _parse(content: bytes) -> Any:  # noqa: ANN401 # a generated class
    generated: Any = importlib.import_module("sentencepiece.sentencepiece_model_pb2")
    model = generated.ModelProto()
    try:
        model.ParseFromString(content)
    except Exception as error:  # protobuf's errors have no common public base
        raise CheckpointError(
            f"The vocabulary is no sentencepiece model ({error}); give the .spm file itself."
        ) from error
    if not model.pieces:
        raise CheckpointError(
            "The vocabulary is no sentencepiece model, it has no pieces; give the .spm file itself."
        )
    return model


def _check(model: Any) -> None:  # noqa: ANN401 # a generated class
    trainer = model.trainer_spec
    kinds = tuple(piece.type for piece in model.pieces)
    wrong = ""
    if trainer.model_type != _UNIGRAM:
        wrong = "is no unigram model"
    elif trainer.byte_fallback:
        wrong = "falls back to bytes for unknown letters"
    elif kinds[: len(_FIRST)] != _FIRST:
        wrong = "does not begin with <unk>, <s> and </s>"
    elif _USER_DEFINED in kinds:
        wrong = "has user-defined pieces"
    if wrong:
        raise CheckpointError(
            f"The sentencepiece vocabulary {wrong}, which is not read; BEiT-3's beit3.spm is a "
            "unigram model without any of that."
        )
