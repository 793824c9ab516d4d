"""HARIS: human-like attention for referring image segmentation (arXiv 2405.10707).

Both encoders are frozen, SAM's and CLIP's, as in MARIS. Pixels of three depths meet the words one
after the other, with a feedback from the sentence; then a query and the words look at the pixels.
No code was published and the paper's text has lost its formulas: see the blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Final

from torch import Tensor, nn

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
    OfficialFile,
    ReferringNetwork,
    Stage,
    StageModule,
    Variant,
    float32,
    seeded,
)
from rt_ris_train.backbones import clip_text, sam, sam_sizes
from rt_ris_train.backbones.clip_text import ClipText, ClipTextSize
from rt_ris_train.backbones.sam import SamEncoder
from rt_ris_train.blocks.human_like_attention import Hierarchy, HumanLikeAttention, QueryDecoder
from rt_ris_train.blocks.pixels import Normalise
from rt_ris_train.counting import parameters

BLOCKS: Final = 3
LONGEST: Final = clip_text.POSITIONS // 8 * 8


@dataclass(frozen=True, kw_only=True)
class HarisConfig:
    """One size; what the paper does not say is as the sister paper MARIS has it.

    Attributes:
        sam: a key of ``backbones.sam_sizes.SIZES``.
        text: CLIP's text tower; the sentence feature is as wide as its words.
        tokens: 17 for RefCOCO and RefCOCO+, 25 for G-Ref.
        width: C.
        decoder_layers: number of the decoder's layers.
        heads: of their attentions.
        hidden: of their feed-forward.
    """

    sam: str
    text: ClipTextSize
    tokens: int = 17
    width: int = 256
    decoder_layers: int = 2
    heads: int = 8
    hidden: int = 2048


class ImageStage(StageModule):
    """Pixels to what the three blocks read of the picture."""

    splits = True

    def __init__(
        self, image: ImageSpec, encoder: SamEncoder, project: nn.ModuleList, halves: nn.ModuleList
    ) -> None:
        super().__init__()
        self.normalise = Normalise(image)
        self.encoder, self.project, self.halves = encoder, project, halves

    def frozen(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """uint8 [B, S, S, 3] and int32 [B, 4] to three taps [B, h, w, D]."""
        found: tuple[Tensor, ...] = self.encoder(self.normalise(*inputs))
        return found

    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Taps to V_1 [B, P, C] and the taps' halves of both convolutions [B, C, h, w]."""
        first, *others = (layer(tap) for layer, tap in zip(self.project, values, strict=True))
        halves = (
            half(tap.permute(0, 3, 1, 2)) for half, tap in zip(self.halves, others, strict=True)
        )
        return (first.flatten(1, 2), *halves)


class TextStage(StageModule):
    """Tokens to words and a sentence as wide as the pixels."""

    splits = True

    def __init__(self, encoder: ClipText, project_w: nn.Linear, project_s: nn.Linear) -> None:
        super().__init__()
        self.encoder, self.project_w, self.project_s = encoder, project_w, project_s

    def frozen(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """int32 [N, L] to words [N, L, D] and the sentence [N, D]."""
        words = self.encoder(inputs[0])
        return words, self.encoder.sentence(words, inputs[0])

    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        """To W [N, L, C] and s [N, C]."""
        return self.project_w(values[0]), self.project_s(values[1])


class FusionStage(StageModule):
    """Three blocks, the hierarchy between them."""

    def __init__(self, blocks: nn.ModuleList, hierarchy: nn.ModuleList) -> None:
        super().__init__()
        self.blocks, self.hierarchy = blocks, hierarchy

    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        """V_1, both halves, W, s and bool [N, L] to V'' [N, P, C] and W' [N, L, C]."""
        pixels, second, third, words, sentence, token_mask = values
        pixels, words = self.blocks[0](pixels, words, sentence, token_mask)
        for block, merge, tap in zip(self.blocks[1:], self.hierarchy, (second, third), strict=True):
            pixels, words = block(merge(pixels, tap), words, sentence, token_mask)
        return pixels, words


class DecoderStage(StageModule):
    """Pixels and words to mask logits."""

    def __init__(self, decoder: QueryDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        """[N, P, C], [N, L, C] and bool [N, L] to logits [N, h, w]."""
        return (self.decoder(*values),)


class Haris(ReferringNetwork):
    """HARIS on SAM's encoder of any size."""

    def __init__(self, config: HarisConfig) -> None:
        super().__init__()
        self.config = config
        size, width = sam_sizes.SIZES[config.sam], config.width
        self.cells = size.cells
        self.image = ImageSpec(size=size.image_size, mean=sam.MEAN, std=sam.STD)
        self.text = TextSpec(max_tokens=config.tokens, padded_tokens=-(-config.tokens // 8) * 8)
        self.mask = MaskSpec(size=4 * size.cells)
        self.image_encoder = SamEncoder(size).requires_grad_(False)
        self.text_encoder = ClipText(
            config.text, length=self.text.length, projection=config.text.width
        ).requires_grad_(False)
        self.hierarchy = nn.ModuleList(
            Hierarchy(width, cells=size.cells) for _ in range(BLOCKS - 1)
        )
        self.blocks = nn.ModuleList(HumanLikeAttention(width) for _ in range(BLOCKS))
        self.image_stage = ImageStage(
            self.image,
            self.image_encoder,
            nn.ModuleList(nn.Linear(size.width, width) for _ in range(BLOCKS)),
            nn.ModuleList(merge.of_tap for merge in self.hierarchy if isinstance(merge, Hierarchy)),
        )
        self.text_stage = TextStage(
            self.text_encoder,
            nn.Linear(config.text.width, width),
            nn.Linear(config.text.width, width),
        )
        self.fusion_stage = FusionStage(self.blocks, self.hierarchy)
        self.decoder_stage = DecoderStage(
            QueryDecoder(
                width=width,
                layers=config.decoder_layers,
                heads=config.heads,
                hidden=config.hidden,
                cells=size.cells,
            )
        )

    def tokenizer_json(self) -> str:
        """CLIP's."""
        return clip_text.tokenizer_json()

    def official_keys(self) -> Mapping[str, OfficialFile]:
        """SAM's and CLIP's files."""
        return {
            "sam": sam.official_file(self.image_encoder, "image_encoder."),
            "clip": clip_text.official_file(self.text_encoder, "text_encoder."),
        }

    def train(self, mode: bool = True) -> Haris:
        """Switch the mode of the head; the frozen encoders always stay in evaluation mode."""
        super().train(mode)
        self.image_encoder.eval()
        self.text_encoder.eval()
        return self

    def stages(self) -> tuple[Stage, ...]:
        """Image, text, fusion and decoder."""
        c, p, length, h = self.config.width, self.cells**2, self.text.length, self.cells
        outer = {spec.name: spec for spec in external_inputs(self.image, self.text)}
        of_image = (
            float32("v1", 1, p, c),
            float32("half2", 1, c, h, h),
            float32("half3", 1, c, h, h),
        )
        of_text = (float32("w", EXPRESSIONS, length, c), float32("s", EXPRESSIONS, c))
        fused = (float32("v3", EXPRESSIONS, p, c), float32("w3", EXPRESSIONS, length, c))
        logits = float32(LOGITS, EXPRESSIONS, self.mask.size, self.mask.size)
        mask = outer[TOKEN_MASK]
        specs = (
            StageSpec(
                id="image_encoder",
                role="image_encoder",
                inputs=(outer[PIXELS], outer[VALID_BOX]),
                outputs=of_image,
            ),
            StageSpec(
                id="text_encoder",
                role="text_encoder",
                inputs=(outer[TOKEN_IDS],),
                outputs=of_text,
            ),
            StageSpec(
                id="fusion", role="fusion", inputs=(*of_image, *of_text, mask), outputs=fused
            ),
            StageSpec(id="decoder", role="decoder", inputs=(*fused, mask), outputs=(logits,)),
        )
        modules = (self.image_stage, self.text_stage, self.fusion_stage, self.decoder_stage)
        return tuple(
            Stage(spec=spec, module=module) for spec, module in zip(specs, modules, strict=True)
        )


def _encoder(network: ReferringNetwork) -> int:
    assert isinstance(network, Haris)
    return parameters(network.image_encoder)


def _variant(size: str, summary: str) -> Variant:
    return Variant(
        summary=summary,
        build=partial(_build, HarisConfig(sam=size, text=ClipTextSize())),
        longest=LONGEST,
        published=True,
        weights_licence="SAM Apache-2.0, CLIP MIT",
        figures=sam_sizes.figures(size, _encoder),
    )


def _build(config: HarisConfig, tokens: int | None = None) -> Haris:
    chosen = config if tokens is None else replace(config, tokens=tokens)
    return seeded(partial(Haris, chosen))


TINY: Final = HarisConfig(
    sam="tiny",
    text=ClipTextSize(width=64, heads=1, layers=2),
    width=32,
    decoder_layers=1,
    heads=4,
    hidden=64,
)

ARCHITECTURE = Architecture(
    name="haris",
    title="HARIS",
    source="arXiv 2405.10707; no code was published",
    default="vit_b",
    variants={
        "vit_b": _variant("vit_b", "SAM ViT-B and CLIP ViT-B/16, 1024 pixels"),
        "vit_l": _variant("vit_l", "SAM ViT-L and CLIP ViT-B/16, 1024 pixels"),
        "vit_h": _variant("vit_h", "SAM ViT-H and CLIP ViT-B/16, 1024 pixels, the paper's"),
        "tiny": Variant(
            summary="the published code path at toy size, for tests",
            build=partial(_build, TINY),
            longest=LONGEST,
            published=False,
            weights_licence="random",
        ),
    },
)
