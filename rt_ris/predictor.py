"""What users call: load a bundle, set a picture, segment sentences.

with Predictor.load("maris-lite.bundle") as predictor:
    predictor.set_image("table.jpg")
    mask = predictor.segment("the red cup")
    mask.binary          # bool [H, W] at the picture's own size
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Literal, overload

from rt_ris.backends import BACKENDS, choose, stage_opener
from rt_ris.bundle import Bundle
from rt_ris.errors import RtRisError
from rt_ris.image import ImageSource, load_image, prepare
from rt_ris.mask import Mask, Placement, sigmoid
from rt_ris.session import (
    IMAGE_CACHE_BYTES,
    MAX_EXPRESSIONS,
    TEXT_CACHE_SENTENCES,
    ImageFeatures,
    Segmentation,
    Session,
    SessionStats,
    TextFeatures,
    open_runners,
)
from rt_ris.spec import ImageSpec, MaskSpec
from rt_ris.text import Tokenizer, Tokens

_log = logging.getLogger(__name__)


class Predictor:
    """Segments what sentences describe.

    ``set_image`` keeps state, so threads should either own a predictor each or pass
    ``image=`` to ``segment``, which keeps none.

    Args:
        session: the stages; closed with the predictor.
        tokenizer: turns sentences into tokens.
        image: how pictures are prepared.
        mask: how logits become masks.
    """

    def __init__(
        self, *, session: Session, tokenizer: Tokenizer, image: ImageSpec, mask: MaskSpec
    ) -> None:
        self.session = session
        self.tokenizer = tokenizer
        self.image = image
        self.mask = mask
        self._current: ImageFeatures | None = None

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        backend: str = "auto",
        threads: int | None = None,
        engines: str | os.PathLike[str] | None = None,
        allow_unverified: bool = False,
        verify: Literal["all", "used"] = "all",
        max_expressions: int = MAX_EXPRESSIONS,
        image_cache_bytes: int = IMAGE_CACHE_BYTES,
        text_cache_sentences: int = TEXT_CACHE_SENTENCES,
    ) -> Predictor:
        """Open a bundle.

        Args:
            path: the bundle's folder.
            backend: a name in ``rt_ris.backends.BACKENDS``, or ``auto``.
            threads: processor threads; None leaves the choice to the engine.
            engines: folder of the engines, for backends that run some; None is beside the bundle.
            allow_unverified: run engines that have passed no gate on this GPU.
            verify: check the bytes of all members, or only of those that are used.
            max_expressions: see ``Session``.
            image_cache_bytes: see ``Session``.
            text_cache_sentences: see ``Session``.

        Raises:
            BundleError: there is no bundle, or it is damaged or of another version.
            BackendError: there is no such backend, or it refuses a stage.
            MissingExtraError: the backend's engine is not installed.
            TargetMismatchError: a stage was made for another machine, or is unverified here.
            IntegrityError: an engine is damaged, or could be somebody else's.
        """
        bundle = Bundle.open(path)
        manifest = bundle.manifest
        name = choose(manifest) if backend == "auto" else backend
        if verify == "all":
            on_engines = name in BACKENDS and BACKENDS[name].runs_engines
            bundle.verify(skip=(manifest.tokenizer,) if on_engines else manifest.needed())
        tokenizer = Tokenizer(bundle.read(manifest.tokenizer), manifest.text)
        _log.info("opening %s on backend %s", bundle.path, name)
        opened = stage_opener(
            name, bundle, threads=threads, engines=engines, allow_unverified=allow_unverified
        )
        session = Session(
            manifest.graph(),
            open_runners(manifest.graph().stages, opened),
            max_expressions=max_expressions,
            image_cache_bytes=image_cache_bytes,
            text_cache_sentences=text_cache_sentences,
        )
        return cls(session=session, tokenizer=tokenizer, image=manifest.image, mask=manifest.mask)

    def set_image(self, image: ImageSource) -> None:
        """Encode a picture; sentences that follow are about it.

        Args:
            image: path, Pillow image or array; see ``rt_ris.image.load_image``.

        Raises:
            ImageError: the picture cannot be used; the one set before stays.
        """
        self._current = self.encode_image(image)

    def encode_image(self, image: ImageSource) -> ImageFeatures:
        """Prepare and encode a picture without keeping it as the current one."""
        return self.session.encode_image(prepare(load_image(image), self.image))

    def encode_text(self, sentences: str | Sequence[str]) -> TextFeatures:
        """Tokenize and encode sentences.

        Raises:
            TextError: no sentence, or one that is empty or not text.
        """
        listed = [sentences] if isinstance(sentences, str) else sentences
        return self.session.encode_text(self.tokenizer.encode(listed))

    @overload
    def segment(  # type: ignore[overload-overlap]  # a text is a sequence of texts, too
        self, sentences: str, *, image: ImageSource | ImageFeatures | None = None
    ) -> Mask: ...

    @overload
    def segment(
        self, sentences: Sequence[str], *, image: ImageSource | ImageFeatures | None = None
    ) -> list[Mask]: ...

    def segment(
        self,
        sentences: str | Sequence[str],
        *,
        image: ImageSource | ImageFeatures | None = None,
    ) -> Mask | list[Mask]:
        """The mask of each sentence.

        Args:
            sentences: one sentence, or several that are run together.
            image: the picture; None means the one of ``set_image``.

        Returns:
            A mask for a text, a list of masks in the same order for a list.

        Raises:
            TextError: a sentence is empty or not text.
            ImageError: the picture cannot be used.
            RtRisError: there is no picture.
        """
        text = self.encode_text(sentences)
        masks = self.decode(self._features(image), text)
        return masks[0] if isinstance(sentences, str) else masks

    def decode(self, image: ImageFeatures, text: TextFeatures) -> list[Mask]:
        """The masks of encoded sentences on an encoded picture."""
        found = self.session.segment(image, text)
        return masks_of(found, placement=image.placement, tokens=text.tokens, spec=self.mask)

    @property
    def stats(self) -> SessionStats:
        """Runs and times of each stage, hits and misses of the caches."""
        return self.session.stats()

    def close(self) -> None:
        """Free the stages; the predictor is not used again."""
        self._current = None
        self.session.close()

    def __enter__(self) -> Predictor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _features(self, image: ImageSource | ImageFeatures | None) -> ImageFeatures:
        if isinstance(image, ImageFeatures):
            return image
        if image is not None:
            return self.encode_image(image)
        if self._current is None:
            raise RtRisError(
                "There is no picture yet; call set_image(picture) first, or give image= to "
                "segment()."
            )
        return self._current


def masks_of(
    found: Segmentation, *, placement: Placement, tokens: Tokens, spec: MaskSpec
) -> list[Mask]:
    """The masks of N sentences on one picture."""
    existence: list[float | None] = [None] * len(tokens.sentences)
    if found.existence is not None:
        existence = [float(value) for value in sigmoid(found.existence)]
    return [
        Mask(
            sentence=sentence,
            logits=found.logits[row],
            existence=existence[row],
            truncated_after=tokens.truncated_after[row],
            placement=placement,
            spec=spec,
        )
        for row, sentence in enumerate(tokens.sentences)
    ]
