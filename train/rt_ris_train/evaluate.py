"""Evaluate a predictor on RefCOCO-format data; a checkpoint and a bundle take the same way.

Every sentence of every ref counts once. Masks are compared at the picture's own size (CRIS, ETRIS)
or on the network's stretched input (LAVT, DMMI): the two give other numbers for the same masks, as
pixels weigh differently, so each result says which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image

from rt_ris.mask import Mask, Placement
from rt_ris.spec import SentenceField
from rt_ris_train.data.refcoco import Ref, RefDataset, Sentence
from rt_ris_train.metrics import Bool, MetricsByKind

Progress = Callable[[int, int], None]


class Answer(Protocol):
    """The part of a mask that evaluation reads."""

    @property
    def binary(self) -> npt.NDArray[np.bool_]:
        """The mask, bool [H, W]."""


class Segmenter(Protocol):
    """What can be evaluated: ``rt_ris.Predictor`` and anything with its two methods."""

    def set_image(self, image: npt.NDArray[np.uint8]) -> object:
        """Take uint8 [H, W, 3] RGB."""

    def segment(self, sentences: Sequence[str]) -> Sequence[Answer]:
        """One answer per sentence."""


@dataclass(frozen=True, kw_only=True)
class EvaluationOptions:
    """What to evaluate.

    Attributes:
        limit: the most sentences, spread evenly over the split; None for all.
        shuffle_seed: give every sentence the picture of another one, to see whether the network
            reads; None to leave them where they belong.
        field: which text of a sentence is asked.
        input_side: compare on the S x S input of a network that stretches pictures, this S, with
            targets resized to it by their nearest pixels; None compares at the picture's own size.
        strict_precision: Pr@X counts IoU above X, as ETRIS and PhraseCut do; else X itself, too.
        empty_below: a mask with fewer true pixels counts as "there is no such thing", the habit of
            gRefCOCO for networks that never say so themselves; 0 changes nothing.
    """

    limit: int | None = None
    shuffle_seed: int | None = None
    field: SentenceField = "sent"
    input_side: int | None = None
    empty_below: int = 0
    strict_precision: bool = False


def count(
    segmenter: Segmenter,
    dataset: RefDataset,
    *,
    options: EvaluationOptions | None = None,
    progress: Progress = lambda done, total: None,
    share: tuple[int, int] = (0, 1),
) -> MetricsByKind:
    """Count a segmenter's masks.

    Args:
        segmenter: what is measured.
        dataset: on what.
        options: how.
        progress: takes the number of sentences done and of all.
        share: this process's number and how many share the pictures; each picture is one's.
    """
    chosen = options or EvaluationOptions()
    groups = list(_by_image(dataset, chosen))[share[0] :: share[1]]
    total = sum(len(samples) for _, samples in groups)
    metrics = MetricsByKind()
    done = 0
    for ref, samples in groups:
        segmenter.set_image(dataset.image(ref))
        answers = segmenter.segment([text for text, _, _ in samples])
        masks = {target: dataset.mask(target) for target in {target for _, target, _ in samples}}
        for answer, (_, target, kind) in zip(answers, samples, strict=True):
            found, wanted = _compared(answer, masks[target], chosen)
            rejected = int(np.count_nonzero(found)) < chosen.empty_below
            metrics.update(found, wanted, absent=target.no_target, rejected=rejected, kind=kind)
        done += len(samples)
        progress(done, total)
    return metrics


def evaluate(
    segmenter: Segmenter,
    dataset: RefDataset,
    *,
    options: EvaluationOptions | None = None,
    progress: Progress = lambda done, total: None,
) -> Mapping[str, object]:
    """Measure a segmenter.

    Returns:
        The measures of ``MetricsByKind.summary``, in points of 100, and how they were taken.
    """
    return measures(count(segmenter, dataset, options=options, progress=progress), options)


def measures(counted: MetricsByKind, options: EvaluationOptions | None) -> Mapping[str, object]:
    """What was counted as measures, and how they were taken."""
    chosen = options or EvaluationOptions()
    return {
        **counted.summary(strict=chosen.strict_precision),
        "eval_space": _space(chosen),
        "precision_counts": "IoU > X" if chosen.strict_precision else "IoU >= X",
        "empty_below": chosen.empty_below,
        "shuffled": chosen.shuffle_seed is not None,
    }


def _space(options: EvaluationOptions) -> str:
    side = options.input_side
    return "original" if side is None else f"input {side} x {side}"


def _compared(answer: Answer, target: Bool, options: EvaluationOptions) -> tuple[Bool, Bool]:
    """The prediction and the target in the space that was asked for."""
    if options.input_side is None:
        return answer.binary, target
    return _on_input(answer, target, side=options.input_side)


def _on_input(answer: Answer, target: Bool, *, side: int) -> tuple[Bool, Bool]:
    """Both on the stretched input; the target by its nearest pixels, as torchvision resizes it."""
    if not isinstance(answer, Mask):
        raise TypeError(f"{type(answer).__name__} has no logits to look at on the input.")
    found = replace(answer, placement=Placement.on_input(side)).binary
    resized = Image.fromarray(target).resize((side, side), Image.Resampling.NEAREST)
    return found, np.asarray(resized, dtype=np.bool_)


_Sample = tuple[str, Ref, str | None]


def _by_image(
    dataset: RefDataset, options: EvaluationOptions
) -> Iterator[tuple[Ref, list[_Sample]]]:
    """A ref of each picture, and for its sentences the text, the target and the kind."""
    samples = dataset.samples()
    if options.limit is not None and options.limit < len(samples):
        rows = np.linspace(0, len(samples) - 1, options.limit).round().astype(int)
        samples = [samples[row] for row in rows]
    texts = [_text(sentence, options) for _, sentence in samples]
    if options.shuffle_seed is not None:
        texts = _elsewhere(samples, texts, options.shuffle_seed)
    groups: dict[int, tuple[Ref, list[_Sample]]] = {}
    for text, (ref, sentence) in zip(texts, samples, strict=True):
        groups.setdefault(ref.image_id, (ref, []))[1].append((text, ref, sentence.kind))
    yield from groups.values()


def _text(sentence: Sentence, options: EvaluationOptions) -> str:
    return sentence.raw if options.field == "raw" else sentence.text


def _elsewhere(samples: Sequence[tuple[Ref, Sentence]], own: Sequence[str], seed: int) -> list[str]:
    """For every sample the sentence of a sample on another picture, by a seeded draw."""
    draw = np.random.default_rng(seed)
    images = np.array([ref.image_id for ref, _ in samples])
    texts: list[str] = []
    for image in images:
        others = np.flatnonzero(images != image)
        pick = int(draw.choice(others)) if len(others) else 0
        texts.append(own[pick])
    return texts
