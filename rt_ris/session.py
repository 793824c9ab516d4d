"""A session: all stages of a network, each run no more often than its inputs change.

What a stage depends on is derived from the graph. What depends on the image only is computed once
per picture, what depends on the text only once per distinct sentence, the rest for each pair.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import MappingProxyType
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt

from rt_ris.backends.base import Array, Runner
from rt_ris.cache import CacheStats, LruCache
from rt_ris.errors import PlanError
from rt_ris.image import Prepared
from rt_ris.mask import Placement
from rt_ris.spec import (
    EXISTENCE,
    LOGITS,
    PIXELS,
    TOKEN_IDS,
    TOKEN_MASK,
    VALID_BOX,
    Dependency,
    StageGraph,
    StageSpec,
)
from rt_ris.text import Tokens
from rt_ris.timing import Timer, Timing

MAX_EXPRESSIONS: Final = 8
"""Per sentence, 4 to 16 at once cost the same on one core and a fifth less than one alone
(maris-lite, ONNX Runtime 1.31); 8 needs half the memory of 16."""
IMAGE_CACHE_BYTES: Final = 256 << 20
TEXT_CACHE_SENTENCES: Final = 1024

Values: TypeAlias = Mapping[str, Array]


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageFeatures:
    """A picture after all stages that depend on it alone; immutable, may be kept and shared.

    Attributes:
        values: what later stages read, each [1, ...], read-only.
        placement: where the logit grid lies on the picture.
    """

    values: Values
    placement: Placement


@dataclass(frozen=True, kw_only=True, eq=False)
class TextFeatures:
    """N sentences after all stages that depend on them alone; immutable, may be kept and shared.

    Attributes:
        values: what later stages read, each [N, ...], read-only.
        tokens: the sentences.
    """

    values: Values
    tokens: Tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class Segmentation:
    """What the network says of N sentences.

    Attributes:
        logits: float32 [N, h, w].
        existence: float32 [N], logits; None where the network has no such output.
    """

    logits: npt.NDArray[np.float32]
    existence: npt.NDArray[np.float32] | None


@dataclass(frozen=True, kw_only=True)
class SessionStats:
    """What a session did so far.

    Attributes:
        stages: runs and wall time of each stage that ran, by id.
        image_cache: weights are bytes.
        text_cache: each sentence weighs 1.
    """

    stages: Mapping[str, Timing]
    image_cache: CacheStats
    text_cache: CacheStats


class Session:
    """Runs a stage graph with caches for pictures and sentences.

    Several threads may call one session if its runners allow it (ONNX Runtime does): the caches
    are locked, results do not depend on their content. Two threads that ask for the same new
    picture at the same moment may both compute it.

    Args:
        graph: the stages.
        runners: one for each stage, by id; the session owns and closes them.
        max_expressions: the most sentences in one run of a stage; more are split evenly, which
            bounds the memory. Results do not depend on it beyond rounding.
        image_cache_bytes: the most bytes of image features to keep.
        text_cache_sentences: the most sentences to keep.

    Raises:
        PlanError: a stage has no runner, or the outputs do not depend on picture and sentence.
    """

    def __init__(
        self,
        graph: StageGraph,
        runners: Mapping[str, Runner],
        *,
        max_expressions: int = MAX_EXPRESSIONS,
        image_cache_bytes: int = IMAGE_CACHE_BYTES,
        text_cache_sentences: int = TEXT_CACHE_SENTENCES,
    ) -> None:
        _check(graph, runners)
        self.graph = graph
        self._runners = dict(runners)
        self._max_expressions = max(1, max_expressions)
        self._timer = Timer()
        self._stages = {kind: graph.of(kind) for kind in Dependency}
        self._image_names = tuple(spec.name for spec in graph.held(Dependency.IMAGE))
        self._text_names = tuple(spec.name for spec in graph.held(Dependency.TEXT))
        self._images: LruCache[bytes, Values] = LruCache(image_cache_bytes, weigh=_bytes)
        self._texts: LruCache[bytes, Values] = LruCache(text_cache_sentences)

    def encode_image(self, prepared: Prepared) -> ImageFeatures:
        """Run the stages that depend on the image alone, unless this content was seen before."""
        values = self._images.get(prepared.digest)
        if values is None:
            given: Values = {PIXELS: prepared.pixels, VALID_BOX: prepared.valid_box}
            known = self._run(Dependency.IMAGE, given)
            values = _frozen({name: known[name] for name in self._image_names})
            self._images.put(prepared.digest, values)
        return ImageFeatures(values=values, placement=Placement.of(prepared))

    def encode_text(self, tokens: Tokens) -> TextFeatures:
        """Run the stages that depend on the text alone, for the new ones among the sentences."""
        keys = [
            ids.tobytes() + mask.tobytes()
            for ids, mask in zip(tokens.token_ids, tokens.token_mask, strict=True)
        ]
        rows = {key: self._texts.get(key) for key in dict.fromkeys(keys)}
        new = [key for key, row in rows.items() if row is None]
        if new:
            places = [keys.index(key) for key in new]
            for key, row in zip(new, self._text_rows(tokens, places), strict=True):
                rows[key] = row
                self._texts.put(key, row)
        found = [row for row in (rows[key] for key in keys) if row is not None]
        joined = {name: np.concatenate([row[name] for row in found]) for name in self._text_names}
        return TextFeatures(values=_frozen(joined), tokens=tokens)

    def segment(self, image: ImageFeatures, text: TextFeatures) -> Segmentation:
        """Run the remaining stages on one picture and N sentences."""
        count = len(text.tokens.sentences)
        parts = []
        for chunk in _chunks(count, self._max_expressions):
            rows = {name: array[chunk] for name, array in text.values.items()}
            parts.append(self._run(Dependency.BOTH, {**image.values, **rows}))
        existence = None
        if EXISTENCE in self.graph.values:
            existence = np.concatenate([part[EXISTENCE] for part in parts])
        return Segmentation(
            logits=np.concatenate([part[LOGITS] for part in parts]), existence=existence
        )

    def trace(self, prepared: Prepared, tokens: Tokens) -> dict[str, Array]:
        """Every value of one run on all sentences at once, past the caches; for verification."""
        known: dict[str, Array] = {
            PIXELS: prepared.pixels,
            VALID_BOX: prepared.valid_box,
            TOKEN_IDS: tokens.token_ids,
            TOKEN_MASK: tokens.token_mask,
        }
        for stage in self.graph.stages:
            known.update(self._run_stage(stage, known))
        return known

    def stats(self) -> SessionStats:
        """What was run and what is cached so far."""
        return SessionStats(
            stages=self._timer.timings(),
            image_cache=self._images.stats(),
            text_cache=self._texts.stats(),
        )

    def clear(self) -> None:
        """Forget all cached pictures and sentences."""
        self._images.clear()
        self._texts.clear()

    def close(self) -> None:
        """Close all runners and forget all that is cached; may be called twice."""
        self.clear()
        for runner in self._runners.values():
            runner.close()

    def _text_rows(self, tokens: Tokens, places: Sequence[int]) -> Iterator[Values]:
        """The values of some of the sentences, each [1, ...], owned by nobody else."""
        for chunk in _chunks(len(places), self._max_expressions):
            chosen = list(places[chunk])
            given: Values = {
                TOKEN_IDS: tokens.token_ids[chosen],
                TOKEN_MASK: tokens.token_mask[chosen],
            }
            known = self._run(Dependency.TEXT, given)
            for row in range(len(chosen)):
                yield _frozen(
                    {name: known[name][row : row + 1].copy() for name in self._text_names}
                )

    def _run(self, dependency: Dependency, values: Values) -> dict[str, Array]:
        known = dict(values)
        for stage in self._stages[dependency]:
            known.update(self._run_stage(stage, known))
        return known

    def _run_stage(self, stage: StageSpec, known: Values) -> Values:
        with self._timer.measure(stage.id):
            return self._runners[stage.id].run(known)


def open_runners(
    stages: Sequence[StageSpec], opened: Callable[[StageSpec], Runner]
) -> dict[str, Runner]:
    """Open a runner for each stage; if one fails, those that are open are closed."""
    runners: dict[str, Runner] = {}
    try:
        for stage in stages:
            runners[stage.id] = opened(stage)
    except BaseException:
        for runner in runners.values():
            runner.close()
        raise
    return runners


def _check(graph: StageGraph, runners: Mapping[str, Runner]) -> None:
    missing = [stage.id for stage in graph.stages if stage.id not in runners]
    if missing:
        raise PlanError(f"Stage '{missing[0]}' has no runner; given were {sorted(runners)}.")
    for name in (LOGITS, EXISTENCE):
        if graph.values.get(name, Dependency.BOTH) is not Dependency.BOTH:
            raise PlanError(
                f"'{name}' depends on the {graph.values[name].value} alone; it must depend on the "
                "picture and on the sentence."
            )


def _chunks(count: int, most: int) -> Iterator[slice]:
    """Split evenly: 17 sentences at 16 each are 9 and 8, not 16 and 1."""
    parts = -(-count // most)
    edges = [count * part // parts for part in range(parts + 1)]
    return (slice(start, stop) for start, stop in pairwise(edges))


def _frozen(values: Mapping[str, Array]) -> Values:
    views = {name: array.view() for name, array in values.items()}
    for view in views.values():
        view.flags.writeable = False
    return MappingProxyType(views)


def _bytes(values: Values) -> int:
    return sum(array.nbytes for array in values.values())
