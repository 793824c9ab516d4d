"""DMMI: beyond one-to-one (ICCV 2023; toggle1995/RIS-DMMI @753cd60).

Behind each stage of the image backbone pixels and words look at each other, so that only the first
stage depends on the picture alone. The second decoder, which rebuilds an erased sentence, and the
contrast of the two sides act in training only. Pads are attended to: results depend on L.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final

import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional

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
from rt_ris.text import Tokens
from rt_ris_train.architecture import (
    Architecture,
    Conversion,
    Figure,
    OfficialFile,
    Outputs,
    ReferringNetwork,
    Stage,
    StageModule,
    Supervision,
    Variant,
    float32,
    seeded,
)
from rt_ris_train.backbones import minilm
from rt_ris_train.backbones.bert import Bert, BertSize
from rt_ris_train.backbones.pyramid import ResNetSize, ResNetTrunk, SwinSize, SwinTrunk
from rt_ris_train.blocks.bidirectional import Exchange
from rt_ris_train.blocks.pixels import Normalise
from rt_ris_train.blocks.text_to_image import Contrast, ImageToText, TextToImage
from rt_ris_train.counting import network_multiply_adds, parameters
from rt_ris_train.data.erasing import erase_nouns

MEAN: Final = (255 * 0.485, 255 * 0.456, 255 * 0.406)
STD: Final = (255 * 0.229, 255 * 0.224, 255 * 0.225)
ERASED: Final = "erased_ids"
LONGEST: Final = 512
"""BERT has positions for so many tokens."""
TEMPERATURE: Final = 0.05
COSINE_FLOOR: Final = 1e-6


@dataclass(frozen=True, kw_only=True)
class DmmiConfig:
    """One size.

    Attributes:
        image: of the image backbone.
        text: of BERT.
        side: S, pixels; a multiple of 32.
        tokens: L.
        hidden: of the decoders' feed-forward layers.
        heads: of their attentions.
    """

    image: SwinSize | ResNetSize
    text: BertSize = field(default_factory=BertSize)
    side: int = 480
    tokens: int = 20
    hidden: int = 2048
    heads: int = 8

    def cells(self, stage: int) -> int:
        """H = w of a stage's map."""
        return self.side // (4 << stage)


class ImageStage(StageModule):
    """Pixels to the first stage of the backbone."""

    def __init__(self, image: ImageSpec, trunk: SwinTrunk | ResNetTrunk) -> None:
        super().__init__()
        self.normalise, self.trunk = Normalise(image), trunk

    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        """uint8 [B, S, S, 3] and int32 [B, 4] to tokens [B, P, C]."""
        return (self.trunk.front(self.normalise(*values)),)


class TextStage(StageModule):
    """Tokens to BERT's words."""

    def __init__(self, bert: Bert) -> None:
        super().__init__()
        self.bert = bert

    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        """int32 [N, L] and bool [N, L] to [N, L, D]."""
        return (self.bert(*values),)


class FusionStage(StageModule):
    """The rest of the backbone, with an exchange behind each stage."""

    def __init__(
        self,
        config: DmmiConfig,
        trunk: SwinTrunk | ResNetTrunk,
        exchanges: nn.ModuleList,
        norms: nn.ModuleList,
    ) -> None:
        super().__init__()
        self.config, self.trunk = config, trunk
        self.exchanges, self.norms = exchanges, norms

    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Tokens [N or 1, P, C], words [N, L, D], bool [N, L] to four maps and refined words.

        A Swin hands on what the words gave, normed; a ResNet its own feature.
        """
        tokens, words, token_mask = values
        tokens = tokens.expand(words.shape[0], -1, -1)
        maps = []
        for stage, exchange in enumerate(self.exchanges):
            cells = self.config.cells(stage)
            if stage:
                tokens = self.trunk.step(stage, tokens, 2 * cells)
            tokens, words, gained = exchange(tokens, words, token_mask, cells)
            shown = self.norms[stage](gained) if len(self.norms) else tokens
            maps.append(shown.transpose(1, 2).reshape(-1, shown.shape[2], cells, cells))
        return (*maps, words)


class DecoderStage(StageModule):
    """Four maps and refined words to logits."""

    def __init__(self, decoder: TextToImage) -> None:
        super().__init__()
        self.decoder = decoder

    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        """[N, C_i, h_i, w_i] fine to deep and [N, L, D] to logits [N, h, w]."""
        c1, c2, c3, c4, words = values
        return (self.decoder((c1, c2, c3, c4), words).logits,)


class Dmmi(ReferringNetwork):
    """DMMI on Swin or a ResNet."""

    supervision = Supervision(at="input", target="nearest")

    def __init__(self, config: DmmiConfig) -> None:
        super().__init__()
        self.config = config
        self.image = ImageSpec(size=config.side, fit="stretch", mean=MEAN, std=STD)
        self.text = TextSpec(max_tokens=config.tokens, keep_end=False, field="raw")
        self.mask = MaskSpec(size=config.cells(0), upsample="bilinear_corners")
        channels, words = config.image.channels, config.text.width
        swin = isinstance(config.image, SwinSize)
        self.trunk: SwinTrunk | ResNetTrunk = (
            SwinTrunk(config.image)
            if isinstance(config.image, SwinSize)
            else ResNetTrunk(config.image)
        )
        self.bert = Bert(config.text)
        self.exchanges = nn.ModuleList(Exchange(width=width, words=words) for width in channels)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in channels if swin)
        sizes = {"width": words, "hidden": config.hidden, "heads": config.heads}
        self.decoder = TextToImage(channels, **sizes)
        self.rebuild = ImageToText(**sizes)
        self.contrast = Contrast(words)
        if swin:
            self.exchanges.apply(_initialise)
        self.image_stage = ImageStage(self.image, self.trunk)
        self.text_stage = TextStage(self.bert)
        self.fusion_stage = FusionStage(config, self.trunk, self.exchanges, self.norms)
        self.decoder_stage = DecoderStage(self.decoder)

    def tokenizer_json(self) -> str:
        """That of bert-base-uncased, whose vocabulary MiniLM shares."""
        return minilm.tokenizer_json()

    def train(self, mode: bool = True) -> Dmmi:
        """Switch the mode; BERT stays in evaluation mode, as the authors train it."""
        super().train(mode)
        self.bert.eval()
        return self

    def stages(self) -> tuple[Stage, ...]:
        """The first stage of the backbone, BERT, fusion, decoder."""
        config = self.config
        outer = {spec.name: spec for spec in external_inputs(self.image, self.text)}
        channels, cells = config.image.channels, config.cells(0)
        x1 = float32("x1", 1, cells**2, channels[0])
        maps = tuple(
            float32(f"c{stage + 1}", EXPRESSIONS, width, config.cells(stage), config.cells(stage))
            for stage, width in enumerate(channels)
        )
        words, refined = (
            float32(name, EXPRESSIONS, config.tokens, config.text.width)
            for name in ("words", "refined")
        )
        logits = float32(LOGITS, EXPRESSIONS, cells, cells)
        specs = (
            StageSpec(
                id="image_stage1",
                role="image_encoder",
                inputs=(outer[PIXELS], outer[VALID_BOX]),
                outputs=(x1,),
            ),
            StageSpec(
                id="text_encoder",
                role="text_encoder",
                inputs=(outer[TOKEN_IDS], outer[TOKEN_MASK]),
                outputs=(words,),
            ),
            StageSpec(
                id="fusion",
                role="fusion",
                inputs=(x1, words, outer[TOKEN_MASK]),
                outputs=(*maps, refined),
            ),
            StageSpec(id="decoder", role="decoder", inputs=(*maps, refined), outputs=(logits,)),
        )
        modules = (self.image_stage, self.text_stage, self.fusion_stage, self.decoder_stage)
        return tuple(
            Stage(spec=spec, module=module) for spec, module in zip(specs, modules, strict=True)
        )

    def training_text(self, tokens: Tokens, *, seed: int) -> Mapping[str, npt.NDArray[Any]]:
        """The ids of the sentences with a run of nouns erased, int32 [N, L]."""
        return {ERASED: erase_nouns(tokens.token_ids, tokens.sentences, seed=seed)}

    def training_run(
        self,
        values: Mapping[str, Tensor],
        image_index: Tensor,
        *,
        present: Tensor,
        frozen: Mapping[str, tuple[Tensor, ...]] | None = None,
    ) -> tuple[Outputs, Mapping[str, Tensor]]:
        """``run``, with the losses ``similarity`` and ``contrastive``."""
        token_mask = values[TOKEN_MASK]
        (x1,) = self.image_stage(values[PIXELS], values[VALID_BOX])
        (words,) = self.text_stage(values[TOKEN_IDS], token_mask)
        *maps, refined = self.fusion_stage(x1.index_select(0, image_index), words, token_mask)
        decoded = self.decoder((maps[0], maps[1], maps[2], maps[3]), refined)
        (erased,) = self.text_stage(values[ERASED], token_mask)
        rebuilt = self.rebuild(decoded.middle, erased)
        image, sentence = self.contrast(decoded, refined)
        losses = {
            "similarity": similarity_loss(refined, rebuilt, token_mask, present),
            "contrastive": contrastive_loss(image, sentence, present),
        }
        return Outputs(logits=decoded.logits, existence=None), losses

    def official_keys(self) -> Mapping[str, OfficialFile]:
        """The backbones' released files, and the authors' fine-tuned ones."""
        words = self.bert.network.state_dict()
        bert = OfficialFile(
            title="bert-base-uncased, a state dict",
            keys={f"bert.network.{name}": f"bert.{name}" for name in words},
            unused={
                "bert.pooler.": "no pooled output is read",
                "cls.": "heads of BERT's own training",
                "bert.embeddings.position_ids": "a range, no weight",
            },
        )
        backbone = "swin" if isinstance(self.trunk, SwinTrunk) else "resnet"
        return {backbone: self._backbone_file(), "bert": bert, "dmmi": self._fine_tuned_file()}

    def _backbone_file(self) -> OfficialFile:
        keys = {f"trunk.{name}": name for name in self.trunk.state_dict()}
        if isinstance(self.trunk, SwinTrunk):
            return OfficialFile(
                title="Swin-B, swin_base_patch4_window12_384_22k.pth",
                keys={own: _swin_name(name) for own, name in keys.items() if _learned(own)},
                unused={
                    "head.": "the classifier",
                    "norm.": "of the classifier; each stage has a norm of its own here",
                    "*.attn_mask": "computed, not learned",
                    "*.relative_position_index": "computed, not learned",
                },
            )
        return OfficialFile(
            title="ResNet-101, resnet101-63fe2227.pth",
            keys={own: _resnet_name(name) for own, name in keys.items()},
            unused={"fc.": "the classifier"},
        )

    def _fine_tuned_file(self) -> OfficialFile:
        keys = {
            f"bert.network.{name}": f"bert_model.{name}" for name in self.bert.network.state_dict()
        }
        swin = isinstance(self.trunk, SwinTrunk)
        for name in self.trunk.state_dict():
            if _learned(name):
                keys[f"trunk.{name}"] = f"model.backbone.{_swin_name(name) if swin else name}"
        for stage in range(4):
            at = f"layers.{stage}" if swin else f"all_fusion{stage + 1}"
            for own, name in _exchange_names(self.exchanges[stage]).items():
                keys[f"exchanges.{stage}.{own}"] = f"model.backbone.{at}.{name}"
        for name in self.norms.state_dict():
            keys[f"norms.{name}"] = f"model.backbone.norm{name}"
        for part in ("decoder", "rebuild", "contrast"):
            for name in getattr(self, part).state_dict():
                keys[f"{part}.{name}"] = f"model.{_head_name(part, name)}"
        state = self.state_dict()
        return OfficialFile(
            title="DMMI, a fine-tuned checkpoint of the authors",
            keys=keys,
            unused={
                "*.relative_position_index": "computed, not learned",
                "*.decoder_layer.*": "a copy that nothing runs: the layer under layers.0 is alive",
                "bert_model.embeddings.position_ids": "a range, no weight",
            },
            conversions=_flat_convolutions(keys, {own: tuple(state[own].shape) for own in keys}),
            containers=("model", "bert_model"),
            whole=True,
        )


def similarity_loss(refined: Tensor, rebuilt: Tensor, mask: Tensor, present: Tensor) -> Tensor:
    """1 less the mean cosine of words and rebuilt words; a sentence without a target counts 1.

    Args:
        refined: words after the fourth exchange [N, L, D]; no gradient goes there.
        rebuilt: from the erased sentence [N, L, D].
        mask: bool [N, L].
        present: bool [N].
    """
    real = mask.to(rebuilt.dtype)
    cosine = functional.cosine_similarity(
        refined.detach() * real[..., None], rebuilt * real[..., None], dim=2, eps=COSINE_FLOOR
    )
    per_sentence = (cosine * real).sum(1) / real.sum(1) * present
    return 1 - per_sentence.mean()


def contrastive_loss(image: Tensor, sentence: Tensor, present: Tensor) -> Tensor:
    """Sum of the cross-entropies both ways over a batch's sentences, each other's negatives.

    Args:
        image: what was decoded [N, C].
        sentence: [N, C].
        present: bool [N]; the others count nothing.
    """
    scores = functional.normalize(image, dim=1) @ functional.normalize(sentence, dim=1).T
    own = torch.arange(len(scores), device=scores.device)
    both = [
        functional.cross_entropy(logits / TEMPERATURE, own, reduction="none")
        for logits in (scores, scores.T)
    ]
    return ((both[0] + both[1]) * present).mean()


def _learned(name: str) -> bool:
    return not name.endswith("relative_position_index")


def _swin_name(name: str) -> str:
    """The authors' name of a tensor of torchvision's Swin blocks."""
    return name.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.3.", ".mlp.fc2.")


def _resnet_name(name: str) -> str:
    """The name in torchvision; the first layer here begins with the stem."""
    for own, released in (("layer1.0.", "conv1."), ("layer1.1.", "bn1."), ("layer1.4.", "layer1.")):
        if name.startswith(own):
            return released + name[len(own) :]
    return name


_ATTENTION: Final = "fusion.image_lang_att."
_EXCHANGE: Final = {
    "word_share.": "W_l.0.",
    "res_gate.": "res_gate.",
    "fusion.vis_project.": "fusion.vis_project.0.",
    "fusion.project_mm.": "fusion.project_mm.0.",
    "fusion.word_value.": _ATTENTION + "f_value.0.",
    "fusion.pixel_value.": _ATTENTION + "f_value_v.0.",
    "fusion.to_pixels.": _ATTENTION + "W.0.",
    "fusion.to_words.": _ATTENTION + "W2.0.",
    "fusion.vis_weight": _ATTENTION + "vis_weight",
    "fusion.lan_weight": _ATTENTION + "lan_weight",
    **{
        f"fusion.{ours}.{index}.{part}.": f"{_ATTENTION}{theirs}{size}1.{name}.0."
        if theirs == "refinelan"
        else f"{_ATTENTION}{theirs}{size}{size}.{name}.0."
        for ours, theirs, sizes in (
            ("pixel_queries", "refineimg", (1, 3, 5)),
            ("word_queries", "refinelan", (1, 2, 3)),
        )
        for index, size in enumerate(sizes)
        for part, name in (("key", "f_key"), ("squeeze", "f_query"), ("gather", "f_query2"))
    },
}


def _exchange_names(exchange: nn.Module) -> dict[str, str]:
    """The authors' names of an exchange's tensors, behind the stage's prefix."""
    return {name: _renamed(name, _EXCHANGE) for name in exchange.state_dict()}


_HEADS: Final[Mapping[str, Mapping[str, str]]] = {
    "decoder": {
        "conv1_1.": "classifier.conv1_1.",
        "fusion1.": "classifier.transformer_fusion1.transformer_model.layers.0.",
        "fusion2.": "classifier.transformer_fusion2.transformer_model.layers.0.",
        **{
            f"block{step}.{layer}.": f"classifier.{layer}_{step}."
            for step in (4, 3, 2)
            for layer in ("conv1", "bn1", "conv2", "bn2")
        },
    },
    "rebuild": {
        "layer.": "classifier.lan_func.transformer_model.layers.0.",
        "conv1.": "classifier.lan_func.conv1.",
        "bn1.": "classifier.lan_func.bn1.",
    },
    "contrast": {
        "crossfuse1.": "classifier.crossfuse1.linear.",
        "crossfuse2.": "classifier.crossfuse2.linear.",
        "align_lan.": "contrastive.align_lan.0.",
    },
}


def _head_name(part: str, name: str) -> str:
    return _renamed(name, _HEADS[part])


def _renamed(name: str, prefixes: Mapping[str, str]) -> str:
    own = next(prefix for prefix in prefixes if name.startswith(prefix))
    return prefixes[own] + name[len(own) :]


def _flat_convolutions(
    keys: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Conversion]:
    """The authors' layers are convolutions of one tap, [o, i, 1], with windows unfolded into i."""
    flat = ("fusion.", "W_l.", "align_lan.")
    found = {}
    for own, name in keys.items():
        convolution = any(f".{part}" in name for part in flat) and name.endswith(".weight")
        if convolution and ".transformer_model." not in name:
            outputs, *rest = shapes[own]
            inner = 1
            for axis in rest:
                inner *= axis
            found[own] = Conversion(
                shape=(outputs, inner, 1), apply=partial(_reshaped, shape=shapes[own])
            )
    return found


def _reshaped(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    return tensor.reshape(shape)


def _initialise(module: nn.Module) -> None:
    """The authors' init_weights of Swin runs over the exchanges as well."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _build(config: DmmiConfig, tokens: int | None = None) -> Dmmi:
    chosen = config if tokens is None else replace(config, tokens=tokens)
    return seeded(partial(Dmmi, chosen))


LAYER: Final = 2 * (4 * 768 * 768 + 4 * 768) + (2 * 768 * 2048 + 2048 + 768) + 6 * 768
"""Weights of one of the decoders' layers, each of which the authors hold twice."""

AT: Final = "480 x 480, 20 tokens"
_TWICE: Final = "copies of three Transformer layers that nothing runs"


def _whole(published: float, source: str) -> Figure:
    return Figure(
        quantity="parameters",
        part="whole network, with what acts in training only",
        at=AT,
        published=published,
        source=source,
        count=parameters,
        added=3 * LAYER,
        note=_TWICE,
    )


def _cost(published: float | None, source: str, note: str) -> Figure:
    return Figure(
        quantity="multiply_adds",
        part="whole network, without what acts in training only",
        at=AT,
        published=published,
        source=source,
        count=network_multiply_adds,
        note=note,
    )


_LICENCE: Final = "Swin MIT, ResNet BSD-3-Clause, BERT Apache-2.0; the authors' name none"
TINY: Final = DmmiConfig(
    image=SwinSize(width=16, depths=(1, 1, 2, 1), heads=(1, 2, 4, 4), window=4, drop_path=0.0),
    text=BertSize(width=48, layers=2, heads=2, hidden=96, trained=None),
    side=96,
    hidden=96,
    heads=4,
)

ARCHITECTURE = Architecture(
    name="dmmi",
    title="DMMI",
    source="ICCV 2023; toggle1995/RIS-DMMI @753cd60",
    default="swin",
    variants={
        "swin": Variant(
            summary="Swin-B and BERT-base, 480 pixels",
            build=partial(_build, DmmiConfig(image=SwinSize())),
            longest=LONGEST,
            published=True,
            weights_licence=_LICENCE,
            figures=(
                _whole(341e6, "Shared-RIS, table 7"),
                _cost(
                    392e9,
                    "Shared-RIS, table 7",
                    "printed as GFLOPs; agrees without the branch that acts in training only",
                ),
            ),
        ),
        "r101": Variant(
            summary="ResNet-101 and BERT-base, 480 pixels",
            build=partial(_build, DmmiConfig(image=ResNetSize())),
            longest=LONGEST,
            published=True,
            weights_licence=_LICENCE,
            figures=(
                _whole(296.82e6 + 108.9e6, "the authors' code, counted"),
                _cost(None, "", ""),
            ),
        ),
        "tiny": Variant(
            summary="the published code path at toy size, for tests; all of it trains",
            build=partial(_build, TINY),
            longest=LONGEST,
            published=False,
            weights_licence="random",
        ),
    },
)
