"""ETRIS: bridges between the two towers of CLIP (ICCV 2023; kkakkkka/ETRIS @cdc6d8e).

The towers are frozen but for their positions. A Bridger exchanges what they see at three depths, so
only the first third of each depends on the picture or on the sentence alone. Where paper and code
differ the code is followed, as the published weights are the code's. Padded words take part in the
Bridger: results depend on L.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Final

from torch import Tensor, nn

from rt_ris.spec import (
    EXPRESSIONS,
    LOGITS,
    PIXELS,
    TOKEN_IDS,
    VALID_BOX,
    ImageSpec,
    MaskSpec,
    StageSpec,
    TextSpec,
    external_inputs,
)
from rt_ris_train.architecture import (
    Architecture,
    Conversion,
    Figure,
    OfficialFile,
    ReferringNetwork,
    Stage,
    StageModule,
    Supervision,
    Variant,
    float32,
    seeded,
)
from rt_ris_train.backbones import clip_text
from rt_ris_train.backbones.clip_image import (
    ClipResNet,
    ClipVit,
    ResNetSize,
    VitSize,
    resize_positions,
)
from rt_ris_train.backbones.clip_text import ClipText, ClipTextSize
from rt_ris_train.blocks.alignment import GlobalAlignment, HierarchicalAlignment, Projector
from rt_ris_train.blocks.bridger import Bridger, BridgerSize
from rt_ris_train.blocks.pixels import Normalise
from rt_ris_train.counting import network_multiply_adds, parameters

MEAN: Final = (255 * 0.48145466, 255 * 0.4578275, 255 * 0.40821073)
STD: Final = (255 * 0.26862954, 255 * 0.26130258, 255 * 0.27577711)
BORDER: Final = (123, 117, 104)
LONGEST: Final = clip_text.POSITIONS
"""CLIP's mean in whole levels, the border that the authors warp pictures onto."""

POSITIONS: Final = "positional_embedding"


@dataclass(frozen=True, kw_only=True)
class EtrisConfig:
    """One size.

    Attributes:
        image: of CLIP's image tower.
        text: of its text tower; a third of its layers lies before each meeting.
        side: S, pixels.
        tokens: L; 17 for RefCOCO and RefCOCO+, 22 for G-Ref.
        bridger_heads: of the Bridger's attentions.
        width: of the head.
        layers: of global alignment.
        hidden: of its feed-forward.
        frozen: the towers never train but for their positions; false only where their weights are
            random ones.
    """

    image: ResNetSize | VitSize
    text: ClipTextSize = field(default_factory=ClipTextSize)
    side: int = 416
    tokens: int = 17
    bridger_heads: int = 4
    width: int = 512
    layers: int = 3
    hidden: int = 512
    frozen: bool = True

    @property
    def cells(self) -> int:
        """H = w of the head's grid."""
        return self.side // 16


class ImageStage(StageModule):
    """Pixels to the image tower's first third: its stem to layer 2, or a third of its blocks."""

    def __init__(self, image: ImageSpec, tower: ClipResNet | ClipVit) -> None:
        super().__init__()
        self.normalise, self.tower = Normalise(image), tower

    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        """uint8 [B, S, S, 3] and int32 [B, 4] to the feature [B, ...]."""
        return (self.tower.front(self.normalise(*values)),)


class TextStage(StageModule):
    """Tokens to the text tower's first third."""

    def __init__(self, tower: ClipText) -> None:
        super().__init__()
        self.tower = tower

    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        """int32 [N, L] to words [N, L, D]."""
        words = self.tower.embed(values[0])
        return (self.tower.blocks(words, stop=len(self.tower.transformer.resblocks) // 3),)


class FusionStage(StageModule):
    """The rest of both towers with the Bridger between them, and hierarchical alignment."""

    def __init__(
        self,
        image: ClipResNet | ClipVit,
        text: ClipText,
        bridger: Bridger,
        neck: HierarchicalAlignment,
    ) -> None:
        super().__init__()
        self.image, self.text, self.bridger, self.neck = image, text, bridger, neck

    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Feature [N or 1, ...], words [N, L, D], ids [N, L] to F_q, F_w and F_s."""
        feature, words, token_ids = values
        feature = feature.expand(words.shape[0], *feature.shape[1:])
        each = len(self.text.transformer.resblocks) // 3
        maps: list[Tensor] = []
        before: tuple[Tensor, Tensor] | None = None
        for depth in range(3):
            if depth:
                feature = self.image.step(depth - 1, feature)
                words = self.text.blocks(words, first=depth * each, stop=(depth + 1) * each)
            grid, words, before = self.bridger.meet(depth, self.image.grid(feature), words, before)
            feature = self.image.back(feature, grid)
            maps.append(grid)
        words = self.text.ln_final(words)
        sentence = self.text.sentence(words, token_ids)
        third, fourth, _ = maps
        return self.neck((third, fourth, self.image.end(feature)), sentence), words, sentence


class DecoderStage(StageModule):
    """Global alignment and the projector."""

    def __init__(self, decoder: GlobalAlignment, proj: Projector) -> None:
        super().__init__()
        self.decoder, self.proj = decoder, proj

    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        """F_q [N, C, h, w], F_w [N, L, D], F_s [N, D'], ids [N, L] to logits [N, 4h, 4w]."""
        image, words, sentence, token_ids = values
        # As the authors have it: the id 0 of a pad is also the id of "!".
        visible = token_ids != 0
        return (self.proj(self.decoder(image, words, visible), sentence),)


class Etris(ReferringNetwork):
    """ETRIS on a CLIP of any size."""

    supervision = Supervision(at="grid", target="nearest", padding="background")

    def __init__(self, config: EtrisConfig) -> None:
        super().__init__()
        self.config = config
        self.image = ImageSpec(
            size=config.side,
            fit="warp",
            resample="bicubic",
            fill=BORDER,
            mean=MEAN,
            std=STD,
        )
        self.text = TextSpec(max_tokens=config.tokens)
        self.mask = MaskSpec(
            size=4 * config.cells,
            upsample="bicubic_corners",
            interpolate="probabilities",
            threshold=0.35,
        )
        size = config.image
        self.visual: ClipResNet | ClipVit = (
            ClipResNet(size, image_size=config.side)
            if isinstance(size, ResNetSize)
            else ClipVit(size, image_size=config.side)
        )
        self.textual = ClipText(config.text, length=config.tokens, projection=size.outputs)
        channels = _channels(size)
        self.bridger = Bridger(
            BridgerSize(
                tower="resnet" if isinstance(size, ResNetSize) else "vit",
                channels=channels,
                words=config.text.width,
                cells=config.cells,
                heads=config.bridger_heads,
            )
        )
        self.neck = HierarchicalAlignment(
            channels=(*channels[:2], size.outputs),
            strides=(2, 1, 2) if isinstance(size, ResNetSize) else (1, 1, 1),
            sentence=size.outputs,
            width=config.width,
            cells=config.cells,
        )
        self.decoder = GlobalAlignment(
            layers=config.layers,
            width=config.width,
            heads=8,
            hidden=config.hidden,
            cells=config.cells,
            words=config.tokens,
        )
        self.proj = Projector(width=config.width, sentence=size.outputs)
        if config.frozen:
            self._freeze()
        self.image_stage = ImageStage(self.image, self.visual)
        self.text_stage = TextStage(self.textual)
        self.fusion_stage = FusionStage(self.visual, self.textual, self.bridger, self.neck)
        self.decoder_stage = DecoderStage(self.decoder, self.proj)

    def tokenizer_json(self) -> str:
        """CLIP's."""
        return clip_text.tokenizer_json()

    def kept_frozen(self) -> Collection[str]:
        """The random projection beside the pool, which CLIP's files do not have."""
        return [name for name, _ in self.named_parameters() if ".attnpool.connect." in name]

    def official_keys(self) -> Mapping[str, OfficialFile]:
        """CLIP's released files, and the authors' fine-tuned ones."""
        return {"clip": self._clip_file(), "etris": self._fine_tuned_file()}

    def stages(self) -> tuple[Stage, ...]:
        """A third of the image tower, a third of the text tower, fusion, decoder."""
        config = self.config
        outer = {spec.name: spec for spec in external_inputs(self.image, self.text)}
        v1 = float32("v1", 1, *self._front_shape())
        t1 = float32("t1", EXPRESSIONS, config.tokens, config.text.width)
        f_q = float32("f_q", EXPRESSIONS, config.width, config.cells, config.cells)
        f_w = float32("f_w", EXPRESSIONS, config.tokens, config.text.width)
        f_s = float32("f_s", EXPRESSIONS, config.image.outputs)
        logits = float32(LOGITS, EXPRESSIONS, self.mask.size, self.mask.size)
        ids = outer[TOKEN_IDS]
        specs = (
            StageSpec(
                id="image_front",
                role="image_encoder",
                inputs=(outer[PIXELS], outer[VALID_BOX]),
                outputs=(v1,),
            ),
            StageSpec(id="text_front", role="text_encoder", inputs=(ids,), outputs=(t1,)),
            StageSpec(id="fusion", role="fusion", inputs=(v1, t1, ids), outputs=(f_q, f_w, f_s)),
            StageSpec(id="decoder", role="decoder", inputs=(f_q, f_w, f_s, ids), outputs=(logits,)),
        )
        modules = (self.image_stage, self.text_stage, self.fusion_stage, self.decoder_stage)
        return tuple(
            Stage(spec=spec, module=module) for spec, module in zip(specs, modules, strict=True)
        )

    def _front_shape(self) -> tuple[int, ...]:
        size = self.config.image
        if isinstance(size, VitSize):
            return (self.config.cells**2 + 1, size.width)
        return (8 * size.width, 2 * self.config.cells, 2 * self.config.cells)

    def _freeze(self) -> None:
        for tower in (self.visual, self.textual):
            for name, value in tower.named_parameters():
                value.requires_grad_(POSITIONS in name)

    def _tower_keys(self) -> dict[str, str]:
        """Name in CLIP's files by the name here, of both towers."""
        prefix = "network." if isinstance(self.visual, ClipResNet) else ""
        keys = {
            f"visual.{name}": f"visual.{name.removeprefix(prefix)}"
            for name in self.visual.state_dict()
        }
        return keys | {f"textual.{name}": name for name in self.textual.state_dict()}

    def _clip_file(self) -> OfficialFile:
        conversions = {}
        if isinstance(self.visual, ClipVit):
            size = self.visual.size
            conversions["visual.positional_embedding"] = Conversion(
                shape=((224 // size.patch) ** 2 + 1, size.width),
                apply=partial(resize_positions, after=self.visual.cells),
            )
        unused = {name: why for name, why in clip_text.UNUSED.items() if name != "visual."}
        return OfficialFile(
            title="CLIP, a state dict with OpenAI's names",
            keys={own: name for own, name in self._tower_keys().items() if ".connect." not in name},
            unused=unused,
            conversions=conversions,
        )

    def _fine_tuned_file(self) -> OfficialFile:
        keys = {own: f"backbone.{name}" for own, name in self._tower_keys().items()}
        conversions = {}
        for part in ("bridger", "neck", "decoder", "proj"):
            keys |= {
                f"{part}.{name}": f"{part}.{name}" for name in getattr(self, part).state_dict()
            }
        for number in (3, 4, 5):
            gate = f"neck.fusion{number}"
            for kind, conversion in _gate_conversions(self.config.width).items():
                keys[f"{gate}.value.{kind}"] = f"{gate}.multihead_attn.in_proj_{kind}"
                keys[f"{gate}.out.{kind}"] = f"{gate}.multihead_attn.out_proj.{kind}"
                conversions[f"{gate}.value.{kind}"] = conversion
        return OfficialFile(
            title="ETRIS, a fine-tuned checkpoint of the authors",
            keys=keys,
            unused={"backbone.logit_scale": "of CLIP's own loss"},
            conversions=conversions,
            whole=True,
        )


def _gate_conversions(width: int) -> dict[str, Conversion]:
    """Of packed projections only the value's is alive where there is one key."""

    def value(packed: Tensor) -> Tensor:
        return packed[2 * width :]

    return {
        "weight": Conversion(shape=(3 * width, width), apply=value),
        "bias": Conversion(shape=(3 * width,), apply=value),
    }


def _channels(size: ResNetSize | VitSize) -> tuple[int, int, int]:
    if isinstance(size, VitSize):
        return (size.width,) * 3
    return (8 * size.width, 16 * size.width, 32 * size.width)


def _build(config: EtrisConfig, tokens: int | None = None) -> Etris:
    chosen = config if tokens is None else replace(config, tokens=tokens)
    return seeded(partial(Etris, chosen))


def _part(name: str) -> Callable[[ReferringNetwork], int]:
    def count(network: ReferringNetwork) -> int:
        part = getattr(network, name)
        assert isinstance(part, nn.Module)
        return parameters(part)

    return count


def _printed_decoder(network: ReferringNetwork) -> int:
    """What the paper calls the decoder: both alignments and the projector, less one projection."""
    assert isinstance(network, Etris)
    whole = sum(parameters(part) for part in (network.neck, network.decoder, network.proj))
    return whole - parameters(network.neck.txt_proj)


PAPER: Final = "paper, table 6"
CODE: Final = "the authors' code, counted"
AT: Final = "416 x 416, 17 tokens"
DEAD: Final = 3 * (2 * 512 * 512 + 2 * 512)
"""Weights of the query and key projections of attentions to one token."""

SAVED: Final = 3 * (2 * 676 * 512 * 512 + 2 * 676 * 512) + 256 * 256 * 104 * 104
"""Multiply-adds of those attentions, and of the 1x1 convolution before the dynamic kernel."""

_GATES = "query and key projections of attentions to one token, which a gate does without"


def _figures(*, whole: float, cost: float, bridger: float) -> tuple[Figure, ...]:
    """What is printed or can be counted of one size; the ViT's heads are the same."""
    dead = "the gates' dead projections and CLIP's logit scale"
    saved = "attentions to one token as gates; the 1x1 convolution joined with the dynamic kernel"
    known = {1.94e6: "", 1.68e6: "the code has as many as for R101", 1.39e6: "the code has 0.599 M"}
    return (
        Figure(
            quantity="parameters",
            part="Bridger",
            at=AT,
            published=bridger,
            source=PAPER,
            count=_part("bridger"),
            note=known[bridger],
        ),
        Figure(
            quantity="parameters",
            part="whole network",
            at=AT,
            published=whole,
            source=CODE,
            count=parameters,
            added=DEAD + 1,
            note=dead,
        ),
        Figure(
            quantity="multiply_adds",
            part="whole network",
            at=AT,
            published=cost,
            source=CODE,
            count=network_multiply_adds,
            added=SAVED,
            note=saved,
        ),
    )


_DECODER = Figure(
    quantity="parameters",
    part="decoder",
    at=AT,
    published=23.98e6,
    source=PAPER,
    count=_printed_decoder,
    added=DEAD,
    note=_GATES,
)


def _variant(summary: str, config: EtrisConfig, figures: tuple[Figure, ...]) -> Variant:
    return Variant(
        summary=summary,
        build=partial(_build, config),
        longest=LONGEST,
        published=True,
        weights_licence="CLIP MIT; the authors' fine-tuned weights MIT",
        figures=figures,
    )


R50 = EtrisConfig(image=ResNetSize(layers=(3, 4, 6, 3), outputs=1024))
R101 = EtrisConfig(image=ResNetSize(layers=(3, 4, 23, 3), outputs=512))
V16 = EtrisConfig(image=VitSize(), bridger_heads=8)
TINY = EtrisConfig(
    image=ResNetSize(layers=(1, 1, 1, 1), outputs=64, width=8, pool_cells=2),
    text=ClipTextSize(width=64, heads=1, layers=3),
    side=96,
    width=64,
    layers=1,
    hidden=64,
    frozen=False,
)

ARCHITECTURE = Architecture(
    name="etris",
    title="ETRIS",
    source="ICCV 2023; kkakkkka/ETRIS @cdc6d8e",
    default="r101",
    variants={
        "r50": _variant(
            "CLIP RN50, 416 pixels", R50, _figures(whole=132.78e6, cost=54.6e9, bridger=1.68e6)
        ),
        "r101": _variant(
            "CLIP RN101, 416 pixels, the paper's main size",
            R101,
            (*_figures(whole=146.92e6, cost=66.9e9, bridger=1.94e6), _DECODER),
        ),
        "v16": _variant(
            "CLIP ViT-B/16, 416 pixels",
            V16,
            _figures(whole=173.26e6, cost=98.6e9, bridger=1.39e6),
        ),
        "tiny": Variant(
            summary="the published code path at toy size, for tests; its towers train",
            build=partial(_build, TINY),
            longest=LONGEST,
            published=False,
            weights_licence="random",
        ),
    },
)
