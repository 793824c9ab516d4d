"""The steps of an export, and their table."""

from __future__ import annotations

from typing import Final

from rt_ris_export.step import Step
from rt_ris_export.steps.function import FUNCTION
from rt_ris_export.steps.load import LOAD
from rt_ris_export.steps.pack import PACK
from rt_ris_export.steps.parity import PARITY_GATE
from rt_ris_export.steps.precision import PRECISION
from rt_ris_export.steps.replay import REPLAY
from rt_ris_export.steps.trace import TRACE

STEPS: Final[tuple[Step, ...]] = (LOAD, TRACE, FUNCTION, PRECISION, PARITY_GATE, PACK, REPLAY)
