"""What training reads: targets on the logit grid, and stored results of frozen encoders.

Frozen encoders give the same tensors at every epoch, so they run once per picture and once per
sentence; the results lie in memory-mapped ``.npy`` files in half precision. A cache belongs to
one network, one data set and one split; ``index.json`` says how much of it is filled, so that
a killed run goes on where it stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from rt_ris.image import Prepared, fit_box, prepare
from rt_ris.spec import (
    PIXELS,
    TOKEN_IDS,
    TOKEN_MASK,
    VALID_BOX,
    Dependency,
    ImageSpec,
    SentenceField,
)
from rt_ris.text import Tokenizer
from rt_ris.warp import affine, fit_axis
from rt_ris_train.architecture import ReferringNetwork, Stage, device_of
from rt_ris_train.checkpoint import write_atomically
from rt_ris_train.data.refcoco import Ref, RefDataset

Progress = Callable[[str, int, int], None]
IMAGES_AT_ONCE = 4
SENTENCES_AT_ONCE = 64


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One sentence of a split.

    Attributes:
        image: row of the picture.
        ref: row of the ref.
        sentence: row of the sentence's text.
        kind: what the sentence tests, where the data say so.
        present: it has a target.
    """

    image: int
    ref: int
    sentence: int
    kind: str | None
    present: bool


class SplitTable:
    """The pictures, refs and distinct texts of a split, each with a row number."""

    def __init__(self, dataset: RefDataset, *, field: SentenceField = "sent") -> None:
        self.dataset = dataset
        image_rows: dict[int, int] = {}
        text_rows: dict[str, int] = {}
        self.first_ref: list[Ref] = []
        self.entries: list[Entry] = []
        for row, ref in enumerate(dataset.refs):
            if ref.image_id not in image_rows:
                image_rows[ref.image_id] = len(image_rows)
                self.first_ref.append(ref)
            for sentence in ref.sentences:
                said = sentence.raw if field == "raw" else sentence.text
                text = text_rows.setdefault(said, len(text_rows))
                self.entries.append(
                    Entry(
                        image=image_rows[ref.image_id],
                        ref=row,
                        sentence=text,
                        kind=sentence.kind,
                        present=not ref.no_target,
                    )
                )
        self.digest = dataset.digest()
        self.texts = list(text_rows)
        self.by_image: list[list[int]] = [[] for _ in image_rows]
        self.by_ref: list[list[int]] = [[] for _ in dataset.refs]
        for index, entry in enumerate(self.entries):
            self.by_image[entry.image].append(index)
            self.by_ref[entry.ref].append(index)


class Rows:
    """A memory-mapped array filled row by row, with a durable count of the rows that are done."""

    def __init__(self, folder: Path, name: str, *, count: int) -> None:
        self.path = folder / f"{name}.npy"
        self.mark = folder / f"{name}.done"
        self.count = count
        self.done = int(self.mark.read_text()) if self.mark.exists() and self.path.exists() else 0
        self.array: npt.NDArray[np.generic] | None = None
        if self.done:
            self.array = np.lib.format.open_memmap(self.path, mode="r+")

    def write(self, start: int, values: npt.NDArray[np.generic]) -> None:
        """Fill rows from ``start`` on, making the file at the first call."""
        if self.array is None:
            shape = (self.count, *values.shape[1:])
            self.array = np.lib.format.open_memmap(
                self.path, mode="w+", dtype=values.dtype, shape=shape
            )
        self.array[start : start + len(values)] = values

    def commit(self, done: int) -> None:
        """Record that the first ``done`` rows are complete and on disk."""
        if isinstance(self.array, np.memmap):
            self.array.flush()
        write_atomically(self.mark, str(done).encode())
        self.done = done

    def read(self, rows: Sequence[int]) -> Tensor:
        """Rows as a tensor, halves widened to float32."""
        assert self.array is not None
        values = np.ascontiguousarray(self.array[list(rows)])
        tensor = torch.from_numpy(values)
        return tensor.float() if tensor.dtype == torch.float16 else tensor


class FeatureStore:
    """Frozen features, token masks and targets of one split."""

    def __init__(
        self,
        network: ReferringNetwork,
        table: SplitTable,
        *,
        folder: Path,
        stored: bool,
        progress: Progress,
    ) -> None:
        self.network, self.table, self.progress = network, table, progress
        self.stored = stored
        self.folder = folder / _fingerprint(network, table)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.tokenizer = Tokenizer(network.tokenizer_json().encode(), network.text)
        self.image_stages = _split_stages(network, Dependency.IMAGE)
        self.text_stages = _split_stages(network, Dependency.TEXT)
        self.images = [self._rows("image", stage) for stage in self.image_stages] if stored else []
        self.texts = [self._rows("text", stage) for stage in self.text_stages] if stored else []
        self.masks = Rows(self.folder, "token_mask", count=len(table.texts))
        self.targets = Rows(self.folder, "targets", count=len(table.dataset.refs))
        self.valid = Rows(self.folder, "valid", count=len(table.by_image))
        self.on_grid = network.supervision.at == "grid"
        read = {spec.name for stage in self._open_stages() for spec in stage.spec.inputs}
        self.reads_pixels = bool(read & {PIXELS, VALID_BOX})

    def fill(self) -> None:
        """Compute what is missing; may be killed and called again."""
        with torch.no_grad():
            if self.images:
                self._fill_images()
            if self.texts:
                self._fill_texts()
            self._fill_token_masks()
            if self.on_grid:
                self._fill_targets()

    def values(
        self, images: Sequence[int], texts: Sequence[int], *, seed: int | None
    ) -> dict[str, Tensor]:
        """The external inputs of stages that are not stored, and what only training reads.

        Args:
            images: rows of pictures.
            texts: rows of sentences.
            seed: of what ``training_text`` draws; None for a validation, which reads none.
        """
        tokens = self.tokenizer.encode([self.table.texts[row] for row in texts])
        found = {TOKEN_IDS: tokens.token_ids, TOKEN_MASK: tokens.token_mask}
        if seed is not None:
            found |= self.network.training_text(tokens, seed=seed)
        made = {name: torch.from_numpy(array) for name, array in found.items()}
        if self.reads_pixels:
            made |= self._image_values([self._prepared(row) for row in images])
        return made

    def target(self, refs: Sequence[int], images: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Shares of cells that masks cover and that pictures cover, float32 [N, h, w] each.

        Args:
            refs: rows of N refs.
            images: rows of their N pictures.
        """
        if self.on_grid:
            return self.targets.read(refs).float() / 255, self.valid.read(images).float() / 255
        side = self.network.image.size
        masks = [self._input_mask(self.table.dataset.mask(self._ref(row))) for row in refs]
        boxes = [
            fit_box(*self.table.dataset.size(self._ref(row)), self.network.image) for row in refs
        ]
        valid = torch.zeros(len(refs), side, side)
        for number, box in enumerate(boxes):
            valid[number, box.top : box.bottom, box.left : box.right] = 1
        return torch.from_numpy(np.stack(masks)), valid

    def _ref(self, row: int) -> Ref:
        return self.table.dataset.refs[row]

    def _input_mask(self, mask: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
        """A mask on the S x S input, by its nearest pixels."""
        spec = self.network.image
        box = fit_box(mask.shape[0], mask.shape[1], spec)
        resized = Image.fromarray(mask).resize((box.width, box.height), Image.Resampling.NEAREST)
        placed = np.zeros((spec.size, spec.size), dtype=np.float32)
        placed[box.top : box.bottom, box.left : box.right] = np.asarray(resized)
        return placed

    def _open_stages(self) -> list[Stage]:
        """The stages that are run whole in training."""
        split = {stage.spec.id for stage in (*self.image_stages, *self.text_stages)}
        return [stage for stage in self.network.stages() if stage.spec.id not in split]

    def frozen(self, images: Sequence[int], texts: Sequence[int]) -> dict[str, tuple[Tensor, ...]]:
        """Results of ``StageModule.frozen`` by stage id, stored ones or computed now."""
        if not self.stored:
            return self._computed(images, texts)
        found = {
            stage.spec.id: tuple(rows.read(images) for rows in group)
            for stage, group in zip(self.image_stages, self.images, strict=True)
        }
        for stage, group in zip(self.text_stages, self.texts, strict=True):
            found[stage.spec.id] = tuple(rows.read(texts) for rows in group)
        return found

    def _computed(
        self, images: Sequence[int], texts: Sequence[int]
    ) -> dict[str, tuple[Tensor, ...]]:
        with torch.no_grad():
            values = self._image_values([self._prepared(row) for row in images])
            values |= self._text_values([self.table.texts[row] for row in texts])
            return {
                stage.spec.id: stage.module.frozen(
                    *(values[spec.name] for spec in stage.spec.inputs)
                )
                for stage in (*self.image_stages, *self.text_stages)
            }

    def _rows(self, kind: str, stage: Stage) -> list[Rows]:
        """One array for each tensor that the stage's frozen part gives."""
        count = len(self.table.by_image) if kind == "image" else len(self.table.texts)
        probe = self._probe(kind, stage)
        return [
            Rows(self.folder, f"{stage.spec.id}.{index}", count=count) for index in range(probe)
        ]

    def _probe(self, kind: str, stage: Stage) -> int:
        with torch.no_grad():
            if kind == "image":
                values = self._image_values([self._prepared(0)])
            else:
                values = self._text_values([self.table.texts[0]])
            return len(stage.module.frozen(*(values[spec.name] for spec in stage.spec.inputs)))

    def _prepared(self, row: int) -> Prepared:
        return prepare(self.table.dataset.image(self.table.first_ref[row]), self.network.image)

    def _image_values(self, pictures: Sequence[Prepared]) -> dict[str, Tensor]:
        device = device_of(self.network)
        pixels = np.concatenate([picture.pixels for picture in pictures])
        boxes = np.concatenate([picture.valid_box for picture in pictures])
        return {
            PIXELS: torch.from_numpy(pixels).to(device),
            VALID_BOX: torch.from_numpy(boxes).to(device),
        }

    def _text_values(self, texts: Sequence[str]) -> dict[str, Tensor]:
        device = device_of(self.network)
        tokens = self.tokenizer.encode(texts)
        return {
            TOKEN_IDS: torch.from_numpy(tokens.token_ids).to(device),
            TOKEN_MASK: torch.from_numpy(tokens.token_mask).to(device),
        }

    def _fill_images(self) -> None:
        total = len(self.table.by_image)
        done = min(rows.done for group in self.images for rows in group)
        for start, rows_at in _chunks(done, total, size=IMAGES_AT_ONCE):
            values = self._image_values([self._prepared(row) for row in rows_at])
            self._store(self.image_stages, self.images, values, start)
            if start // IMAGES_AT_ONCE % 16 == 15 or rows_at[-1] == total - 1:
                _commit(self.images, rows_at[-1] + 1)
                self.progress("encoding pictures", rows_at[-1] + 1, total)

    def _fill_texts(self) -> None:
        total = len(self.table.texts)
        done = min(rows.done for group in self.texts for rows in group)
        for start, rows_at in _chunks(done, total, size=SENTENCES_AT_ONCE):
            values = self._text_values([self.table.texts[row] for row in rows_at])
            self._store(self.text_stages, self.texts, values, start)
            if start // SENTENCES_AT_ONCE % 8 == 7 or rows_at[-1] == total - 1:
                _commit(self.texts, rows_at[-1] + 1)
                self.progress("encoding sentences", rows_at[-1] + 1, total)

    def _fill_token_masks(self) -> None:
        for start, rows_at in _chunks(self.masks.done, self.masks.count, size=1024):
            tokens = self.tokenizer.encode([self.table.texts[row] for row in rows_at])
            self.masks.write(start, tokens.token_mask)
            self.masks.commit(rows_at[-1] + 1)

    def _store(
        self,
        stages: Sequence[Stage],
        groups: Sequence[Sequence[Rows]],
        values: dict[str, Tensor],
        start: int,
    ) -> None:
        for stage, group in zip(stages, groups, strict=True):
            made = stage.module.frozen(*(values[spec.name] for spec in stage.spec.inputs))
            for rows, tensor in zip(group, made, strict=True):
                rows.write(start, _halved(tensor))

    def _fill_targets(self) -> None:
        refs = self.table.dataset.refs
        spec, cells = self.network.image, self.network.mask.size
        nearest = self.network.supervision.target == "nearest"
        total = len(refs)
        for start, rows_at in _chunks(min(self.targets.done, total), total, size=64):
            grids = [
                target_grid(self.table.dataset.mask(refs[row]), spec, cells, nearest=nearest)
                for row in rows_at
            ]
            self.targets.write(start, np.stack(grids))
            self.targets.commit(rows_at[-1] + 1)
            self.progress("drawing targets", rows_at[-1] + 1, total)
        for start, rows_at in _chunks(self.valid.done, self.valid.count, size=256):
            sizes = [self.table.dataset.size(self.table.first_ref[row]) for row in rows_at]
            full = [target_grid(np.ones(size, dtype=bool), spec, cells) for size in sizes]
            self.valid.write(start, np.stack(full))
            self.valid.commit(rows_at[-1] + 1)


def target_grid(
    mask: npt.NDArray[np.bool_], spec: ImageSpec, cells: int, *, nearest: bool = False
) -> npt.NDArray[np.uint8]:
    """The share of each logit cell that a mask covers, or the mask at the cell's first pixel.

    Args:
        mask: bool [H, W] at the picture's own size.
        spec: how the picture is prepared; the mask takes the same way, on an empty ground, a warp's
            with two neighbours instead of four (CRIS, ETRIS: ``INTER_LINEAR``).
        cells: h = w of the logit grid.
        nearest: take one pixel of each cell, as PyTorch's nearest interpolation does.

    Returns:
        uint8 [h, w], 255 for a cell that is covered wholly.
    """
    grey = mask.astype(np.uint8) * 255
    if spec.fit == "warp":
        placed = _warped(grey, spec.size)
    else:
        empty = replace(spec, fill=(0, 0, 0))
        placed = prepare(np.repeat(grey[..., None], 3, axis=2), empty).pixels[0, :, :, 0]
    block = spec.size // cells
    if nearest:
        return np.ascontiguousarray(placed[::block, ::block])
    means = placed.reshape(cells, block, cells, block).mean(axis=(1, 3))
    rounded: npt.NDArray[np.uint8] = np.round(means).astype(np.uint8)
    return rounded


def _warped(grey: npt.NDArray[np.uint8], side: int) -> npt.NDArray[np.uint8]:
    """OpenCV's ``warpAffine(flags=INTER_LINEAR)`` to uint8 [S, S], zeros outside the picture."""
    values, longest = grey.astype(np.float32), max(grey.shape)
    for rows in (True, False):  # the columns after turning
        length = len(values)
        scale, first = fit_axis(length, side, longest=longest)
        taps = affine(length, side, scale=1 / scale, offset=-first / scale, rows=rows, linear=True)
        values = taps.apply(values).T
    return np.rint(values).astype(np.uint8)


def _halved(tensor: Tensor) -> npt.NDArray[np.generic]:
    values = tensor.half() if tensor.dtype == torch.float32 else tensor
    array: npt.NDArray[np.generic] = values.cpu().numpy()
    return array


def _commit(groups: Sequence[Sequence[Rows]], done: int) -> None:
    for group in groups:
        for rows in group:
            rows.commit(done)


def _chunks(start: int, stop: int, *, size: int) -> Iterator[tuple[int, range]]:
    for first in range(start, stop, size):
        yield first, range(first, min(first + size, stop))


def _split_stages(network: ReferringNetwork, dependency: Dependency) -> list[Stage]:
    graph = network.graph()
    return [
        stage
        for stage in network.stages()
        if stage.module.splits and graph.dependency(stage.spec.id) is dependency
    ]


def _fingerprint(network: ReferringNetwork, table: SplitTable) -> str:
    """Changes with the frozen weights' shape and sums, the specs, the split and its masks."""
    digest = hashlib.sha256()
    for spec in (network.image, network.text, network.mask.size, network.supervision):
        digest.update(repr(spec).encode())
    for name, value in network.named_parameters():
        if not value.requires_grad:
            digest.update(f"{name} {tuple(value.shape)} {float(value.double().sum()):.9g}".encode())
    digest.update(f"{table.dataset.name} {table.digest}".encode())
    return digest.hexdigest()[:16]
