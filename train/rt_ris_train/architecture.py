"""The contract of an architecture.

An architecture is one file in ``rt_ris_train/architectures`` that holds one module-level
``ARCHITECTURE``. The file's name is the architecture's name, so listing needs neither torch nor
the file itself. Third parties register a module under the entry-point group
``rt_ris.architectures``.

A network is a list of stages wired by tensor name (``rt_ris.spec``). Training, evaluation and
export all run the same stage modules: there is no second forward pass that could differ.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import numpy.typing as npt
import torch
from torch import Tensor, nn

from rt_ris.errors import CheckpointError, RecipeError
from rt_ris.spec import (
    EXISTENCE,
    LOGITS,
    PIXELS,
    TOKEN_IDS,
    TOKEN_MASK,
    VALID_BOX,
    Dependency,
    ImageSpec,
    MaskSpec,
    StageGraph,
    StageSpec,
    TensorSpec,
    TextSpec,
)
from rt_ris.text import Tokens

ENTRY_POINTS = "rt_ris.architectures"
SHORTEST = 3
"""Tokens of a sentence of one word: start, word, end."""


class StageModule(nn.Module, ABC):
    """The trainable side of one stage: positional tensors in, a tuple of tensors out.

    A stage with weights that never train may split itself: ``frozen(*inputs)`` gives a tuple of
    tensors that depend on no trained weight, ``trained(*frozen)`` gives the outputs. Training
    then stores the first part once per picture or sentence instead of computing it each epoch.
    """

    splits: bool = False

    def frozen(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """The part without trained weights; the identity unless the stage splits."""
        return inputs

    @abstractmethod
    def trained(self, *values: Tensor) -> tuple[Tensor, ...]:
        """The rest of the stage, from what ``frozen`` returned to the stage's outputs."""

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """All of the stage: ``trained(*frozen(*inputs))``."""
        return self.trained(*self.frozen(*inputs))


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage's declaration and the module that computes it."""

    spec: StageSpec
    module: StageModule


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """How a tensor of a published file becomes the network's.

    Attributes:
        shape: of the tensor in the file.
        apply: makes the network's tensor of it; a view, a transposition, a resize of positions.
    """

    shape: tuple[int, ...]
    apply: Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class OfficialFile:
    """A weight file that others publish, and where its tensors go.

    Attributes:
        title: what the file is called by those who publish it.
        keys: name in the file by the full name in the network; several names in the network may
            be filled from one in the file.
        unused: why tensors of the file have no place in the network, by the pattern of their
            names; a pattern is a prefix, or has ``*`` where anything may stand.
        conversions: by the full name in the network, where the file's tensor has another form.
        containers: keys of the file's dictionary that each hold a state dict; their names are
            prefixed to those of the tensors, ``model.`` and ``bert_model.``. Empty where the file
            holds one state dict, whose names stand alone.
        whole: the file fills the whole network, as fine-tuned, not only an encoder.
    """

    title: str
    keys: Mapping[str, str]
    unused: Mapping[str, str]
    conversions: Mapping[str, Conversion] = field(default_factory=dict)
    containers: tuple[str, ...] = ()
    whole: bool = False


@dataclass(frozen=True, kw_only=True)
class OfficialTokenizer:
    """A vocabulary that others publish and that no package brings.

    Attributes:
        title: the file's name.
        source: where its authors publish it.
        convert: makes a ``tokenizers`` JSON document of the file's bytes; raises
            ``CheckpointError`` for bytes that are not such a file.
    """

    title: str
    source: str
    convert: Callable[[bytes], str]


@dataclass(frozen=True, kw_only=True)
class Supervision:
    """Where the loss compares logits with the target, and how the target gets there.

    Attributes:
        at: ``grid`` compares on the logit grid; ``input`` resizes the logits to S x S first, as
            ``MaskSpec.upsample`` says.
        target: ``area`` is the share of a cell that the mask covers, ``nearest`` the mask at one
            point of the cell, after the picture's own fit.
        padding: what the loss makes of cells beyond the picture: it leaves them out, or they are
            background like any other.
    """

    at: Literal["grid", "input"] = "grid"
    target: Literal["area", "nearest"] = "area"
    padding: Literal["left_out", "background"] = "left_out"


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number that somebody published about a size, and how to count the same thing here.

    Attributes:
        quantity: what is counted.
        part: of the network, such as ``whole network`` or ``image encoder``.
        at: the configuration, such as ``480 x 480, 20 tokens``.
        published: None where no source prints one.
        source: who prints it.
        count: counts ours on a network without memory for weights (``torch.device("meta")``).
        added: what the authors' form has and an exactly equal form of ours does without; added to
            ours before the two are compared.
        note: what ``added`` is, and why numbers that differ do.
    """

    quantity: Literal["parameters", "multiply_adds"]
    part: str
    at: str
    published: float | None
    source: str
    count: Callable[[ReferringNetwork], int]
    added: int = 0
    note: str = ""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B pictures and N sentences about them.

    Attributes:
        pixels: uint8 [B, S, S, 3].
        valid_box: int32 [B, 4], top, left, bottom, right.
        token_ids: int32 [N, L].
        token_mask: bool [N, L].
        image_index: int64 [N], which picture each sentence is about.
    """

    pixels: Tensor
    valid_box: Tensor
    token_ids: Tensor
    token_mask: Tensor
    image_index: Tensor


@dataclass(frozen=True, kw_only=True)
class Outputs:
    """What a network says about N sentences.

    Attributes:
        logits: float32 [N, h, w], mask logits.
        existence: float32 [N], logit that the thing is there; None without such an output.
    """

    logits: Tensor
    existence: Tensor | None


class ReferringNetwork(nn.Module, ABC):
    """A referring segmentation network as a graph of stages."""

    image: ImageSpec
    text: TextSpec
    mask: MaskSpec
    supervision: Supervision = Supervision()

    @abstractmethod
    def stages(self) -> tuple[Stage, ...]:
        """The stages in running order."""

    @abstractmethod
    def tokenizer_json(self) -> str:
        """The tokenizer as a ``tokenizers`` JSON document, without truncation or padding."""

    def official_keys(self) -> Mapping[str, OfficialFile]:
        """The published weight files this network takes, by the label users name them with."""
        return {}

    def official_tokenizer(self) -> OfficialTokenizer | None:
        """The published vocabulary this network needs; None where a package brings it."""
        return None

    def use_tokenizer(self, document: str) -> None:
        """Take the ``tokenizers`` document made of the published vocabulary.

        Raises:
            CheckpointError: this network needs none.
        """
        raise CheckpointError("This network brings its own tokenizer; give none.")

    def kept_frozen(self) -> Collection[str]:
        """Frozen weights that no published file brings, so that checkpoints must hold them."""
        return ()

    def training_text(self, tokens: Tokens, *, seed: int) -> Mapping[str, npt.NDArray[Any]]:
        """Further text inputs that only ``training_run`` reads, each [N, ...], by name."""
        return {}

    def training_run(
        self,
        values: Mapping[str, Tensor],
        image_index: Tensor,
        *,
        present: Tensor,
        frozen: Mapping[str, tuple[Tensor, ...]] | None = None,
    ) -> tuple[Outputs, Mapping[str, Tensor]]:
        """``run``, and the losses that need more than its outputs, scalars by name.

        Args:
            values: as in ``run``, with those of ``training_text``.
            image_index: as in ``run``.
            present: bool [N], the sentence has a target.
            frozen: as in ``run``.
        """
        return self.run(values, image_index, frozen=frozen), {}

    def graph(self) -> StageGraph:
        """The wiring of the stages."""
        return StageGraph(stages=tuple(stage.spec for stage in self.stages()))

    def forward(self, batch: Batch) -> Outputs:
        """Run all stages, image stages once per picture and text stages once per sentence."""
        values = {
            PIXELS: batch.pixels,
            VALID_BOX: batch.valid_box,
            TOKEN_IDS: batch.token_ids,
            TOKEN_MASK: batch.token_mask,
        }
        return self.run(values, batch.image_index)

    def run(
        self,
        values: Mapping[str, Tensor],
        image_index: Tensor,
        *,
        frozen: Mapping[str, tuple[Tensor, ...]] | None = None,
    ) -> Outputs:
        """Run the stage graph on named values.

        Args:
            values: the external inputs, image ones [B, ...] and text ones [N, ...].
            image_index: int64 [N], which picture each sentence is about.
            frozen: stored results of ``StageModule.frozen`` by stage id.
        """
        known = dict(values)
        graph = self.graph()
        stored = frozen or {}
        for stage in self.stages():
            if stage.spec.id in stored:
                made = stage.module.trained(*stored[stage.spec.id])
            else:
                both = graph.dependency(stage.spec.id) is Dependency.BOTH
                made = stage.module(
                    *(
                        known[spec.name].index_select(0, image_index)
                        if both and graph.values[spec.name] is Dependency.IMAGE
                        else known[spec.name]
                        for spec in stage.spec.inputs
                    )
                )
            known.update(zip((spec.name for spec in stage.spec.outputs), made, strict=True))
        return Outputs(logits=known[LOGITS], existence=known.get(EXISTENCE))


Network = TypeVar("Network", bound=ReferringNetwork)


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One size of an architecture.

    Attributes:
        summary: one line for listings.
        build: makes the network with seeded or packaged weights; never downloads.
        longest: the most tokens for which the text encoder has positions, where ``build`` takes
            ``tokens``, another length of sentences than the usual one; None where it does not.
        published: whether a paper states this size, so that fidelity is judged.
        weights_licence: licence of the frozen weights, for listings and manifests.
        checkpoint: path of the trained weights that ship with the package, or None.
        figures: what is published about its size.
    """

    summary: str
    build: Callable[..., ReferringNetwork]
    published: bool
    weights_licence: str
    longest: int | None = None
    checkpoint: Path | None = None
    figures: tuple[Figure, ...] = ()

    def network(self, *, tokens: int | None = None) -> ReferringNetwork:
        """The network for sentences of so many tokens, or of as many as is usual.

        Results depend on that number wherever the network attends to its pads.

        Raises:
            RecipeError: it has another fixed number, or no positions for so many.
        """
        if tokens is None:
            return self.build()
        if self.longest is None:
            network = self.build()
            accepted = range(network.text.max_tokens, network.text.max_tokens + 1)
        else:
            accepted = range(SHORTEST, self.longest + 1)
        if tokens not in accepted:
            raise RecipeError(
                f"Sentences of {tokens} tokens were asked for; accepted are {accepted.start} to "
                f"{accepted.stop - 1}."
            )
        return network if self.longest is None else self.build(tokens=tokens)


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A trainable system with everything about it.

    Attributes:
        name: equals the file's name.
        title: the name its authors use.
        source: paper and, where there is one, code and commit.
        variants: by name; ``tiny`` is seconds on a CPU and the same code path.
        default: the variant used when none is named.
    """

    name: str
    title: str
    source: str
    variants: Mapping[str, Variant]
    default: str

    def variant(self, name: str | None) -> Variant:
        """The variant of that name, or the default one.

        Raises:
            RecipeError: there is no such variant.
        """
        chosen = self.default if name is None else name
        if chosen not in self.variants:
            raise RecipeError(
                f"{self.name} has no variant '{chosen}'; it has {', '.join(self.variants)}."
            )
        return self.variants[chosen]


def names() -> tuple[str, ...]:
    """The names of all architectures, sorted; imports none of them."""
    package = importlib.import_module("rt_ris_train.architectures")
    own = (info.name for info in pkgutil.iter_modules(package.__path__))
    third = (point.name for point in importlib.metadata.entry_points(group=ENTRY_POINTS))
    return tuple(sorted({*own, *third}))


def load(name: str) -> Architecture:
    """The architecture of that name.

    Raises:
        RecipeError: there is no such architecture.
    """
    if name not in names():
        raise RecipeError(f"There is no architecture '{name}'; there are {', '.join(names())}.")
    found = _module(name).ARCHITECTURE
    if not isinstance(found, Architecture):
        raise RecipeError(f"The module of '{name}' holds no Architecture named ARCHITECTURE.")
    return found


def _module(name: str) -> ModuleType:
    for point in importlib.metadata.entry_points(group=ENTRY_POINTS):
        if point.name == name:
            module = point.load()
            assert isinstance(module, ModuleType)
            return module
    return importlib.import_module(f"rt_ris_train.architectures.{name}")


def float32(name: str, *shape: int | str) -> TensorSpec:
    """A tensor between stages."""
    return TensorSpec(name=name, dtype="float32", shape=shape)


def seeded(build: Callable[[], Network]) -> Network:
    """A network in evaluation mode whose random weights depend on nothing but its size."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build().eval()


def device_of(network: nn.Module) -> torch.device:
    """The device of a network's first parameter."""
    return next(network.parameters()).device
