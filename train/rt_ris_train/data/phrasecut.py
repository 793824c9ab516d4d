"""Reader of PhraseCut (VGPhraseCut v0), behind the face of ``RefDataset``.

A data set is a folder with ``image_data_split3000.json`` (or ``image_data_split.json``), the tasks
of each split in ``refer_<split>.json`` and the pictures in ``images``. A task is one phrase and the
polygons of all its instances.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from rt_ris.errors import DataError
from rt_ris_train.data.masks import BoolMask
from rt_ris_train.data.refcoco import ImageInfo, Ref, RefDataset, Sentence, load_json

INDEXES = ("image_data_split3000.json", "image_data_split.json")
PARTS = {"val_miniv": ("val", "miniv")}
"""Names of several splits together: the file of 'val' leaves out 'miniv'."""

Polygons = Sequence[Sequence[Sequence[tuple[int, int]]]]
"""Instances, polygons of each, points, x and y cut to whole pixels."""


class PhraseCut(RefDataset):
    """The tasks of one split, each as a ref with one sentence."""

    def __init__(
        self,
        root: Path,
        *,
        refs: tuple[Ref, ...],
        images: Mapping[int, ImageInfo],
        polygons: Mapping[int, Polygons],
    ) -> None:
        """Hold tables that are already checked; use ``open_phrasecut`` to read a folder."""
        super().__init__(root, refs=refs, images=images, segmentations={})
        self._polygons = polygons

    def outline(self, ref: Ref) -> object:
        """What the ref's mask is made of."""
        return self._polygons[ref.ref_id]

    def mask(self, ref: Ref) -> BoolMask:
        """Union of all instances, bool [H, W], drawn as the authors' tool draws it."""
        height, width = self.size(ref)
        return draw_polygons(self._polygons[ref.ref_id], height=height, width=width)


def draw_polygons(instances: Polygons, *, height: int, width: int) -> BoolMask:
    """Fill and outline every polygon.

    Polygons of fewer than two points are left out, as by the authors.

    Returns:
        bool [H, W].
    """
    canvas = Image.new("L", (width, height))
    pen = ImageDraw.Draw(canvas)
    for polygons in instances:
        for points in polygons:
            if len(points) >= 2:
                pen.polygon(points, outline=1, fill=1)
    drawn: BoolMask = np.asarray(canvas, dtype=np.bool_)
    return drawn


def is_phrasecut(root: Path) -> bool:
    """Whether a folder holds PhraseCut."""
    return any((root / name).is_file() for name in INDEXES)


def open_phrasecut(root: Path, *, split: str) -> PhraseCut:
    """Read one split.

    Args:
        root: the folder.
        split: ``train``, ``val`` (without miniv), ``miniv``, ``test``, or ``val_miniv`` for both.

    Raises:
        DataError: a file is missing or damaged, or the split is none.
    """
    images = _images(root)
    refs: list[Ref] = []
    polygons: dict[int, Polygons] = {}
    for part in PARTS.get(split, (split,)):
        for task in _tasks(root, part):
            ref_id = len(refs)
            refs.append(_ref(task, ref_id, images, split=part))
            polygons[ref_id] = _polygons(task)
    used = {ref.image_id for ref in refs}
    kept = {image_id: info for image_id, info in images.items() if image_id in used}
    return PhraseCut(root, refs=tuple(refs), images=kept, polygons=polygons)


def _tasks(root: Path, split: str) -> list[dict[str, Any]]:
    path = root / f"refer_{split}.json"
    if not path.is_file():
        there = ", ".join(sorted(p.stem.removeprefix("refer_") for p in root.glob("refer_*.json")))
        raise DataError(
            f"'{root}' has no split '{split}' ('{path.name}'); its splits are: {there or 'none'}."
        )
    loaded = load_json(path)
    if not isinstance(loaded, list) or not loaded or not all(isinstance(t, dict) for t in loaded):
        raise DataError(f"'{path}' holds no list of tasks.")
    return loaded


def phrasecut_pictures(root: Path) -> set[str]:
    """Identities of every picture of all splits.

    Raises:
        DataError: their list is damaged.
    """
    return {picture.identity for picture in _images(root).values()}


def _images(root: Path) -> dict[int, ImageInfo]:
    path = next(root / name for name in INDEXES if (root / name).is_file())
    loaded = load_json(path)
    if not isinstance(loaded, list):
        raise DataError(f"'{path}' holds a {type(loaded).__name__}; a list is expected.")
    try:
        return {
            int(entry["image_id"]): ImageInfo(
                f"{int(entry['image_id'])}.jpg",
                int(entry["height"]),
                int(entry["width"]),
                None if entry.get("coco_id") is None else int(entry["coco_id"]),
            )
            for entry in loaded
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"'{path}' is no list of PhraseCut's pictures: {error!r}.") from error


def _polygons(task: Mapping[str, Any]) -> Polygons:
    """The authors' tool cuts points to whole pixels before it draws."""
    try:
        return [
            [[(int(x), int(y)) for x, y in points] for points in polygons]
            for polygons in task["Polygons"]
        ]
    except (OverflowError, TypeError, ValueError) as error:
        raise DataError(
            f"PhraseCut's task {task.get('task_id')} has polygons that are no lists of x and y: "
            f"{error}."
        ) from error


def _ref(
    task: Mapping[str, Any], ref_id: int, images: Mapping[int, ImageInfo], *, split: str
) -> Ref:
    try:
        image_id, phrase = int(task["image_id"]), str(task["phrase"])
        count = len(task["Polygons"])
    except (KeyError, TypeError, ValueError) as error:
        name = task.get("task_id", "without task_id")
        raise DataError(f"PhraseCut's task {name} is not as expected: {error!r}.") from error
    if image_id not in images:
        raise DataError(f"PhraseCut's task {task.get('task_id')} is of an unknown picture.")
    return Ref(
        ref_id=ref_id,
        image_id=image_id,
        ann_ids=tuple(range(count)),
        file_name=images[image_id].file_name,
        split=split,
        sentences=(Sentence(ref_id, phrase, phrase, None),),
        no_target=not count,
    )
