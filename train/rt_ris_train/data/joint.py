"""Several data sets as one, in which a picture of several sets is one picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from rt_ris_train.data.masks import BoolMask
from rt_ris_train.data.refcoco import ImageInfo, Ref, RefDataset


class JointDataset(RefDataset):
    """The refs of all sets in their order, with numbers of their own for refs and pictures.

    Raises:
        DataError: a picture's file is not there.
    """

    def __init__(self, sets: Sequence[RefDataset]) -> None:
        super().__init__(sets[0].root, refs=(), images={}, segmentations={})
        self.name = " + ".join(each.name for each in sets)
        self._home = [(each, ref) for each in sets for ref in each.refs]
        numbers: dict[Path, int] = {}
        paths: dict[tuple[str, int], Path] = {}
        refs: list[Ref] = []
        for index, (each, ref) in enumerate(self._home):
            at = (each.name, ref.image_id)
            if at not in paths:
                paths[at] = each.image_path(ref).resolve()
            number = numbers.setdefault(paths[at], len(numbers))
            refs.append(replace(ref, ref_id=index, image_id=number))
        self.refs = tuple(refs)

    def info(self, ref: Ref) -> ImageInfo:
        """Name and size of the ref's picture."""
        home, own = self._home[ref.ref_id]
        return home.info(own)

    def image_path(self, ref: Ref) -> Path:
        """The file of the ref's picture, where its own set has it."""
        home, own = self._home[ref.ref_id]
        return home.image_path(own)

    def image(self, ref: Ref) -> npt.NDArray[np.uint8]:
        """The ref's picture, uint8 [H, W, 3] RGB."""
        home, own = self._home[ref.ref_id]
        return home.image(own)

    def outline(self, ref: Ref) -> object:
        """What the ref's mask is made of."""
        home, own = self._home[ref.ref_id]
        return home.outline(own)

    def mask(self, ref: Ref) -> BoolMask:
        """The ref's mask, bool [H, W], as its own set makes it."""
        home, own = self._home[ref.ref_id]
        return home.mask(own)
