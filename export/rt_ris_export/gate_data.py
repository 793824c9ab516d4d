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
from rt_ris_train.data.masks import BoolMask, decode_segmentation
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
        targets: what each sentence means, bool [H, W]; None where nobody has labelled it.
    """

    name: str
    picture: Pixels
    sentences: tuple[str, ...]
    targets: tuple[BoolMask | None, ...]


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
    """The photographs in this package; their licences lie beside them.

    Labels are polygons drawn by hand, of what is large enough.
    """
    folder = resources.files("rt_ris_export") / "gate"
    listed: Mapping[str, Mapping[str, list[list[float]]]] = json.loads(
        (folder / "gate.json").read_text("utf-8")
    )
    samples = []
    for file, labels in listed.items():
        with resources.as_file(folder / file) as path:
            picture = load_image(path)
        height, width, _ = picture.shape
        targets = (
            decode_segmentation(polygons, height=height, width=width) if polygons else None
            for polygons in labels.values()
        )
        samples.append(
            GateSample(
                name=file.split(".")[0],
                picture=picture,
                sentences=tuple(labels),
                targets=tuple(targets),
            )
        )
    return tuple(samples)


def sideways_sample() -> GateSample:
    """What pictures in landscape format with short sentences leave out of a graph.

    A picture in portrait format, whose border is on its right; more sentences at once than
    elsewhere; sentences of many lengths, up to one that is cut.
    """
    first = shipped_samples()[0]
    words = "the cat that looks to the right of the camera with two green eyes and long whiskers"
    return GateSample(
        name=f"{first.name} on its side",
        picture=np.ascontiguousarray(first.picture.transpose(1, 0, 2)),
        sentences=(
            "the cat",
            " ".join(words.split()[:10]),
            words,
            " and ".join([words] * 8),
            "the ear at the bottom of the picture on the left",
        ),
        targets=(None,) * 5,
    )
