"""The pictures and sentences on which a bundle is compared with PyTorch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np

from rt_ris.build.limits import PROVING
from rt_ris.errors import DataError
from rt_ris.image import Pixels, load_image
from rt_ris_train.data.masks import BoolMask
from rt_ris_train.data.refcoco import Ref, RefDataset

GATE_PICTURES: Final = 5
"""As many as ship; the gate runs every stage on each of them several times."""

GATE_SENTENCES: Final = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class GateSample:
    """One picture and what is asked about it.

    Attributes:
        name: of the picture, for messages.
        picture: uint8 [H, W, 3], RGB.
        sentences: at least two, so that both one and several expressions are run.
        targets: bool [H, W], what each sentence means; empty where nobody has labelled it.
    """

    name: str
    picture: Pixels
    sentences: tuple[str, ...]
    targets: tuple[BoolMask, ...] = ()


def samples_of(root: Path, *, split: str) -> tuple[GateSample, ...]:
    """Pictures of a data set with targets of a size at which a mask proves something.

    They are spread evenly over the split. A network that knows only its own kinds of things finds
    nothing on the shipped photographs, and a gate that compares empty masks proves nothing.

    Args:
        root: folder in RefCOCO's format.
        split: whose pictures are taken.

    Raises:
        DataError: the data cannot be read, or no picture has two sentences with such targets.
    """
    dataset = RefDataset.open(root, split=split)
    fitting: dict[int, list[tuple[Ref, str]]] = {}
    for ref, sentence in dataset.samples():
        if PROVING[0] <= float(np.mean(dataset.mask(ref))) <= PROVING[1]:
            fitting.setdefault(ref.image_id, []).append((ref, sentence.text))
    usable = [pairs for pairs in fitting.values() if len(pairs) > 1]
    if not usable:
        raise DataError(
            f"No picture of split '{split}' in '{root}' has two sentences whose targets cover "
            f"{PROVING[0]:.0%} to {PROVING[1]:.0%} of it; give data with larger targets (--gate)."
        )
    step = max(len(usable) // GATE_PICTURES, 1)
    return tuple(_sample(dataset, pairs) for pairs in islice(usable[::step], GATE_PICTURES))


def _sample(dataset: RefDataset, pairs: list[tuple[Ref, str]]) -> GateSample:
    first = pairs[0][0]
    refs = {text: ref for ref, text in reversed(pairs)}
    texts = tuple(dict.fromkeys(text for _, text in pairs))[:GATE_SENTENCES]
    return GateSample(
        name=first.file_name,
        picture=dataset.image(first),
        sentences=texts,
        targets=tuple(dataset.mask(refs[text]) for text in texts),
    )


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
