"""The page on engines: its commands parse, its tables are the code's."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from rt_ris.build.engines import RTX_SMS
from rt_ris.build.request import BUCKETS
from rt_ris.cli import _parser

PAGE = (Path(__file__).parent.parent / "docs" / "engines.md").read_text("utf-8")
COMMANDS = [line for line in PAGE.splitlines() if line.startswith("rt-ris ")]
COMMANDS += re.findall(r"`(rt-ris (?:verify|doctor) BUNDLE[^`]*)`", PAGE)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_are_ones_that_exist(command: str) -> None:
    words = shlex.split(command)[1:]
    _parser(words).parse_args(words)


def test_capabilities_and_profiles_are_those_of_the_code() -> None:
    assert len(COMMANDS) == 5
    assert ", ".join(f"{sm // 10}.{sm % 10}" for sm in RTX_SMS) in PAGE
    assert BUCKETS == ((1, 1, 1), (2, 4, 4), (5, 16, 16))
    assert "1 to 16 sentences at once, in three profiles: 1, 2 to 4, 5 to 16" in PAGE
