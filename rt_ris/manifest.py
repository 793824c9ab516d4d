"""The manifest of a bundle: what it holds, how pictures and sentences are prepared, who made it.

``docs/bundle.md`` is the normative page, ``rt_ris/manifest.schema.json`` the JSON Schema. Reading
is strict: nothing unknown, nothing missing, nothing of another type, and the stages must wire up.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final

from rt_ris.errors import ManifestError, PlanError
from rt_ris.records import from_data, parse_json, to_json
from rt_ris.spec import (
    EXISTENCE,
    EXPRESSIONS,
    LOGITS,
    Dependency,
    ImageSpec,
    MaskSpec,
    StageGraph,
    StageSpec,
    TargetSpec,
    TensorSpec,
    TextSpec,
    external_inputs,
)

SCHEMA_VERSION: Final = 1
MANIFEST: Final = "manifest.json"
MANIFEST_HASH: Final = "manifest.sha256"
TOKENIZER: Final = "tokenizer.json"
PARITY: Final = "parity.json"
GOLDEN: Final = "golden.npz"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class Member:
    """The seal of one file.

    Attributes:
        sha256: of all its bytes, 64 lower-case hexadecimal digits.
        bytes: its size.
    """

    sha256: str
    bytes: int


@dataclass(frozen=True, kw_only=True)
class StageArtefact:
    """One stage and the file that computes it.

    Attributes:
        spec: its tensors.
        file: name of the member.
        target: what the file was made for.
        multiply_adds: of one run on one sentence (image stages: on one picture).
        parameters: number of stored weights.
        half_weights: share of them in half precision, 0..1; ``half_multiply_adds`` likewise.
        operators: ``domain::name`` of each operator of ours -> the channels of its nodes,
            ascending; None where the exporter did not say.
    """

    spec: StageSpec
    file: str
    target: TargetSpec
    multiply_adds: int
    parameters: int
    half_weights: float = 0.0
    half_multiply_adds: float = 0.0
    operators: Mapping[str, tuple[int, ...]] | None = None


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where the bundle comes from.

    Attributes:
        rt_ris: version of rt-ris that wrote it.
        created: UTC time, ISO 8601, such as ``2026-11-21T04:30:00Z``.
        checkpoint_sha256: of the checkpoint file's bytes; None where the weights are seeded random
            ones and there is no file.
        source: paper, code and commit of the architecture.
        licences: what -> licence, such as ``{"weights": "Apache-2.0"}``.
        opset: version of the standard ONNX operators.
        libraries: name -> version of what took part in the export.
    """

    rt_ris: str
    created: str
    checkpoint_sha256: str | None
    source: str
    licences: Mapping[str, str]
    opset: int
    libraries: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class ParitySummary:
    """The gate the bundle passed, and by how much; ``parity.json`` has it per stage.

    The relative error of a tensor is ``||a - b||_2 / ||b||_2``, b being PyTorch.

    Attributes:
        relative_error_limit: the gate on every stage output.
        mask_iou_limit: the gate on every mask, 0..1.
        relative_error, mask_iou: of the worst stage output and of the worst mask.
        flips: pixels over all masks on the other side of the threshold.
        cases: number of pairs of picture and sentence.
    """

    relative_error_limit: float
    mask_iou_limit: float
    relative_error: float
    mask_iou: float
    flips: int
    cases: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """Everything a runtime needs to know; without ``members`` it is a draft, not yet sealed.

    Attributes:
        architecture, variant: for humans; no code depends on them.
        stages: in running order.
        tokenizer: name of the member that holds the ``tokenizers`` document.
        members: every file of the bundle but the manifest and its hash; filled in by
            ``write_bundle``.

    Raises:
        ManifestError: the parts contradict each other; ``field`` names the first offender.
    """

    schema_version: int = SCHEMA_VERSION
    architecture: str
    variant: str
    stages: tuple[StageArtefact, ...]
    image: ImageSpec
    text: TextSpec
    mask: MaskSpec
    tokenizer: str = TOKENIZER
    provenance: Provenance
    parity: ParitySummary
    members: Mapping[str, Member] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for path, fault in _faults(self):
            raise ManifestError(f"Field '{path}' {fault}.", field=path)

    def graph(self) -> StageGraph:
        """The wiring of the stages."""
        return StageGraph(stages=tuple(stage.spec for stage in self.stages))

    def stage(self, stage_id: str) -> StageArtefact:
        """The stage of that id.

        Raises:
            PlanError: there is no such stage.
        """
        spec = self.graph().stage(stage_id)
        return next(stage for stage in self.stages if stage.spec is spec)

    def needed(self) -> tuple[str, ...]:
        """Names of the members that a predictor opens."""
        graphs = (self.graph_files(stage) for stage in self.stages)
        return (self.tokenizer, *(name for files in graphs for name in files))

    def graph_files(self, stage: StageArtefact) -> tuple[str, ...]:
        """A stage's graph, and the member with its weights where one file cannot hold both."""
        data = f"{stage.file}.data"
        return (stage.file, data) if data in self.members else (stage.file,)

    def graph_sha256(self, stage: StageArtefact) -> str:
        """Of a stage's graph; of the SHA-256 of graph and weights where those are two files."""
        first, *others = (self.members[name].sha256 for name in self.graph_files(stage))
        return hashlib.sha256("".join([first, *others]).encode()).hexdigest() if others else first

    def to_json(self) -> bytes:
        """The document as it is written to ``manifest.json``."""
        return to_json(self)


def parse_manifest(raw: bytes) -> Manifest:
    """Read a sealed manifest.

    Raises:
        ManifestError: the bytes are not a valid manifest of a version that is read here.
    """
    data = parse_json(raw)
    version = data.get("schema_version") if isinstance(data, dict) else None
    if version != SCHEMA_VERSION or isinstance(version, bool):
        raise ManifestError(
            f"The manifest has schema version {version!r}; this rt-ris reads {SCHEMA_VERSION}. "
            "Use the rt-ris that wrote the bundle, or export it again.",
            field="schema_version",
        )
    if isinstance(data, dict) and not data.get("members"):
        raise ManifestError("Field 'members' is missing or empty.", field="members")
    return from_data(Manifest, data)


def check_member_name(name: str) -> None:
    """Refuse everything that is not a plain file name.

    Raises:
        ManifestError: a separator, a leading dot, a reserved name or an unusual character.
    """
    if not _NAME.fullmatch(name) or name in (MANIFEST, MANIFEST_HASH):
        raise ManifestError(
            f"Member name {name!r} is refused; accepted are plain file names of letters, digits, "
            "dot, dash and underscore, in no folder.",
            field=f"members.{name}",
        )


Faults = Iterator[tuple[str, str]]
"""Pairs of a field's path and what is wrong with it."""


def _faults(manifest: Manifest) -> Faults:
    if manifest.schema_version != SCHEMA_VERSION:
        yield "schema_version", f"is {manifest.schema_version}; accepted is {SCHEMA_VERSION}"
    yield from _spec_faults(manifest)
    yield from _record_faults(manifest)
    yield from _stage_faults(manifest)
    yield from _wiring_faults(manifest)
    yield from _member_faults(manifest)


def _spec_faults(manifest: Manifest) -> Faults:
    image, text, mask = manifest.image, manifest.text, manifest.mask
    for path, size in (
        ("image.size", image.size),
        ("text.max_tokens", text.max_tokens),
        ("text.padded_tokens", text.length),
        ("mask.size", mask.size),
    ):
        if not 1 <= size <= 65536:
            yield path, f"is {size}; accepted is 1 to 65536"
    if text.length < text.max_tokens:
        yield "text.padded_tokens", f"is {text.length}, less than max_tokens {text.max_tokens}"
    if text.pad_id < 0:
        yield "text.pad_id", f"is {text.pad_id}; accepted is 0 or more"
    for path, value in (
        ("mask.threshold", mask.threshold),
        ("mask.existence_threshold", mask.existence_threshold),
    ):
        if value is not None and not 0 < value < 1:
            yield path, f"is {value}; accepted is a probability strictly between 0 and 1"
    if not all(0 <= value <= 255 for value in image.fill):
        yield "image.fill", f"is {list(image.fill)}; accepted is three whole numbers, 0 to 255"
    if image.fit == "warp" and image.resample != "bicubic":
        yield "image.resample", f"is {image.resample!r}; a warp is always 'bicubic'"
    if image.fit != "warp" and any(image.fill):
        yield "image.fill", f"is {list(image.fill)}; only a warp fills with anything but zeros"
    if min(image.std) <= 0:
        yield "image.std", f"is {list(image.std)}; accepted is three positive numbers"


def _record_faults(manifest: Manifest) -> Faults:
    parity, provenance = manifest.parity, manifest.provenance
    for name in ("relative_error_limit", "relative_error", "flips", "cases"):
        if getattr(parity, name) < 0:
            yield f"parity.{name}", f"is {getattr(parity, name)}; accepted is 0 or more"
    for name in ("mask_iou_limit", "mask_iou"):
        if not 0 <= getattr(parity, name) <= 1:
            yield f"parity.{name}", f"is {getattr(parity, name)}; accepted is 0 to 1"
    checkpoint = provenance.checkpoint_sha256
    if checkpoint is not None and not _SHA256.fullmatch(checkpoint):
        path = "provenance.checkpoint_sha256"
        yield path, "is not 64 lower-case hexadecimal digits, nor null for seeded random weights"
    if provenance.opset < 1:
        yield "provenance.opset", f"is {provenance.opset}; accepted is 1 or more"


def _stage_faults(manifest: Manifest) -> Faults:
    if not manifest.stages:
        yield "stages", "is empty; accepted is at least one stage"
    for index, stage in enumerate(manifest.stages):
        path = f"stages[{index}]"
        if not _ID.fullmatch(stage.spec.id):
            yield f"{path}.spec.id", f"is {stage.spec.id!r}; accepted are letters, digits, _ and -"
        if stage.multiply_adds < 0 or stage.parameters < 0:
            yield path, "has a negative count of multiply-adds or parameters"
        if not (0 <= stage.half_weights <= 1 and 0 <= stage.half_multiply_adds <= 1):
            yield f"{path}.half_weights", "or half_multiply_adds is no share; accepted is 0 to 1"
        if any(size < 1 for sizes in (stage.operators or {}).values() for size in sizes):
            yield f"{path}.operators", "has a number of channels below 1"
        for side in ("inputs", "outputs"):
            for number, spec in enumerate(getattr(stage.spec, side)):
                if not _shape_ok(spec):
                    where = f"{path}.spec.{side}[{number}].shape"
                    yield where, f"is {list(spec.shape)}; accepted are positive sizes and 'N' first"


def _shape_ok(spec: TensorSpec) -> bool:
    """True for positive sizes, of which only the first may be the symbolic axis."""
    rest = all(isinstance(axis, int) and axis > 0 for axis in spec.shape[1:])
    first = spec.shape[:1]
    return rest and all(
        axis == EXPRESSIONS if isinstance(axis, str) else axis > 0 for axis in first
    )


def _wiring_faults(manifest: Manifest) -> Faults:
    try:
        graph = manifest.graph()
    except PlanError as error:
        yield "stages", f"does not wire up: {error}".rstrip(".")
        return
    known = {spec.name: spec for spec in external_inputs(manifest.image, manifest.text)}
    for index, stage in enumerate(graph.stages):
        for number, spec in enumerate(stage.inputs):
            if known[spec.name] != spec:
                where = f"stages[{index}].spec.inputs[{number}]"
                yield where, f"is {spec}, but what it reads is {known[spec.name]}"
        first = 1 if graph.dependency(stage.id) is Dependency.IMAGE else EXPRESSIONS
        for number, spec in enumerate(stage.outputs):
            if spec.shape[:1] != (first,):
                where = f"stages[{index}].spec.outputs[{number}].shape"
                yield where, f"is {list(spec.shape)}; the first axis must be {first} here"
            known[spec.name] = spec
    yield from _output_faults(manifest.mask, known)


def _output_faults(mask: MaskSpec, known: Mapping[str, TensorSpec]) -> Faults:
    logits = TensorSpec(name=LOGITS, dtype="float32", shape=(EXPRESSIONS, mask.size, mask.size))
    if known[LOGITS] != logits:
        yield "stages", f"makes {known[LOGITS]}; accepted is {logits}"
    existence = TensorSpec(name=EXISTENCE, dtype="float32", shape=(EXPRESSIONS,))
    if known.get(EXISTENCE, existence) != existence:
        yield "stages", f"makes {known[EXISTENCE]}; accepted is {existence}"
    if (mask.existence_threshold is not None) != (EXISTENCE in known):
        path = "mask.existence_threshold"
        yield path, f"must be given if and only if a stage makes '{EXISTENCE}'"


def _member_faults(manifest: Manifest) -> Faults:
    for name, member in manifest.members.items():
        check_member_name(name)
        if not _SHA256.fullmatch(member.sha256):
            yield f"members.{name}.sha256", "is not 64 lower-case hexadecimal digits"
        if member.bytes < 0:
            yield f"members.{name}.bytes", f"is {member.bytes}; accepted is 0 or more"
    for name in manifest.needed() if manifest.members else ():
        if name not in manifest.members:
            yield "members", f"lacks '{name}', which the manifest needs"
