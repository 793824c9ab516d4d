"""Referring image segmentation on the edge: the lean runtime.

    from rt_ris import Predictor

    with Predictor.load("maris-lite.bundle") as predictor:
        predictor.set_image("table.jpg")
        mask = predictor.segment("the red cup")

Importing this package imports nothing else; each name below is fetched when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rt_ris.bundle import Bundle as Bundle
    from rt_ris.bundle import write_bundle as write_bundle
    from rt_ris.cli.overlay import overlay as overlay
    from rt_ris.errors import RtRisError as RtRisError
    from rt_ris.image import load_image as load_image
    from rt_ris.manifest import Manifest as Manifest
    from rt_ris.mask import Mask as Mask
    from rt_ris.predictor import Predictor as Predictor
    from rt_ris.text import TruncationWarning as TruncationWarning

__version__ = "0.1.0"

_HOMES = {
    "Bundle": "rt_ris.bundle",
    "Manifest": "rt_ris.manifest",
    "Mask": "rt_ris.mask",
    "Predictor": "rt_ris.predictor",
    "RtRisError": "rt_ris.errors",
    "TruncationWarning": "rt_ris.text",
    "load_image": "rt_ris.image",
    "overlay": "rt_ris.cli.overlay",
    "write_bundle": "rt_ris.bundle",
}

__all__ = [
    "Bundle",
    "Manifest",
    "Mask",
    "Predictor",
    "RtRisError",
    "TruncationWarning",
    "load_image",
    "overlay",
    "write_bundle",
]


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'rt_ris' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
