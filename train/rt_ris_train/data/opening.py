"""One way to open data sets of any kind that is read, to train on and to measure on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rt_ris.errors import DataError
from rt_ris_train.data.joint import JointDataset
from rt_ris_train.data.phrasecut import is_phrasecut, open_phrasecut, phrasecut_pictures
from rt_ris_train.data.refcoco import RefDataset, pictures_outside

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """What to train on, and what to validate on."""

    train: RefDataset
    val: RefDataset


def open_dataset(root: Path, *, split: str, split_by: str | None = None) -> RefDataset:
    """Open one split of a folder in RefCOCO's format or PhraseCut's.

    Args:
        root: the folder.
        split: as ``RefDataset.open`` and ``open_phrasecut`` say.
        split_by: who made the split, where a folder in RefCOCO's format has several.

    Raises:
        DataError: as those two.
    """
    if is_phrasecut(root):
        return open_phrasecut(root, split=split)
    return RefDataset.open(root, split=split, split_by=split_by)


def open_training(
    roots: Sequence[Path],
    *,
    split_by: Sequence[str] = (),
    split: str = "train",
    val_split: str = "val",
    hold_out: float | None = None,
) -> TrainingData:
    """Open one data set to train on, or several as one.

    RefCOCO, RefCOCO+ and RefCOCOg share COCO's pictures: a picture to train on in one may be a
    picture to test on in another. Several sets together therefore train on no picture that any of
    them has outside its training split. Pictures of COCO are told by their number there, which
    PhraseCut states as well, others by the name and size of their file.

    Args:
        roots: folders of the sets.
        split_by: who made the splits: nobody named, one for all, or one for each.
        split: to train on.
        val_split: to validate on.
        hold_out: validate on this share of the training split's pictures instead, which are then
            not trained on; for sets that have no validation split, such as Ref-ZOM.

    Raises:
        DataError: a set cannot be opened, the numbers of names do not fit, or nothing is left.
    """
    makers: list[str | None] = list(split_by)
    if len(makers) not in (0, 1, len(roots)):
        raise DataError(
            f"{len(makers)} makers of splits were named for {len(roots)} data sets; name one for "
            "each, one for all, or none."
        )
    each = makers if len(makers) > 1 else (makers or [None]) * len(roots)
    pairs = list(zip(roots, each, strict=True))
    sets = [open_dataset(root, split=split, split_by=by) for root, by in pairs]
    train = sets[0] if len(sets) == 1 else _joint(sets, pairs, split)
    if hold_out is not None:
        return _held_out(train, hold_out)
    try:
        vals = [open_dataset(root, split=val_split, split_by=by) for root, by in pairs]
    except DataError as error:
        raise DataError(
            f"{error} To validate on another split, name it (--val-split); to hold out a share of "
            "the training pictures instead, give it (--hold-out 0.02)."
        ) from error
    return TrainingData(train=train, val=vals[0] if len(vals) == 1 else JointDataset(vals))


def _joint(
    sets: Sequence[RefDataset], pairs: Sequence[tuple[Path, str | None]], split: str
) -> RefDataset:
    elsewhere: set[str] = set()
    for each, (root, by) in zip(sets, pairs, strict=True):
        if is_phrasecut(root):
            elsewhere |= phrasecut_pictures(root) - {each.info(ref).identity for ref in each}
        else:
            elsewhere |= pictures_outside(root, split=split, split_by=by)
    joint = JointDataset(sets)
    kept = tuple(ref for ref in joint.refs if joint.info(ref).identity not in elsewhere)
    _LOG.warning(
        "%d of %d refs to train on are left out: a set has their picture in another split.",
        len(joint.refs) - len(kept),
        len(joint.refs),
    )
    return joint.with_refs(kept)


def _held_out(dataset: RefDataset, share: float) -> TrainingData:
    """A share of the pictures, drawn once and for all, and the others."""
    if not 0 < share < 1:
        raise DataError(f"A share of {share} cannot be held out; accepted is more than 0, below 1.")
    identity = {ref.ref_id: dataset.info(ref).identity for ref in dataset.refs}
    pictures = sorted(set(identity.values()))
    count = max(round(share * len(pictures)), 1)
    drawn = np.random.default_rng(0).permutation(len(pictures))[:count]
    chosen = {pictures[index] for index in drawn}
    return TrainingData(
        train=dataset.with_refs(tuple(r for r in dataset if identity[r.ref_id] not in chosen)),
        val=dataset.with_refs(tuple(r for r in dataset if identity[r.ref_id] in chosen)),
    )
