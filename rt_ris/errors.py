"""Every exception rt-ris raises on purpose.

    RtRisError                    exit code
    ├── BundleError                   5      the bundle cannot be used as it is
    │   ├── ManifestError             5      the manifest is not valid
    │   └── IntegrityError            5      bytes differ from what was sealed
    ├── TargetMismatchError           3      made for another machine or version
    ├── MissingExtraError             4      an optional dependency is absent
    ├── BackendError                  6      an engine refused to open or run
    ├── PluginError                   6      a custom operator is not available
    ├── ShapeError                    2      a tensor differs from its declaration
    ├── ImageError                    2      the picture cannot be read
    ├── TextError                     2      the sentence cannot be used
    ├── DataError                     2      a data set cannot be read
    ├── CheckpointError               2      weights do not belong to the network
    ├── OutputError                   2      the place for results cannot be used
    ├── StorageError                  6      writing failed, such as on a full disk
    ├── RecipeError                   2      a recipe or an option is not valid
    ├── ParityError                   1      the exported masks are not the trained masks
    ├── PlanError                     2      the steps of an export do not fit together
    └── BuildError                    6      a compiler or builder failed

A message says what was given, what is accepted and what to do. The exit code belongs to the
class, so that the command line needs no table of its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar


class RtRisError(Exception):
    """Base of all errors that rt-ris raises on purpose; ``str(error)`` is one clear message."""

    exit_code: ClassVar[int] = 2


class BundleError(RtRisError):
    """A bundle is missing, incomplete or of a version that this runtime does not read."""

    exit_code = 5


class ManifestError(BundleError):
    """The manifest parses but breaks the format; ``field`` names the first offender."""

    def __init__(self, message: str, *, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class IntegrityError(BundleError):
    """A member of a bundle is missing, unlisted or has other bytes than were sealed."""

    def __init__(
        self, message: str, *, member: str = "", expected: str = "", found: str = ""
    ) -> None:
        super().__init__(message)
        self.member = member
        self.expected = expected
        self.found = found


class TargetMismatchError(RtRisError):
    """An artefact was made for another machine, device or library version."""

    exit_code = 3

    def __init__(self, message: str, *, expected: str = "", found: str = "") -> None:
        super().__init__(message)
        self.expected = expected
        self.found = found


class MissingExtraError(RtRisError):
    """An optional dependency is absent; ``extra`` names the extra that brings it."""

    exit_code = 4

    def __init__(self, message: str, *, extra: str, module: str = "") -> None:
        super().__init__(message)
        self.extra = extra
        self.module = module


class BackendError(RtRisError):
    """A backend could not open a stage or failed while running it."""

    exit_code = 6


class PluginError(RtRisError):
    """A custom operator that a graph needs is not available."""

    exit_code = 6


class ShapeError(RtRisError):
    """A tensor's dtype or shape differs from what the bundle declares."""


class ImageError(RtRisError):
    """A picture is missing, damaged, too large or of a kind that is not read."""


class TextError(RtRisError):
    """A sentence is empty or not text."""


class DataError(RtRisError):
    """A data set's files are missing, damaged or contradict each other."""


class CheckpointError(RtRisError):
    """A checkpoint's weights do not fit the network; ``keys`` holds the first differing names."""

    def __init__(self, message: str, *, keys: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.keys = keys


class OutputError(RtRisError):
    """The place where results should go exists already, is missing or is no folder."""


class StorageError(RtRisError):
    """Writing failed half-way, such as on a full disk; what was begun has been removed."""

    exit_code = 6

    def __init__(self, message: str, *, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class RecipeError(RtRisError):
    """A recipe has an unknown key, a wrong type or values that cannot go together."""


class ParityError(RtRisError):
    """The exported graphs do not reproduce the network.

    ``stage`` is the first one that differs, ``cause`` the one to which that is put down: an earlier
    one where the stage itself is right and what it was fed is not. ``measured`` is what the gate
    found until then, as plain data.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        stage: str = "",
        cause: str = "",
        error: float = float("nan"),
        measured: Mapping[str, object] = MappingProxyType({}),
    ) -> None:
        super().__init__(message)
        self.stage = stage
        self.cause = cause or stage
        self.error = error
        self.measured = measured


class PlanError(RtRisError):
    """The steps of an export do not form a plan: an artefact is needed that no step makes."""


class BuildError(RtRisError):
    """A compiler or an engine builder failed, or ran out of memory."""

    exit_code = 6
