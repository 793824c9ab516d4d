"""The compiled kernels that ship with the package, checked before a driver sees them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from rt_ris.errors import IntegrityError, TargetMismatchError

NAME = "masked_mutual_attention"
BINARIES = Path(__file__).with_name("binaries")
INTERFACE = 1
"""Changes with the layout of ``Arguments`` or the meaning of a grid."""


@dataclass(frozen=True, kw_only=True)
class Binary:
    """A fatbin and its facts.

    Attributes:
        code: machine code for several architectures, and PTX.
        sha256: of ``code``.
        architectures: compute capabilities, times ten, with machine code.
    """

    code: bytes
    sha256: str
    architectures: tuple[int, ...]


def load_binary(folder: Path = BINARIES) -> Binary:
    """Reads the kernels of a folder made by ``build.py``.

    Raises:
        IntegrityError: a file is missing or its bytes are not those recorded.
        TargetMismatchError: made for another version of this package.
    """
    path, facts_path = folder / f"{NAME}.fatbin", folder / f"{NAME}.json"
    try:
        code, facts = path.read_bytes(), json.loads(facts_path.read_text())
        interface, sha256 = facts["interface"], facts["sha256"]
        architectures = tuple(int(sm) for sm in facts["architectures"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise IntegrityError(
            f"The kernels in {folder} cannot be read ({error}). Reinstall rt-ris, or build them: "
            "python -m rt_ris_kernels.build.",
            member=path.name,
        ) from error
    if interface != INTERFACE:
        raise TargetMismatchError(
            f"{path} has interface {interface}; this rt-ris launches interface {INTERFACE}. Build "
            "it anew: python -m rt_ris_kernels.build.",
            expected=str(INTERFACE),
            found=str(interface),
        )
    found = hashlib.sha256(code).hexdigest()
    if found != sha256:
        raise IntegrityError(
            f"{path} has other bytes than its record says. Reinstall rt-ris, or build it anew.",
            member=path.name,
            expected=sha256,
            found=found,
        )
    return Binary(code=code, sha256=sha256, architectures=architectures)
