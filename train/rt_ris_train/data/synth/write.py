"""Writing of a data set of scenes in RefCOCO's format, resumable and in parallel."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from rt_ris.errors import DataError
from rt_ris_train.data.masks import encode_mask
from rt_ris_train.data.synth.backgrounds import (
    SPLITS,
    Background,
    find_backgrounds,
    share_out,
)
from rt_ris_train.data.synth.compose import Composite, compose
from rt_ris_train.data.synth.sentences import Expression, tell
from rt_ris_train.data.synth.sprites import LICENCES, SpriteLibrary, table_digest
from rt_ris_train.data.synth.vocabulary import default_vocabulary

FORMAT_VERSION = 1
_IDS_PER_SPLIT = 1_000_000  # ids of a scene depend on its split and index only
_IDS_PER_SCENE = 100  # things, and sentences, of one scene
_JPEG_QUALITY = (78, 95)

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class SynthRecipe:
    """What to make. Equal recipes and equal assets give equal files.

    Attributes:
        seed: not negative; every scene has its own stream [seed, split, index].
        train: number of scenes of the split; also `val` and `test`.
        stamps: folder 'stamps' of tuxpaint-stamps-default; None draws OpenMoji glyphs.
        backgrounds: folder with further pictures; None uses those of installed packages.
        sentences: least and greatest number of sentences asked of a scene.
        nouns: only objects with these names; empty takes all.
    """

    seed: int = 0
    train: int = 1000
    val: int = 100
    test: int = 100
    stamps: Path | None = None
    backgrounds: Path | None = None
    sentences: tuple[int, int] = (6, 9)
    nouns: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse numbers that cannot be meant."""
        counts = {"seed": self.seed, "train": self.train, "val": self.val, "test": self.test}
        for name, value in counts.items():
            if not 0 <= value < _IDS_PER_SPLIT:
                raise DataError(f"{name} is {value}; accepted is 0 to {_IDS_PER_SPLIT - 1}.")
        low, high = self.sentences
        if not 1 <= low <= high < _IDS_PER_SCENE:
            raise DataError(f"sentences is {self.sentences}; accepted is 1 <= low <= high < 100.")
        if self.train + self.val + self.test == 0:
            raise DataError("No scene was asked for: train, val and test are all 0.")

    def jobs(self) -> list[tuple[str, int]]:
        """Split and index of every scene; small splits first, so that they can be used early."""
        counts = {"val": self.val, "test": self.test, "train": self.train}
        return [(split, index) for split, count in counts.items() for index in range(count)]


@dataclass(frozen=True)
class Summary:
    """What was written: counts of scenes and sentences, by split and by kind."""

    scenes: dict[str, int]
    refs: dict[str, int]
    sentences: dict[str, int]
    kinds: dict[str, dict[str, int]]


class Studio:
    """Everything that scenes are made of. Each process has its own."""

    def __init__(self, recipe: SynthRecipe) -> None:
        """Load the tables and find the assets; complain now if any is missing."""
        self.recipe = recipe
        self.vocabulary = default_vocabulary()
        self.library = SpriteLibrary(recipe.stamps, nouns=recipe.nouns)
        found = find_backgrounds(recipe.backgrounds, self.vocabulary)
        self.backgrounds: dict[str, list[Background]] = share_out(found)

    def make(self, split: str, index: int) -> tuple[Composite, list[Expression], int]:
        """Compose one scene and tell about it; the last number is the JPEG quality."""
        rng = np.random.default_rng([self.recipe.seed, SPLITS.index(split), index])
        while True:
            composite = compose(self.library, self.backgrounds[split], self.vocabulary, rng)
            low, high = self.recipe.sentences
            count = int(rng.integers(low, high + 1))
            told = tell(composite.scene, self.vocabulary, rng, count=count)
            if any(expression.targets for expression in told):
                return composite, told, int(rng.integers(*_JPEG_QUALITY))

    def assets(self) -> dict[str, Any]:
        """What the scenes were made of, for the record."""
        sprites = {
            source: {
                "count": len(sprites),
                "table_sha256": table_digest(sprites),
                "licence": LICENCES[source],
            }
            for source, sprites in self.library.sprites.items()
        }
        pictures = {s: sorted(b.path.name for b in bs) for s, bs in self.backgrounds.items()}
        digest = hashlib.sha256(json.dumps(pictures).encode()).hexdigest()
        return {"sprites": sprites, "backgrounds": pictures, "backgrounds_sha256": digest}


def write_scenes(
    recipe: SynthRecipe, out: Path, *, workers: int = 1, progress: Progress | None = None
) -> Summary:
    """Make all scenes of a recipe and write them to `out` in RefCOCO's format.

    The work is done in '<out>.partial', which becomes `out` at the end. If that folder is there
    already and of the same recipe and assets, its scenes are kept and the missing ones made.

    Args:
        recipe: what to make.
        out: folder that must not exist yet.
        workers: number of processes.
        progress: called with the number of scenes done and the number of all.

    Raises:
        DataError: if `out` exists, '<out>.partial' is of another recipe, or an asset is missing.
    """
    if out.exists():
        raise DataError(f"'{out}' exists already. Give another folder or move it away first.")
    studio = Studio(recipe)
    partial = out.with_name(out.name + ".partial")
    _begin(partial, _describe(studio))
    jobs = recipe.jobs()
    missing = [job for job in jobs if not _record_path(partial, *job).exists()]
    done = len(jobs) - len(missing)
    for _ in _run(studio, partial, missing, workers=workers):
        done += 1
        if progress is not None:
            progress(done, len(jobs))
    summary = _assemble(partial, jobs, _describe(studio))
    shutil.rmtree(partial / "records")
    partial.rename(out)
    return summary


def _describe(studio: Studio) -> dict[str, Any]:
    recipe = studio.recipe
    return {
        "format": FORMAT_VERSION,
        "seed": recipe.seed,
        "scenes": {"train": recipe.train, "val": recipe.val, "test": recipe.test},
        "sentences_per_scene": list(recipe.sentences),
        **({"nouns": sorted(recipe.nouns)} if recipe.nouns else {}),
        "assets": studio.assets(),
    }


def _begin(partial: Path, description: dict[str, Any]) -> None:
    """Make the working folder, or check that the one there is of the same recipe."""
    path = partial / "synth.json"
    if path.exists() and json.loads(path.read_text(encoding="utf-8")) != description:
        raise DataError(
            f"'{partial}' was begun with another recipe or other assets. Remove it, or repeat the "
            "options it was begun with."
        )
    (partial / "images").mkdir(parents=True, exist_ok=True)
    (partial / "records").mkdir(exist_ok=True)
    _write_json(path, description)


def _run(
    studio: Studio, partial: Path, jobs: Sequence[tuple[str, int]], *, workers: int
) -> Iterator[None]:
    if workers <= 1:
        for job in jobs:
            _make_one(studio, partial, job)
            yield
        return
    with ProcessPoolExecutor(
        workers,
        mp_context=get_context("spawn"),
        initializer=_prepare_worker,
        initargs=(studio.recipe, partial),
    ) as pool:
        yield from pool.map(_work, jobs, chunksize=8)


_worker: dict[str, Any] = {}


def _prepare_worker(recipe: SynthRecipe, partial: Path) -> None:
    _worker.update(studio=Studio(recipe), partial=partial)


def _work(job: tuple[str, int]) -> None:
    _make_one(_worker["studio"], _worker["partial"], job)


def _make_one(studio: Studio, partial: Path, job: tuple[str, int]) -> None:
    """Write the picture, then its record: a record says that both are complete."""
    split, index = job
    composite, told, quality = studio.make(split, index)
    record = _record(composite, told, split, index)
    name = record["image"]["file_name"]
    Image.fromarray(composite.pixels).save(partial / "images" / name, quality=quality)
    _write_json(_record_path(partial, split, index), record)


def _record_path(partial: Path, split: str, index: int) -> Path:
    return partial / "records" / f"{split}_{index:06d}.json"


def _record(
    composite: Composite, told: Sequence[Expression], split: str, index: int
) -> dict[str, Any]:
    """Everything about one scene, in the shape of the final files."""
    image_id = (SPLITS.index(split) + 1) * _IDS_PER_SPLIT + index
    scene = composite.scene
    image = {"id": image_id, "file_name": f"{split}_{index:06d}.jpg"}
    image.update(width=scene.width, height=scene.height)
    annotations = [
        {
            "id": image_id * _IDS_PER_SCENE + number,
            "image_id": image_id,
            "category": thing.noun,
            "segmentation": encode_mask(composite.owner == number),
            "area": thing.area,
            "bbox": _xywh(thing.box),
            "iscrowd": 0,
        }
        for number, thing in enumerate(scene.things)
    ]
    refs = _refs(told, image_id=image_id, split=split, file_name=str(image["file_name"]))
    graph = {"image_id": image_id, **scene.to_json()}
    return {"image": image, "annotations": annotations, "refs": refs, "scene": graph}


def _xywh(box: tuple[int, int, int, int]) -> list[int]:
    left, top, right, bottom = box
    return [left, top, right - left, bottom - top]


def _refs(
    told: Sequence[Expression], *, image_id: int, split: str, file_name: str
) -> list[dict[str, Any]]:
    """One ref per set of targets; every sentence that refers to nothing has its own."""
    groups: dict[object, list[tuple[int, Expression]]] = {}
    for number, expression in enumerate(told):
        key: object = expression.targets or number
        groups.setdefault(key, []).append((number, expression))
    first_id = image_id * _IDS_PER_SCENE
    refs = []
    for group in groups.values():
        targets = sorted(group[0][1].targets)
        sentences = [_sentence(first_id + number, expression) for number, expression in group]
        ref = {
            "ref_id": sentences[0]["sent_id"],
            "ann_id": [first_id + target for target in targets] or [-1],
            "image_id": image_id,
            "file_name": file_name,
            "split": split,
            "no_target": not targets,
            "sent_ids": [sentence["sent_id"] for sentence in sentences],
            "sentences": sentences,
        }
        refs.append(ref)
    return refs


def _sentence(sent_id: int, expression: Expression) -> dict[str, Any]:
    return {
        "sent_id": sent_id,
        "sent": expression.text,
        "raw": expression.raw,
        "tokens": expression.text.split(),
        "kind": expression.kind,
        "program": expression.program,
    }


def _assemble(
    partial: Path, jobs: Sequence[tuple[str, int]], description: dict[str, Any]
) -> Summary:
    """Join the records into instances.json, refs(synth).p and scenes.jsonl."""
    records = [
        json.loads(_record_path(partial, *job).read_text(encoding="utf-8"))
        for job in sorted(jobs, key=lambda job: (SPLITS.index(job[0]), job[1]))
    ]
    categories = {noun: n for n, noun in enumerate(sorted(default_vocabulary().nouns), start=1)}
    refs, annotations = [], []
    for record in records:
        of_ann = {a["id"]: categories[a.pop("category")] for a in record["annotations"]}
        annotations += [{**a, "category_id": of_ann[a["id"]]} for a in record["annotations"]]
        refs += [
            {**ref, "category_id": [of_ann[a] for a in ref["ann_id"] if a in of_ann]}
            for ref in record["refs"]
        ]
    instances = {
        "info": {"description": "Synthetic referring scenes", "version": str(FORMAT_VERSION)},
        "images": [record["image"] for record in records],
        "annotations": annotations,
        "categories": [{"id": n, "name": noun} for noun, n in categories.items()],
    }
    _write_json(partial / "instances.json", instances)
    (partial / "refs(synth).p").write_bytes(pickle.dumps(refs, protocol=2))
    lines = [json.dumps(record["scene"]) for record in records]
    (partial / "scenes.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    summary = _summarise(records)
    counts = {"scenes": summary.scenes, "refs": summary.refs, "sentences": summary.sentences}
    _write_json(partial / "synth.json", {**description, **counts, "kinds": summary.kinds})
    return summary


def _summarise(records: Sequence[dict[str, Any]]) -> Summary:
    scenes = dict.fromkeys(SPLITS, 0)
    refs, sentences = dict(scenes), dict(scenes)
    kinds: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for record in records:
        for ref in record["refs"]:
            refs[ref["split"]] += 1
            for sentence in ref["sentences"]:
                sentences[ref["split"]] += 1
                counts = kinds[ref["split"]]
                counts[sentence["kind"]] = counts.get(sentence["kind"], 0) + 1
        scenes[record["image"]["file_name"].split("_")[0]] += 1
    return Summary(scenes=scenes, refs=refs, sentences=sentences, kinds=kinds)


def _write_json(path: Path, value: object) -> None:
    """Write through a temporary name, so that a file that is there is complete."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value), encoding="utf-8")
    os.replace(temporary, path)
