"""One way to open a data set of any kind that is read."""

from __future__ import annotations

from pathlib import Path

from rt_ris_train.data.phrasecut import is_phrasecut, open_phrasecut
from rt_ris_train.data.refcoco import RefDataset


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


def without_images(dataset: RefDataset, others: list[RefDataset]) -> RefDataset:
    """A training set less every picture that is in one of the others.

    For joint training: RefCOCO, RefCOCO+ and RefCOCOg share COCO's pictures, so that a picture to
    train on in one may be a picture to test on in another.
    """
    held_out = {ref.image_id for other in others for ref in other.refs}
    kept = tuple(ref for ref in dataset.refs if ref.image_id not in held_out)
    return dataset.with_refs(kept)
