"""The plain data that training, export and runtime share.

Axis letters, used in every docstring of the project: B batch of images, N expressions, H W image
pixels, h w feature cells, P = h·w, L tokens, C feature channels, D text channels.

A model is a graph of *stages*. Stages are wired by tensor name: an input of a stage is either one
of the four external inputs below or an output of an earlier stage. What a stage depends on (the
image, the sentence, or both) is *derived* from that wiring, never declared, so it cannot be wrong.

External inputs:

    pixels      uint8 [1, S, S, 3]  RGB, fitted as ImageSpec says, zeros outside the valid area
    valid_box   int32 [1, 4]        top, left, bottom, right of the part that shows the picture
    token_ids   int32 [N, L]        token ids, padded on the right
    token_mask  bool  [N, L]        true where a token is real

External outputs:

    logits      float32 [N, h, w]   mask logits on the grid of MaskSpec
    existence   float32 [N]         logit that the sentence names something visible (optional)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Final, Literal

from rt_ris.errors import PlanError

PIXELS: Final = "pixels"
VALID_BOX: Final = "valid_box"
TOKEN_IDS: Final = "token_ids"
TOKEN_MASK: Final = "token_mask"
LOGITS: Final = "logits"
EXISTENCE: Final = "existence"

EXPRESSIONS: Final = "N"
"""The one symbolic axis: the number of sentences in a call."""

Role = Literal["image_encoder", "text_encoder", "fusion", "decoder"]
DType = Literal["float32", "float16", "uint8", "int32", "int64", "bool"]
_ITEM_BYTES: Final[dict[DType, int]] = {
    "float32": 4,
    "float16": 2,
    "uint8": 1,
    "int32": 4,
    "int64": 8,
    "bool": 1,
}
Fit = Literal["longest_side", "letterbox", "stretch", "warp"]
Resample = Literal["bilinear", "bicubic"]
Interpolate = Literal["logits", "probabilities"]
Upsample = Literal["bilinear", "bilinear_corners", "bicubic_corners"]
SentenceField = Literal["sent", "raw"]


class Dependency(Enum):
    """What a value is computed from; decides what the session caches and for how long."""

    IMAGE = "image"
    TEXT = "text"
    BOTH = "both"

    def join(self, other: Dependency) -> Dependency:
        """The dependency of a value that is computed from two others."""
        return self if self is other else Dependency.BOTH


_EXTERNAL: Final[Mapping[str, Dependency]] = {
    PIXELS: Dependency.IMAGE,
    VALID_BOX: Dependency.IMAGE,
    TOKEN_IDS: Dependency.TEXT,
    TOKEN_MASK: Dependency.TEXT,
}


@dataclass(frozen=True, kw_only=True)
class TensorSpec:
    """A named tensor; an axis is a size, or ``"N"`` for the number of expressions."""

    name: str
    dtype: DType
    shape: tuple[int | str, ...]

    def nbytes(self, *, expressions: int = 1) -> int:
        """Its size in bytes for that many sentences."""
        count = 1
        for axis in self.shape:
            count *= axis if isinstance(axis, int) else expressions
        return count * _ITEM_BYTES[self.dtype]

    def __str__(self) -> str:
        axes = ", ".join(str(axis) for axis in self.shape)
        return f"{self.name} {self.dtype} [{axes}]"


@dataclass(frozen=True, kw_only=True)
class StageSpec:
    """One piece of a network that becomes one graph.

    Attributes:
        id: free name, unique in the bundle; also the stem of the artefact's file name.
        role: what it does; several stages may share a role.
        inputs: in graph order; names of external inputs or of earlier stages' outputs.
        outputs: in graph order; names are unique over all stages.
    """

    id: str
    role: Role
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True, kw_only=True)
class ImageSpec:
    """How a picture becomes ``pixels``; everything that the graph does not do itself.

    Attributes:
        size: S, side of the square input in pixels.
        fit: ``longest_side`` scales the longer side to S and pads right and bottom;
            ``letterbox`` scales the same way and centres; ``stretch`` ignores the aspect ratio;
            ``warp`` scales and centres by an affine map with unrounded corners, as OpenCV's
            ``warpAffine`` does it, and its padding is part of the picture: ``valid_box`` is all of
            the input.
        resample: filter of Pillow's resize, with its anti-aliasing when shrinking; a ``warp`` is
            always ``bicubic``, OpenCV's, without anti-aliasing.
        fill: RGB in 0..255 of what a ``warp`` leaves uncovered; the other fits leave zeros.
        mean: per channel in 0..255, subtracted inside the graph.
        std: per channel in 0..255, divided by inside the graph.
    """

    size: int
    fit: Fit = "longest_side"
    resample: Resample = "bilinear"
    fill: tuple[int, int, int] = (0, 0, 0)
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class TextSpec:
    """How a sentence becomes ``token_ids`` and ``token_mask``.

    Attributes:
        max_tokens: the most tokens a sentence may have, special tokens included, as trained. A
            longer one is cut, keeps its end token, and a warning says where.
        padded_tokens: L of the graphs, only where masking makes padding exact; None means that
            the network attends to its pads, hence L is ``max_tokens``.
        pad_id: id written after the last real token.
        keep_end: whether a sentence that is cut keeps its end token, as CLIP's does; the authors
            of LAVT and DMMI cut it off with the rest.
        field: the text of a data set that the network was trained on: ``sent``, cleaned and in
            lower case, or ``raw``, as typed. Only evaluation on a data set reads it.
    """

    max_tokens: int
    padded_tokens: int | None = None
    pad_id: int = 0
    keep_end: bool = True
    field: SentenceField = "sent"

    @property
    def length(self) -> int:
        """L: number of token positions in the graphs."""
        return self.max_tokens if self.padded_tokens is None else self.padded_tokens


@dataclass(frozen=True, kw_only=True)
class MaskSpec:
    """How ``logits`` become a mask at the picture's own size.

    Attributes:
        size: h = w, side of the logit grid, which spans the whole S x S input.
        upsample: how the grid becomes S x S: ``bilinear`` aligns the borders of the corner cells,
            ``bilinear_corners`` and ``bicubic_corners`` their centres (``align_corners``).
        interpolate: whether logits or probabilities are resized to the picture's size.
        threshold: probability above which a pixel belongs to the mask.
        existence_threshold: probability of ``existence`` below which the mask is empty; None
            where the network has no such output.
    """

    size: int
    upsample: Upsample = "bilinear"
    interpolate: Interpolate = "logits"
    threshold: float = 0.5
    existence_threshold: float | None = None


@dataclass(frozen=True, kw_only=True)
class TargetSpec:
    """What an artefact was made for.

    Attributes:
        format: ``onnx``, a graph of standard operators and of ours, which any runtime and builder
            reads; ``onnxruntime``, a graph that holds operators of ONNX Runtime's own, which it
            alone reads; or ``engine``.
        precision: arithmetic of the weights and activations.
        device: ``any`` for a graph; for an engine the device it is bound to.
    """

    format: Literal["onnx", "onnxruntime", "engine"] = "onnx"
    precision: Literal["fp32", "fp16", "mixed"] = "fp32"
    device: str = "any"


@dataclass(frozen=True, kw_only=True)
class StageGraph:
    """Stages in an order in which they can run, and what each value depends on.

    Raises:
        PlanError: a name is used twice, an input that nothing makes, or no ``logits``.
    """

    stages: tuple[StageSpec, ...]
    values: Mapping[str, Dependency] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "values", _propagate(self.stages))

    def dependency(self, stage_id: str) -> Dependency:
        """What the stage's outputs depend on.

        Raises:
            PlanError: there is no such stage.
        """
        return self.values[self.stage(stage_id).outputs[0].name]

    def stage(self, stage_id: str) -> StageSpec:
        """The stage of that id.

        Raises:
            PlanError: there is no such stage.
        """
        for stage in self.stages:
            if stage.id == stage_id:
                return stage
        known = ", ".join(stage.id for stage in self.stages)
        raise PlanError(f"There is no stage '{stage_id}'; the stages are {known}.")

    def of(self, dependency: Dependency) -> tuple[StageSpec, ...]:
        """The stages of one dependency class, in running order."""
        return tuple(stage for stage in self.stages if self.dependency(stage.id) is dependency)

    def held(self, dependency: Dependency) -> tuple[TensorSpec, ...]:
        """What the stages that depend on both read of one class, external inputs included."""
        read = {spec.name: spec for stage in self.of(Dependency.BOTH) for spec in stage.inputs}
        return tuple(spec for spec in read.values() if self.values[spec.name] is dependency)


def _propagate(stages: Sequence[StageSpec]) -> dict[str, Dependency]:
    values: dict[str, Dependency] = dict(_EXTERNAL)
    seen: set[str] = set()
    for stage in stages:
        if stage.id in seen:
            raise PlanError(f"Two stages have the id '{stage.id}'; ids must be unique.")
        seen.add(stage.id)
        dependency = _joined(stage, values)
        for output in stage.outputs:
            if output.name in values:
                raise PlanError(f"Stage '{stage.id}' makes '{output.name}', which already exists.")
            values[output.name] = dependency
    if LOGITS not in values:
        raise PlanError(f"No stage makes '{LOGITS}', the output every network must have.")
    return values


def _joined(stage: StageSpec, values: Mapping[str, Dependency]) -> Dependency:
    missing = [spec.name for spec in stage.inputs if spec.name not in values]
    if missing or not stage.inputs or not stage.outputs:
        what = (
            f"needs {missing}, which no earlier stage makes"
            if missing
            else "lacks inputs or outputs"
        )
        raise PlanError(f"Stage '{stage.id}' {what}; known values are {sorted(values)}.")
    return _join(values[spec.name] for spec in stage.inputs)


def _join(dependencies: Iterable[Dependency]) -> Dependency:
    joined: Dependency | None = None
    for dependency in dependencies:
        joined = dependency if joined is None else joined.join(dependency)
    assert joined is not None
    return joined


def external_inputs(image: ImageSpec, text: TextSpec) -> tuple[TensorSpec, ...]:
    """The four tensors that enter a stage graph, in canonical order."""
    length = text.length
    return (
        TensorSpec(name=PIXELS, dtype="uint8", shape=(1, image.size, image.size, 3)),
        TensorSpec(name=VALID_BOX, dtype="int32", shape=(1, 4)),
        TensorSpec(name=TOKEN_IDS, dtype="int32", shape=(EXPRESSIONS, length)),
        TensorSpec(name=TOKEN_MASK, dtype="bool", shape=(EXPRESSIONS, length)),
    )
