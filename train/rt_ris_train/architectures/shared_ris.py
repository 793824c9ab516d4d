"""Shared-RIS: a single encoder for both modalities (arXiv 2408.15521).

Image and text meet in BEiT-3's first layer, so nothing depends on the picture alone and there is
one stage. Neither code nor weights were published; the paper's figures of size and cost decide
what it leaves open.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor

from rt_ris.errors import CheckpointError
from rt_ris.spec import (
    EXPRESSIONS,
    LOGITS,
    PIXELS,
    TOKEN_IDS,
    TOKEN_MASK,
    VALID_BOX,
    ImageSpec,
    MaskSpec,
    StageSpec,
    TextSpec,
    external_inputs,
)
from rt_ris_train.architecture import (
    Architecture,
    Figure,
    OfficialFile,
    OfficialTokenizer,
    ReferringNetwork,
    Stage,
    StageModule,
    Supervision,
    Variant,
    float32,
    seeded,
)
from rt_ris_train.backbones import beit3, spm
from rt_ris_train.backbones.beit3 import Beit3, Beit3Size
from rt_ris_train.blocks.pixels import Normalise
from rt_ris_train.blocks.shared import SharedDecoder, SharedPyramid
from rt_ris_train.counting import network_multiply_adds, parameters
from rt_ris_train.data.synth.vocabulary import COLOURS, default_vocabulary

_LOG = logging.getLogger(__name__)
SPARE_ROWS: Final = 64
"""Rows of BEiT-3's table, 64,010, that may well have no token: it is rounded up."""
LONGEST: Final = beit3.TEXT_POSITIONS - beit3.OFFSET
VOCABULARY: Final = OfficialTokenizer(
    title="beit3.spm",
    source="the page of BEiT-3 in the repository microsoft/unilm on GitHub",
    convert=spm.tokenizer_json,
)


@dataclass(frozen=True, kw_only=True)
class SharedConfig:
    """One size.

    Attributes:
        encoder: BEiT-3.
        side: S, pixels.
        tokens: L, special ones included; 20 fits the paper's figures of cost.
        width: of pyramid and decoder.
        heads: of their attentions.
        tokenizer: makes the document where no published vocabulary is needed; None needs it.
    """

    encoder: Beit3Size = field(default_factory=Beit3Size)
    side: int = 480
    tokens: int = 20
    width: int = 512
    heads: int = 8
    tokenizer: Callable[[], str] | None = None


class WholeStage(StageModule):
    """Everything from pixels and tokens to logits."""

    def __init__(self, config: SharedConfig, image: ImageSpec) -> None:
        super().__init__()
        self.normalise = Normalise(image)
        encoder = config.encoder
        self.encoder = Beit3(encoder, image_size=config.side, length=config.tokens)
        sizes = {"width": config.width, "heads": config.heads}
        self.pyramid = SharedPyramid(taps=len(encoder.taps), inputs=encoder.width, **sizes)
        self.decoder = SharedDecoder(cells=self.encoder.cells, **sizes)

    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        """uint8 [N or 1, S, S, 3], int32 [N or 1, 4], int32 [N, L], bool [N, L] to [N, h, w]."""
        pixels, valid_box, token_ids, token_mask = values
        features = self.encoder(self.normalise(pixels, valid_box), token_ids, token_mask)
        seen = features[0][0].shape[1]
        shown = token_mask.new_ones(token_mask.shape[0], seen)
        visible = torch.cat((shown, token_mask), dim=1)
        return (self.decoder(self.pyramid(features, visible), visible),)


class SharedRis(ReferringNetwork):
    """Shared-RIS on a BEiT-3 of any size."""

    supervision = Supervision(at="input", target="nearest")

    def __init__(self, config: SharedConfig) -> None:
        super().__init__()
        self.config = config
        half = (127.5, 127.5, 127.5)
        self.image = ImageSpec(
            size=config.side, fit="stretch", resample="bicubic", mean=half, std=half
        )
        self.text = TextSpec(max_tokens=config.tokens, pad_id=1)
        cells = config.side // config.encoder.patch
        self.mask = MaskSpec(size=4 * cells, interpolate="probabilities", threshold=0.35)
        self.whole = WholeStage(config, self.image)
        self._document = None if config.tokenizer is None else config.tokenizer()

    def tokenizer_json(self) -> str:
        """The vocabulary that was given.

        Raises:
            CheckpointError: none was.
        """
        if self._document is None:
            raise CheckpointError(
                f"Shared-RIS needs BEiT-3's vocabulary {VOCABULARY.title}, which no package "
                f"brings. Get it from {VOCABULARY.source} and give it once: rt-ris import "
                f"--arch shared_ris ... --tokenizer {VOCABULARY.title}. The checkpoint keeps it."
            )
        return self._document

    def official_tokenizer(self) -> OfficialTokenizer | None:
        """BEiT-3's sentencepiece file; none for the toy size."""
        return VOCABULARY if self.config.tokenizer is None else None

    def use_tokenizer(self, document: str) -> None:
        """Take the document made of the published vocabulary."""
        if self.config.tokenizer is not None:
            super().use_tokenizer(document)
        words, rows = Tokenizer.from_str(document).get_vocab_size(), self.config.encoder.vocabulary
        if words > rows:
            raise CheckpointError(
                f"The vocabulary has {words} tokens; the network's table has {rows} rows. Give "
                f"{VOCABULARY.title}, whose tokens BEiT-3 was trained on."
            )
        if words < rows - SPARE_ROWS:
            _LOG.warning(
                "The vocabulary has %d tokens for a table of %d rows: is it %s?",
                words,
                rows,
                VOCABULARY.title,
            )
        self._document = document

    def official_keys(self) -> Mapping[str, OfficialFile]:
        """BEiT-3's released file."""
        return {"beit3": beit3.official_file(self.whole.encoder, "whole.encoder.")}

    def stages(self) -> tuple[Stage, ...]:
        """The one stage."""
        outer = {spec.name: spec for spec in external_inputs(self.image, self.text)}
        side = self.mask.size
        logits = float32(LOGITS, EXPRESSIONS, side, side)
        spec = StageSpec(
            id="whole",
            role="fusion",
            inputs=tuple(outer[name] for name in (PIXELS, VALID_BOX, TOKEN_IDS, TOKEN_MASK)),
            outputs=(logits,),
        )
        return (Stage(spec=spec, module=self.whole),)


def toy_tokenizer() -> str:
    """Whole words, those of composed scenes, with XLM-RoBERTa's special ids."""
    nouns = default_vocabulary().nouns.values()
    names = [name for noun in nouns for name in (noun.name, noun.plural or noun.name)]
    spoken = " ".join((*names, *COLOURS, _FUNCTION_WORDS)).split()
    words = (*spm.SPECIAL, *dict.fromkeys(spoken))
    vocabulary = {word: index for index, word in enumerate(words)}
    unknown = spm.UNKNOWN
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = (spm.START, spm.END)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="{} $A {}".format(*ends), special_tokens=[(end, vocabulary[end]) for end in ends]
    )
    document: str = tokenizer.to_str()
    return document


_FUNCTION_WORDS: Final = (
    "a all and at behind below beside between big biggest both bottom box by center centre circle "
    "closest corner every everything far first fourth from front in is it largest last left little "
    "lower middle most nearest next not of on one ones only other over picture right second side "
    "small smallest square than that the thing things third to top two under up upper which with"
)
TOY_WORDS: Final = 1024
"""Rows of the toy size's table, at least as many as its tokenizer has words."""


def _build(config: SharedConfig, tokens: int | None = None) -> SharedRis:
    chosen = config if tokens is None else replace(config, tokens=tokens)
    return seeded(partial(SharedRis, chosen))


PAPER: Final = "paper, table 7"
AT: Final = "480 x 480, 20 tokens"
_LAST: Final = 512 * 512 * 120 * 120
"""Multiply-adds of the last 1x1 convolution, which went into the text vector."""


def _encoder(network: ReferringNetwork) -> int:
    assert isinstance(network, SharedRis)
    return parameters(network.whole.encoder)


def _pyramid(network: ReferringNetwork) -> int:
    assert isinstance(network, SharedRis)
    return parameters(network.whole.pyramid)


def _cost(published: float) -> Figure:
    return Figure(
        quantity="multiply_adds",
        part="whole network",
        at=AT,
        published=published,
        source=f"{PAPER}, as GFLOPs",
        count=network_multiply_adds,
        added=_LAST,
        note="the last 1x1 convolution joined with the text vector",
    )


def _weights(
    part: str,
    published: float | None,
    source: str,
    count: Callable[[ReferringNetwork], int],
    note: str = "",
) -> Figure:
    return Figure(
        quantity="parameters",
        part=part,
        at=AT,
        published=published,
        source=source,
        count=count,
        note=note,
    )


BASE: Final = SharedConfig()
LARGE: Final = SharedConfig(
    encoder=Beit3Size(width=1024, layers=24, heads=16, taps=(6, 12, 18, 24))
)
TINY: Final = SharedConfig(
    encoder=Beit3Size(
        width=64,
        layers=4,
        heads=4,
        taps=(1, 2, 3, 4),
        vocabulary=TOY_WORDS,
        patch=12,
        drop_path=0.0,
    ),
    side=96,
    width=48,
    heads=4,
    tokenizer=toy_tokenizer,
)
_LICENCE: Final = "BEiT-3 MIT"

ARCHITECTURE = Architecture(
    name="shared_ris",
    title="Shared-RIS",
    source="arXiv 2408.15521; neither code nor weights were published",
    default="base",
    variants={
        "base": Variant(
            summary="BEiT-3 base, 480 pixels",
            build=partial(_build, BASE),
            longest=LONGEST,
            published=True,
            weights_licence=_LICENCE,
            figures=(
                _weights("whole network", 239e6, PAPER, parameters),
                _weights("encoder", 221.53e6, "BEiT-3's code at 480, counted", _encoder),
                _weights("pyramid", 8e6, PAPER, _pyramid, "the paper prints whole millions"),
                _cost(155e9),
            ),
        ),
        "large": Variant(
            summary="BEiT-3 large, 480 pixels",
            build=partial(_build, LARGE),
            longest=LONGEST,
            published=True,
            weights_licence=_LICENCE,
            figures=(
                _weights("whole network", None, "", parameters),
                _weights("encoder", 673.42e6, "BEiT-3's code at 480, counted", _encoder),
                _cost(381e9),
            ),
        ),
        "tiny": Variant(
            summary="the published code path at toy size with a toy vocabulary, for tests",
            build=partial(_build, TINY),
            longest=LONGEST,
            published=False,
            weights_licence="random",
        ),
    },
)
