from __future__ import annotations

import re

import pytest

import rt_ris.errors
from rt_ris.errors import RtRisError

CLASSES = {
    name: kind
    for name, kind in vars(rt_ris.errors).items()
    if isinstance(kind, type) and issubclass(kind, RtRisError)
}
ROW = re.compile(r"([A-Z]\w+Error) +(?:exit code|(\d+) )")
TABLE = dict(ROW.findall(rt_ris.errors.__doc__ or ""))


@pytest.mark.parametrize("name", CLASSES)
def test_the_tree_in_the_docstring_is_the_truth(name: str) -> None:
    assert name in TABLE
    assert TABLE[name] in ("", str(CLASSES[name].exit_code))
    assert CLASSES[name].__doc__


def test_the_tree_has_no_more() -> None:
    assert set(TABLE) == set(CLASSES)
