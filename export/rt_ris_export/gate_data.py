"""The pictures and sentences on which a bundle is compared with PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources

from rt_ris.image import Pixels, load_image


@dataclass(frozen=True, kw_only=True, eq=False)
class GateSample:
    """One picture and what is asked about it.

    Attributes:
        name: of the picture, for messages.
        picture: uint8 [H, W, 3], RGB.
        sentences: at least two, so that both one and several expressions are run.
    """

    name: str
    picture: Pixels
    sentences: tuple[str, ...]


def shipped_samples() -> tuple[GateSample, ...]:
    """The photographs in this package; their licences lie beside them."""
    folder = resources.files("rt_ris_export") / "gate"
    listed: Mapping[str, list[str]] = json.loads((folder / "gate.json").read_text("utf-8"))
    samples = []
    for file, sentences in listed.items():
        with resources.as_file(folder / file) as path:
            picture = load_image(path)
        samples.append(
            GateSample(name=file.split(".")[0], picture=picture, sentences=tuple(sentences))
        )
    return tuple(samples)
