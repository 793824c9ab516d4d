"""Graphs in the precision that was asked for, and the ladder of remedies for one that misses."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from rt_ris.errors import PlanError
from rt_ris.spec import StageSpec
from rt_ris_export import onnx_graph
from rt_ris_export.artefacts import GRAPHS, NETWORK
from rt_ris_export.half import KEPT, WIDE, HalfShare, half_share, half_spec, to_half
from rt_ris_export.recipe import Target
from rt_ris_export.step import Context, Kind, Step
from rt_ris_export.tiled import tiled
from rt_ris_export.widened import widened
from rt_ris_export.workspace import Workspace

Policy = Literal["full", "tiled", "half", "wide", "full inside", "full and given so"]
LADDER: Final[Mapping[Policy, Policy]] = {
    "half": "wide",
    "wide": "full inside",
    "full inside": "full and given so",
}
"""What is tried next where a stage misses: norms and softmaxes in float32, then all of it, then
what it gives to later stages, too."""

INNER: Final[Mapping[Policy, frozenset[str] | None]] = {
    "half": frozenset(),
    "wide": WIDE,
    "full inside": None,
    "full and given so": None,
}
"""Operators that a policy computes in float32; None for all."""

_IN_FULL: Final[Mapping[Target, Policy]] = {"onnx": "full", "onnxruntime": "tiled"}
"""What float32 graphs are, by target."""

LEAST_HALF: Final = 0.9
"""The share of weights and of multiply-adds below which a graph is not called fp16."""


@dataclass(kw_only=True)
class TypedGraphs:
    """The graphs of all stages in their precision.

    Attributes:
        plain: files of the float32 graphs by stage id, as traced; each is read when it is needed,
            as all together may exceed the memory.
        traced: their declarations.
        specs: of the stages as they are in ``files``.
        files: the graphs that will ship.
        shares: how much of each is in half precision.
        formats: who reads each.
        operators: operators of ours in each and their channels.
        kept: tensors between stages that stay float32.
        policies: what was applied to each.
        steps: what a ladder has done so far, for the record.
    """

    workspace: Workspace
    plain: Mapping[str, Path]
    traced: Mapping[str, StageSpec]
    specs: dict[str, StageSpec] = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    shares: dict[str, HalfShare] = field(default_factory=dict)
    formats: dict[str, Literal["onnx", "onnxruntime"]] = field(default_factory=dict)
    operators: dict[str, Mapping[str, tuple[int, ...]]] = field(default_factory=dict)
    kept: set[str] = field(default_factory=lambda: set(KEPT))
    policies: dict[str, Policy] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)

    def apply(self, stage: str, policy: Policy) -> None:
        """Write a stage's graph by a policy."""
        self.policies[stage] = policy
        model = onnx_graph.load(self.plain[stage])
        self.specs[stage] = self.traced[stage]
        if policy == "tiled":
            model = tiled(model)
        elif policy != "full":
            self.specs[stage] = half_spec(self.traced[stage], kept=self.kept)
            model = to_half(model, also_full=INNER[policy], kept=self.kept)
        if policy != "full":
            onnx_graph.check(model)
            onnx_graph.check_interface(model, self.specs[stage])
        self.shares[stage] = half_share(model)
        self.files[stage] = self.workspace.write_graph(stage, model)
        self.formats[stage] = "onnxruntime" if onnx_graph.attentions(model) else "onnx"
        self.operators[stage] = onnx_graph.operator_channels(model)

    def widened(self) -> dict[str, Path]:
        """Write the graphs as they are in exact arithmetic: float32 files by stage id.

        Raises:
            ParityError: what a graph stores is not what was traced, rounded.
        """
        folder = self.workspace.folder / "widened"
        folder.mkdir(exist_ok=True)
        return {
            stage: Workspace(folder).write_graph(
                stage, widened(onnx_graph.load(file), onnx_graph.load(self.plain[stage]))
            )
            for stage, file in self.files.items()
        }

    def climb(self, stage: str) -> bool:
        """Take a step of the ladder, for a stage or, where it is at the end, for one before it.

        Returns:
            False where it and all before it are at the end.
        """
        found = self._unsettled(stage)
        if found is None:
            return False
        stage = found
        before = self.policies[stage]
        now = LADDER[before]
        if now == "full and given so":
            given = {tensor.name for tensor in self.traced[stage].outputs}
            self.kept |= given
            for reader, spec in self.traced.items():
                if given.intersection(tensor.name for tensor in spec.inputs):
                    self.apply(reader, self.policies[reader])
        self.apply(stage, now)
        self.steps.append(f"{stage}: {before} -> {now}")
        return True

    def _unsettled(self, stage: str) -> str | None:
        """The stage, or the nearest of those that feed it, that is not at the end of the ladder."""
        settled, near = self.settled(), [stage]
        for name in near:
            if name not in settled:
                return name
            read = {tensor.name for tensor in self.traced[name].inputs}
            near += [
                other
                for other, spec in self.traced.items()
                if other not in near and read.intersection(it.name for it in spec.outputs)
            ]
        return None

    def settled(self) -> frozenset[str]:
        """Ids of the stages at the end of the ladder."""
        last = {
            name
            for name, spec in self.traced.items()
            if self.kept.issuperset(tensor.name for tensor in spec.outputs)
        }
        return frozenset(
            name
            for name, policy in self.policies.items()
            if policy not in LADDER or (policy == "full inside" and name in last)
        )

    def precision(self, stage: str) -> Literal["fp32", "fp16", "mixed"]:
        """What a stage may be called."""
        if self.policies[stage] in ("full", "tiled"):
            return "fp32"
        share = self.shares[stage]
        half = min(share.weights, share.multiply_adds) >= LEAST_HALF
        return "fp16" if half and self.policies[stage] == "half" else "mixed"

    def written(self, stage: str) -> tuple[Path, ...]:
        """A stage's graph, and its weights where they are in a second file."""
        graph = self.files[stage]
        data = graph.with_name(graph.name + onnx_graph.DATA)
        return (graph, data) if data.exists() else (graph,)

    def sha256(self) -> dict[str, str]:
        """SHA-256 of every file, by name."""
        paths = (path for stage in self.files for path in self.written(stage))
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    def share(self) -> HalfShare:
        """Of all stages together."""
        return sum(self.shares.values(), HalfShare())


TYPED: Final = Kind[TypedGraphs]("typed graphs")
"""The graphs in their precision, with their declarations."""


def check_share(share: HalfShare) -> None:
    """Refuse to call fp16 what is so by less than nine tenths.

    Raises:
        PlanError: naming the nodes.
    """
    if min(share.weights, share.multiply_adds) >= LEAST_HALF:
        return
    nodes = ", ".join(node for _, node in share.full[:5])
    raise PlanError(
        f"Only {share.weights:.1%} of the weights and {share.multiply_adds:.1%} of the "
        f"multiply-adds would be in half precision; fp16 means at least {LEAST_HALF:.0%} of both. "
        f"In float32 are: {nodes or 'weights of no product'}. Ask for --precision fp32."
    )


def _run(context: Context) -> None:
    graphs = context.artefacts.get(GRAPHS)
    half = context.recipe.precision == "fp16"
    policy: Policy = "half" if half else _IN_FULL[context.recipe.target]
    specs = {stage.spec.id: stage.spec for stage in context.artefacts.get(NETWORK).network.stages()}
    folder = context.workspace.folder / "typed"
    folder.mkdir()
    typed = TypedGraphs(
        workspace=Workspace(folder),
        plain=graphs,
        traced=specs,
    )
    for name in graphs:
        context.say(f"typing {name} in {context.recipe.precision}")
        typed.apply(name, policy)
    if half:
        share = typed.share()
        check_share(share)
        context.say(
            f"{share.weights:.1%} of the weights and {share.multiply_adds:.1%} of the "
            "multiply-adds are in half precision"
        )
    context.artefacts.put(TYPED, typed)


PRECISION = Step(name="precision", needs=(NETWORK, GRAPHS), makes=(TYPED,), run=_run)
