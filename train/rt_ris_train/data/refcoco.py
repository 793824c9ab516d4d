"""Reader of RefCOCO's format: RefCOCO, RefCOCO+, RefCOCOg, Ref-ZOM, gRefCOCO, and our own scenes.

A data set is a folder with `instances.json` (COCO's form) and `refs(<split_by>).p` (a Python-2
pickle) or the same list as `refs(<split_by>).json`; gRefCOCO calls it `grefs(...)`. A ref is one
object, several, or none, with the sentences that refer to it.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from rt_ris.errors import DataError
from rt_ris_train.data.masks import BoolMask, Segmentation, union_of
from rt_ris_train.data.unpickle import load_plain_pickle

Record: TypeAlias = Mapping[str, Any]

# Relative to the data set's root, in the order in which they are tried.
IMAGE_FOLDERS: tuple[str, ...] = tuple(
    f"{base}{tail}"
    for base in ("", "../")
    for tail in (
        "images",
        "images/train2014",
        "images/mscoco/images/train2014",
        "images/trainval2014",
        "train2014",
        "trainval2014",
    )
)
_GREFCOCO = "grefs("
_COCO_NAME = re.compile(r"(?:COCO_[a-z]+\d{4}_)?(\d{12})\.jpg")
_NO_ANNOTATION = -1  # gRefCOCO's mark for "refers to nothing here"


@dataclass(frozen=True)
class Sentence:
    """One referring expression.

    Attributes:
        sent_id: unique within the refs file.
        text: cleaned and lower-case (`sent` in the file).
        raw: as it was typed.
        kind: what the sentence tests ('ordinal', 'relation', ...) where the file says so.
    """

    sent_id: int
    text: str
    raw: str
    kind: str | None


@dataclass(frozen=True)
class Ref:
    """What a group of sentences refers to in one image.

    Attributes:
        ref_id: unique within the refs file.
        image_id: id of the image in instances.json.
        ann_ids: annotations whose union is the target; empty when `no_target`.
        file_name: the image's, from instances.json (the one in the refs file has a suffix).
        split: as the file writes it.
        sentences: at least one.
        no_target: the sentences describe something that is not in the image.
    """

    ref_id: int
    image_id: int
    ann_ids: tuple[int, ...]
    file_name: str
    split: str
    sentences: tuple[Sentence, ...]
    no_target: bool


@dataclass(frozen=True)
class ImageInfo:
    """What is known of a picture without opening it.

    Attributes:
        file_name: below one of the folders where pictures are looked for.
        height: in pixels.
        width: in pixels.
        coco_id: its number in COCO, where it is one of COCO's pictures, whatever its size here.
    """

    file_name: str
    height: int
    width: int
    coco_id: int | None = None

    @property
    def identity(self) -> str:
        """Equal for the same picture in another set: COCO's number, else name and size."""
        name = PurePosixPath(self.file_name).name
        coco = _COCO_NAME.fullmatch(name)
        if coco or self.coco_id is not None:
            return f"COCO {int(coco[1]) if coco else self.coco_id}"
        return f"{name} {self.height} x {self.width}"


class RefDataset:
    """The refs of one split, in the order of the file.

    Images and masks are read when asked for and not kept. Reading is thread-safe and an open data
    set can be pickled to worker processes.
    """

    def __init__(
        self,
        root: Path,
        *,
        refs: tuple[Ref, ...],
        images: Mapping[int, ImageInfo],
        segmentations: Mapping[int, Segmentation],
    ) -> None:
        """Hold tables that are already checked; use `RefDataset.open` to read a folder."""
        self.root = root
        self.name = str(root)
        self.refs = refs
        self._images = images
        self._segmentations = segmentations

    @classmethod
    def open(cls, root: Path, *, split: str, split_by: str | None = None) -> RefDataset:
        """Read one split of the data set in `root`.

        'testA', 'testB', 'testC' take every ref whose split contains their letter, 'test' every
        ref whose split contains 'test', any other name the refs with exactly that split (the rule
        of the refer API).

        Args:
            root: folder with instances.json and refs(<split_by>).p or .json.
            split: as above.
            split_by: who made the split ('unc', 'umd', 'google', 'final', 'synth'); may be left
                out where the folder holds one refs file.

        Raises:
            DataError: if a file is missing, damaged or refused, a ref points to what is not there,
                or the split is empty.
        """
        refs_path = _find_refs_file(root, split_by)
        records = _load_records(refs_path)
        chosen = [record for record in records if in_split(str(record.get("split")), split)]
        if not chosen:
            present = sorted({str(record.get("split")) for record in records})
            raise DataError(
                f"'{refs_path}' has no ref in split '{split}'. Its splits are: "
                f"{', '.join(present) or 'none, the file is empty'}."
            )
        instances = _load_instances(root / "instances.json")
        images = _read_images(instances, root, wanted=_image_ids(chosen))
        refs = tuple(_read_ref(record, images, refs_path) for record in chosen)
        if refs_path.name.startswith(_GREFCOCO):
            refs = _without_crowds(instances, refs, root)
        segmentations = _read_segmentations(instances, refs, root)
        return cls(root, refs=refs, images=images, segmentations=segmentations)

    def __len__(self) -> int:
        return len(self.refs)

    def __getitem__(self, index: int) -> Ref:
        return self.refs[index]

    def __iter__(self) -> Iterator[Ref]:
        return iter(self.refs)

    def with_refs(self, refs: tuple[Ref, ...]) -> RefDataset:
        """The same pictures and annotations with some of the refs.

        Raises:
            DataError: no ref is left.
        """
        if not refs:
            raise DataError(f"Nothing is left of '{self.name}' after leaving pictures out.")
        chosen = copy.copy(self)
        chosen.refs = refs
        return chosen

    def digest(self) -> str:
        """Changes with anything that a training reads but the pictures themselves."""
        found = hashlib.sha256()
        for ref in self.refs:
            found.update(f"{ref} {self.info(ref)} {self.outline(ref)}".encode())
        return found.hexdigest()

    def outline(self, ref: Ref) -> object:
        """What the ref's mask is made of."""
        return [self._segmentations[ann_id] for ann_id in ref.ann_ids]

    def samples(self) -> list[tuple[Ref, Sentence]]:
        """Every sentence with its ref: the unit in which test scores are published."""
        return [(ref, sentence) for ref in self.refs for sentence in ref.sentences]

    def info(self, ref: Ref) -> ImageInfo:
        """Name and size of the ref's image."""
        return self._images[ref.image_id]

    def size(self, ref: Ref) -> tuple[int, int]:
        """Height and width of the ref's image in pixels, without opening it."""
        info = self.info(ref)
        return info.height, info.width

    def image_path(self, ref: Ref) -> Path:
        """Find the ref's image file.

        Tried in this order, under `root` and then under its parent folder: images/,
        images/train2014/, images/mscoco/images/train2014/ (the refer API's place),
        images/trainval2014/ (Ref-ZOM), train2014/, trainval2014/.

        Raises:
            DataError: naming every place tried.
        """
        places = [self.root / folder for folder in IMAGE_FOLDERS]
        for place in places:
            path = place / ref.file_name
            if path.is_file():
                return path
        raise DataError(
            f"Image '{ref.file_name}' of ref {ref.ref_id} was not found. Tried: "
            f"{', '.join(str(place) for place in places)}. Put the images, or a link to their "
            "folder, in one of these."
        )

    def image(self, ref: Ref) -> npt.NDArray[np.uint8]:
        """Read the ref's image: uint8 [H, W, 3] RGB, as stored (no EXIF rotation, as in COCO).

        Raises:
            DataError: if it is missing, unreadable, or not of the size in instances.json.
        """
        path = self.image_path(ref)
        try:
            with Image.open(path) as opened:
                pixels = np.asarray(opened.convert("RGB"))
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"Cannot read the image '{path}': {error}.") from error
        if pixels.shape[:2] != self.size(ref):
            raise DataError(
                f"'{path}' is {pixels.shape[:2]} [H, W]; instances.json says {self.size(ref)}. "
                "Masks would not fit: use the pictures at their original size."
            )
        return pixels

    def mask(self, ref: Ref) -> BoolMask:
        """Union of the ref's annotations, bool [H, W]; all False when `ref.no_target`."""
        height, width = self.size(ref)
        segmentations = (self._segmentations[ann_id] for ann_id in ref.ann_ids)
        return union_of(segmentations, height=height, width=width)


def in_split(ref_split: str, wanted: str) -> bool:
    """Whether a ref marked `ref_split` belongs to the split `wanted` (see `RefDataset.open`)."""
    if wanted in ("testA", "testB", "testC"):
        return wanted[-1] in ref_split
    if wanted == "test":
        return "test" in ref_split
    return ref_split == wanted


def pictures_outside(root: Path, *, split: str, split_by: str | None = None) -> set[str]:
    """Identities of the pictures that have a ref in any other split than the named one.

    Raises:
        DataError: as ``RefDataset.open``.
    """
    records = _load_records(_find_refs_file(root, split_by))
    others = _image_ids(r for r in records if not in_split(str(r.get("split")), split))
    pictures = _read_images(_load_instances(root / "instances.json"), root, wanted=others)
    return {picture.identity for picture in pictures.values()}


def _image_ids(records: Iterable[Record]) -> set[object]:
    """What can be an image's number; what cannot is refused where its ref is read."""
    found = (record.get("image_id") for record in records)
    return {number for number in found if isinstance(number, Hashable)}


def _find_refs_file(root: Path, split_by: str | None) -> Path:
    if not (root / "instances.json").is_file():
        raise DataError(
            f"'{root}' has no instances.json. Give the folder of one data set, for example "
            "data/refcoco, that holds instances.json and refs(unc).p."
        )
    found = {
        path.name: path
        for pattern in ("refs(*).p", "refs(*).json", "grefs(*).p", "grefs(*).json")
        for path in sorted(root.glob(pattern))
    }
    stem = f"refs({split_by})"
    fitting = {n: p for n, p in found.items() if split_by is None or stem in n}
    by_stem = {path.stem: path for path in reversed(fitting.values())}  # .p before .json
    if len(by_stem) == 1:
        return next(iter(by_stem.values()))
    names = ", ".join(sorted(found)) or "none"
    if not by_stem:
        wanted = stem if split_by else "refs(<split_by>)"
        raise DataError(f"'{root}' has no {wanted}.p or .json. Refs files there: {names}.")
    raise DataError(
        f"'{root}' holds several refs files ({names}). Say which split to use with split_by, "
        f"the word in the brackets."
    )


def load_json(path: Path) -> object:
    """What a JSON file holds.

    Raises:
        DataError: it cannot be read, or is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"Cannot read '{path}': {error.strerror or error}.") from error
    except ValueError as error:
        raise DataError(f"'{path}' is not valid JSON: {error}.") from error


def _load_instances(path: Path) -> Record:
    loaded = load_json(path)
    if not isinstance(loaded, dict):
        raise DataError(f"'{path}' holds a {type(loaded).__name__}; COCO's dict is expected.")
    return loaded


def _load_records(path: Path) -> list[Record]:
    loaded = load_plain_pickle(path) if path.suffix == ".p" else load_json(path)
    if not isinstance(loaded, list) or not all(isinstance(r, dict) for r in loaded):
        raise DataError(f"'{path}' holds a {type(loaded).__name__}; a list of dicts is expected.")
    return loaded


def _read_images(instances: Record, root: Path, *, wanted: set[Any]) -> dict[int, ImageInfo]:
    try:
        return {
            image["id"]: ImageInfo(
                _safe_name(image["file_name"]), int(image["height"]), int(image["width"])
            )
            for image in instances["images"]
            if image["id"] in wanted
        }
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"Bad 'images' in '{root / 'instances.json'}': {error!r}.") from error


def _safe_name(name: str) -> str:
    parts = PurePosixPath(name).parts
    if PurePosixPath(name).is_absolute() or ".." in parts or not parts:
        raise ValueError(f"file_name {name!r} leaves the image folder")
    return name


def _without_crowds(instances: Record, refs: Sequence[Ref], root: Path) -> tuple[Ref, ...]:
    """Leave out crowds, which gRefCOCO's refs name here and there and its own reader passes over.

    A ref of crowds alone has nothing to compare with and is left out.
    """
    try:
        crowds = {a["id"] for a in instances["annotations"] if a.get("iscrowd")}
    except (AttributeError, KeyError, TypeError) as error:
        raise DataError(f"Bad 'annotations' in '{root / 'instances.json'}': {error!r}.") from error
    single = [
        replace(ref, ann_ids=tuple(ann_id for ann_id in ref.ann_ids if ann_id not in crowds))
        for ref in refs
    ]
    return tuple(ref for ref in single if ref.ann_ids or ref.no_target)


def _read_segmentations(
    instances: Record, refs: Sequence[Ref], root: Path
) -> dict[int, Segmentation]:
    """Keep the segmentations that the refs use, and check that they are of the same image."""
    image_of = {ann_id: ref.image_id for ref in refs for ann_id in ref.ann_ids}
    kept: dict[int, Segmentation] = {}
    try:
        for annotation in instances["annotations"]:
            ann_id = annotation["id"]
            if image_of.get(ann_id) == annotation["image_id"]:
                kept[ann_id] = annotation["segmentation"]
    except (KeyError, TypeError) as error:
        raise DataError(f"Bad 'annotations' in '{root / 'instances.json'}': {error!r}.") from error
    missing = sorted(image_of.keys() - kept.keys())
    if missing:
        raise DataError(
            f"{len(missing)} annotations that the refs name are not in "
            f"'{root / 'instances.json'}' for the same image, the first is {missing[0]}. The two "
            "files belong to different data sets."
        )
    return kept


def _read_ref(record: Record, images: Mapping[int, ImageInfo], path: Path) -> Ref:
    try:
        image_id = int(record["image_id"])
        ann_ids = _annotation_ids(record)
        sentences = tuple(_read_sentence(s, n) for n, s in enumerate(record["sentences"]))
        if not sentences:
            raise ValueError("it has no sentence")
        ref_id, split = int(record["ref_id"]), str(record["split"])
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        name = record.get("ref_id", "without ref_id")
        raise DataError(f"'{path}': ref {name} is not as expected: {error!r}.") from error
    if image_id not in images:
        raise DataError(
            f"'{path}': ref {ref_id} is of image {image_id}, which instances.json does not list."
        )
    return Ref(
        ref_id=ref_id,
        image_id=image_id,
        ann_ids=ann_ids,
        file_name=images[image_id].file_name,
        split=split,
        sentences=sentences,
        no_target=not ann_ids,
    )


def _annotation_ids(record: Record) -> tuple[int, ...]:
    """Normalise `ann_id`: an int, a list (several), or [-1], [], None, -1 (nothing)."""
    if record.get("source") == "zero" or record.get("no_target") is True:
        return ()
    value = record["ann_id"]
    values = value if isinstance(value, (list, tuple)) else [value]
    return tuple(dict.fromkeys(int(v) for v in values if v is not None and v != _NO_ANNOTATION))


def _read_sentence(record: Record, position: int) -> Sentence:
    raw = record.get("raw")
    text = record["sent"] if "sent" in record else str(raw).lower()
    kind = record.get("kind")
    return Sentence(
        sent_id=int(record.get("sent_id", position)),
        text=str(text),
        raw=str(text if raw is None else raw),
        kind=None if kind is None else str(kind),
    )
