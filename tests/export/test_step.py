from __future__ import annotations

from itertools import permutations
from pathlib import Path

import pytest

from rt_ris.errors import PlanError
from rt_ris_export.artefacts import BUNDLE
from rt_ris_export.recipe import ExportRecipe
from rt_ris_export.step import Artefacts, Context, Kind, Progress, Step, plan, run
from rt_ris_export.steps import STEPS
from rt_ris_export.workspace import Workspace

A, B, C = (Kind[int](name) for name in "abc")


def _step(name: str, needs: tuple[Kind[int], ...] = (), makes: tuple[Kind[int], ...] = ()) -> Step:
    return Step(name=name, needs=needs, makes=makes, run=lambda context: context.say(f"did {name}"))


def _names(steps: tuple[Step, ...]) -> list[str]:
    return [step.name for step in steps]


def test_a_changer_runs_between_maker_and_reader_wherever_it_stands() -> None:
    make, change, read = (
        _step("make", (), (A,)),
        _step("change", (A,), (A,)),
        _step("read", (A,), (B,)),
    )
    for order in permutations([make, change, read]):
        assert _names(plan(order, goal=B)) == ["make", "change", "read"]


def test_changers_keep_the_order_of_the_table() -> None:
    steps = [_step("read", (A,), (B,)), _step("second", (A,), (A,)), _step("third", (A,), (A,))]
    assert _names(plan([*steps, _step("first", (), (A,))], goal=B)) == [
        "first",
        "second",
        "third",
        "read",
    ]


def test_the_table_of_steps_is_a_plan() -> None:
    ordered = ["load", "trace", "function", "precision", "parity", "pack", "replay"]
    assert _names(plan(STEPS, goal=BUNDLE)) == ordered
    assert _names(plan(STEPS[::-1], goal=BUNDLE)) == ordered


@pytest.mark.parametrize(
    ("steps", "sentence"),
    [
        ([_step("x", (A,), (B,))], "'x' needs 'a', which no step makes"),
        ([_step("x", (), (A,))], "'the export' needs 'b', which no step makes"),
        ([_step("x", (), (B,)), _step("y", (), (B,))], "exactly one step; x and y makes it"),
        ([_step("x", (B,), (B,))], "exactly one step; no step makes it"),
        (
            [_step("x", (A,), (B,)), _step("y", (B,), (A,))],
            "These steps wait for each other: x, y",
        ),
    ],
)
def test_impossible_plans_are_refused(steps: list[Step], sentence: str) -> None:
    with pytest.raises(PlanError, match=sentence):
        plan(steps, goal=B)


def test_run_reports_where_it_is(tmp_path: Path) -> None:
    news: list[Progress] = []
    context = Context(
        recipe=ExportRecipe(arch="x"),
        output=tmp_path / "out",
        workspace=Workspace(tmp_path),
        artefacts=Artefacts(),
        say=lambda _: None,
    )
    run([_step("x"), _step("y")], context, progress=news.append)
    assert [(n.index, n.count, n.step, n.message) for n in news] == [
        (1, 2, "x", "did x"),
        (2, 2, "y", "did y"),
    ]


def test_an_undeclared_need_is_refused() -> None:
    with pytest.raises(PlanError, match="No 'c' was made yet"):
        Artefacts().get(C)
