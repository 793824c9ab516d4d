"""The compiled kernels that ship with the package, checked before a driver sees them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rt_ris.errors import IntegrityError, TargetMismatchError

NAME = "masked_mutual_attention"
BINARIES = Path(__file__).with_name("binaries")
INTERFACE = 1
"""Changes with the layout of ``Arguments`` or the meaning of a grid."""

CUDA = 13000
"""The driver's CUDA version that loads the fatbin: 1000 times the major one, 10 the minor."""
CUDA_12 = 12060
"""The one that loads the code for JetPack 6."""


@dataclass(frozen=True, kw_only=True)
class Binary:
    """The compiled kernels and their facts.

    Attributes:
        code: a fatbin: machine code for several architectures, and PTX; for drivers of CUDA 13.
        sha256: of everything here.
        architectures: compute capabilities, times ten, with machine code in it.
        for_cuda_12: machine code for drivers of CUDA 12.6 and later, by compute capability.
    """

    code: bytes
    sha256: str
    architectures: tuple[int, ...]
    for_cuda_12: Mapping[int, bytes]

    def code_for(self, *, capability: int, cuda: int) -> bytes:
        """What a driver is given for a GPU.

        Args:
            capability: compute capability, times ten.
            cuda: CUDA version of the driver, such as 12060.

        Raises:
            TargetMismatchError: the driver is too old for what there is.
        """
        if cuda >= CUDA:
            return self.code
        if cuda >= CUDA_12 and capability in self.for_cuda_12:
            return self.for_cuda_12[capability]
        listed = " or ".join(f"{sm // 10}.{sm % 10}" for sm in self.for_cuda_12)
        raise TargetMismatchError(
            f"The driver has CUDA {cuda // 1000}.{cuda % 1000 // 10}; the kernels need one of CUDA "
            f"{CUDA // 1000}, or on compute capability {listed} one of CUDA 12.6. Update the "
            "driver, or use the operator's standard-operator function.",
            expected=f"CUDA {CUDA // 1000}",
            found=f"CUDA {cuda // 1000}.{cuda % 1000 // 10}",
        )


def cuda_12_name(capability: int) -> str:
    """The file of the code for CUDA 12 and a compute capability."""
    return f"{NAME}.cuda12.sm_{capability}.cubin"


def load_binary(folder: Path = BINARIES) -> Binary:
    """Reads the kernels of a folder made by ``build.py``.

    Raises:
        IntegrityError: a file is missing or its bytes are not those recorded.
        TargetMismatchError: made for another version of this package.
    """
    facts_path = folder / f"{NAME}.json"
    try:
        facts = json.loads(facts_path.read_text())
        interface = facts["interface"]
        architectures = tuple(int(sm) for sm in facts["architectures"])
        older = {int(sm): str(made["sha256"]) for sm, made in facts["cuda_12"].items()}
        sha256 = {f"{NAME}.fatbin": str(facts["sha256"])}
        sha256 |= {cuda_12_name(sm): digest for sm, digest in older.items()}
        codes = {name: (folder / name).read_bytes() for name in sha256}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise IntegrityError(
            f"The kernels in {folder} cannot be read ({error}). Reinstall rt-ris, or build them: "
            "python -m rt_ris_kernels.build.",
            member=facts_path.name,
        ) from error
    if interface != INTERFACE:
        raise TargetMismatchError(
            f"{facts_path} has interface {interface}; this rt-ris launches interface {INTERFACE}. "
            "Build it anew: python -m rt_ris_kernels.build.",
            expected=str(INTERFACE),
            found=str(interface),
        )
    for name, code in codes.items():
        found = hashlib.sha256(code).hexdigest()
        if found != sha256[name]:
            raise IntegrityError(
                f"{folder / name} has other bytes than its record says. Reinstall rt-ris, or build "
                "it anew.",
                member=name,
                expected=sha256[name],
                found=found,
            )
    return Binary(
        code=codes[f"{NAME}.fatbin"],
        sha256=hashlib.sha256(" ".join(sha256.values()).encode()).hexdigest(),
        architectures=architectures,
        for_cuda_12={sm: codes[cuda_12_name(sm)] for sm in older},
    )
