"""Steps, and how they become a plan.

A step declares the kinds of artefacts it needs and makes. A step that both needs and makes a kind
changes it: it runs after the step that only makes it and before those that only need it. So a new
step joins the table without an edit to any other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from rt_ris.errors import PlanError
from rt_ris_export.recipe import ExportRecipe
from rt_ris_export.workspace import Workspace

T = TypeVar("T")


@dataclass(frozen=True)
class Kind(Generic[T]):
    """A kind of artefact; the type parameter is what such an artefact is in Python."""

    name: str


class Artefacts:
    """What the steps have made so far, at most one artefact of each kind."""

    def __init__(self) -> None:
        self._values: dict[str, object] = {}

    def put(self, kind: Kind[T], value: T) -> None:
        """Store an artefact, in place of an earlier one of its kind."""
        self._values[kind.name] = value

    def get(self, kind: Kind[T]) -> T:
        """The artefact of a kind.

        Raises:
            PlanError: a step asks for what it did not declare to need.
        """
        if kind.name not in self._values:
            raise PlanError(f"No '{kind.name}' was made yet; a step must declare what it needs.")
        return self._values[kind.name]  # type: ignore[return-value] # put() pairs kind and value


@dataclass(frozen=True, kw_only=True)
class Progress:
    """A line of news.

    Attributes:
        step: name of the step that runs.
        index: its place in the plan, from 1.
        count: how many steps the plan has.
        message: what it does now.
    """

    step: str
    index: int
    count: int
    message: str


@dataclass(frozen=True, kw_only=True)
class Context:
    """What a step works with.

    Attributes:
        recipe: what was asked for.
        output: where the bundle goes.
        workspace: where files of this export live.
        artefacts: what earlier steps made.
        say: takes a message about what happens now.
    """

    recipe: ExportRecipe
    output: Path
    workspace: Workspace
    artefacts: Artefacts
    say: Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Step:
    """One action of the export.

    Attributes:
        name: a word for messages.
        needs: kinds that must have been made before.
        makes: kinds that ``run`` puts into the context's artefacts.
        run: does it.
    """

    name: str
    needs: tuple[Kind[Any], ...] = ()
    makes: tuple[Kind[Any], ...] = ()
    run: Callable[[Context], None]


def plan(steps: Sequence[Step], *, goal: Kind[Any]) -> tuple[Step, ...]:
    """Order steps so that each finds what it needs; steps that are free to move keep their order.

    Args:
        steps: the table.
        goal: the kind that must come out.

    Raises:
        PlanError: a kind that nothing makes or that two steps make, or steps that wait for each
            other.
    """
    makers = _makers(steps)
    for wanted, by in [(goal, "the export"), *((k, s.name) for s in steps for k in s.needs)]:
        if wanted not in makers:
            raise PlanError(f"'{by}' needs '{wanted.name}', which no step makes.")
    waiting, ordered = list(steps), list[Step]()
    while waiting:
        ready = [step for step in waiting if not _before(step, makers) & set(_names(waiting))]
        if not ready:
            raise PlanError(f"These steps wait for each other: {', '.join(_names(waiting))}.")
        ordered.append(ready[0])
        waiting.remove(ready[0])
    return tuple(ordered)


def run(steps: Sequence[Step], context: Context, *, progress: Callable[[Progress], None]) -> None:
    """Run steps in order; what they say goes to ``progress``."""
    for index, step in enumerate(steps, 1):

        def say(message: str, step: Step = step, index: int = index) -> None:
            progress(Progress(step=step.name, index=index, count=len(steps), message=message))

        step.run(replace(context, say=say))


@dataclass(frozen=True)
class _Makers:
    """Who makes a kind first, and who changes it afterwards, in the table's order."""

    first: str
    changers: tuple[str, ...]


def _makers(steps: Sequence[Step]) -> dict[Kind[Any], _Makers]:
    makers: dict[Kind[Any], _Makers] = {}
    for kind in dict.fromkeys(kind for step in steps for kind in step.makes):
        involved = [step for step in steps if kind in step.makes]
        first = [step.name for step in involved if kind not in step.needs]
        if len(first) != 1:
            who = " and ".join(first) if first else "no step"
            raise PlanError(f"'{kind.name}' must be made by exactly one step; {who} makes it.")
        changers = tuple(step.name for step in involved if kind in step.needs)
        makers[kind] = _Makers(first[0], changers)
    return makers


def _before(step: Step, makers: dict[Kind[Any], _Makers]) -> set[str]:
    """Names of the steps that must run before this one."""
    names: set[str] = set()
    for kind in step.needs:
        changers = makers[kind].changers
        own = changers.index(step.name) if step.name in changers else len(changers)
        names |= {makers[kind].first, *changers[:own]}
    return names


def _names(steps: Sequence[Step]) -> list[str]:
    return [step.name for step in steps]
