"""The training loop: resumable, one process, prints what it decided.

A run is a folder: ``state.pt`` (what a killed run resumes from), ``checkpoint.safetensors`` (the
trained weights), ``log.jsonl`` (a line per interval), ``curve.png``, ``recipe.json``.
"""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from rt_ris.errors import CheckpointError, OutputError, RecipeError
from rt_ris.spec import TOKEN_MASK
from rt_ris_train.architecture import Outputs, load
from rt_ris_train.checkpoint import (
    metadata_of,
    save_checkpoint,
    trained_state,
    write_atomically,
)
from rt_ris_train.data.features import Entry, FeatureStore, SplitTable
from rt_ris_train.data.refcoco import RefDataset
from rt_ris_train.losses import total_loss
from rt_ris_train.official import check_complete, load_official
from rt_ris_train.recipe import TrainRecipe

_LOG = logging.getLogger(__name__)
LOG_EVERY = 10
VALIDATION_PICTURES_AT_ONCE = 2


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the loop tells its caller after some steps.

    Attributes:
        step: steps done, resumed ones included.
        steps: steps in all.
        loss: mean since the last report.
        iou: overall IoU on the logit grid of the last batch, in points of 100.
        rate: sentences per second since the last report.
        validation: measures of a validation that has just ended, else None.
    """

    step: int
    steps: int
    loss: float
    iou: float
    rate: float
    validation: dict[str, float] | None = None


class Trainer:
    """One training run in a folder; ``run`` goes on from where the folder stands.

    Raises:
        RecipeError: the folder holds a run of another recipe.
        CheckpointError: the folder's state cannot be read.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        *,
        data: Path,
        out: Path,
        cache: Path | None = None,
        weights: Mapping[str, Path] | None = None,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        self.recipe, self.out = recipe, out
        variant = load(recipe.arch).variant(recipe.variant)
        tables = [SplitTable(RefDataset.open(data, split=split)) for split in ("train", "val")]
        torch.manual_seed(recipe.seed)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = variant.build()
        check_complete(self.network, weights or {}, published=variant.published)
        for imported in load_official(self.network, weights or {}):
            _LOG.info("%s", imported)
        self.network.to(self.device)
        # Nothing is written before everything that was given has been read.
        _make_folder(out)
        _same_recipe(recipe, out / "recipe.json")
        self.optimizer = _optimizer(self.network, recipe)
        self.step = 0
        self._resume()
        folder = cache or out / "features"
        self.train, self.val = (self._store(table, folder, progress) for table in tables)

    def run(self, report: Callable[[Report], None] = lambda report: None) -> Path:
        """Train to the end of the recipe and return the path of the checkpoint."""
        self.network.train()
        losses: list[float] = []
        began, seen = time.monotonic(), 0
        for images, rows in self._draws():
            loss, iou = self._one_step(images, rows)
            losses.append(loss)
            seen += len(rows)
            ended = self.step == self.recipe.steps
            if self.step % self.recipe.save_every == 0 or ended:
                self._save()
            validation = None
            if self.step % self.recipe.validate_every == 0 or ended:
                validation = self.validate()
            if self.step % LOG_EVERY == 0 or ended or validation:
                rate = seen / max(time.monotonic() - began, 1e-9)
                self._tell(report, float(np.mean(losses)), iou, rate, validation)
                losses, began, seen = [], time.monotonic(), 0
        return self.out / "checkpoint.safetensors"

    def validate(self) -> dict[str, float]:
        """Overall and mean IoU on the logit grid of the validation split, in points of 100."""
        self.network.eval()
        rows = _spread(len(self.val.table.entries), self.recipe.validate_sentences)
        groups: dict[int, list[int]] = {}
        for row in rows:
            groups.setdefault(self.val.table.entries[row].image, []).append(row)
        totals = np.zeros(2)
        per_sentence: list[float] = []
        right = 0
        with torch.no_grad():
            for image, members in groups.items():
                outputs, target, valid, present = self._forward(self.val, [image], members)
                inter, union = _overlap(outputs.logits, target, valid)
                totals += np.array([inter[present].sum().item(), union[present].sum().item()])
                per_sentence += (inter / union.clamp(min=1))[present].tolist()
                if outputs.existence is not None:
                    right += int(((outputs.existence > 0) == present).sum())
        self.network.train()
        found = {"oIoU": 100 * totals[0] / max(totals[1], 1), "mIoU": 100 * _mean(per_sentence)}
        return found | {"existence_accuracy": 100 * right / len(rows)}

    def _store(
        self, table: SplitTable, folder: Path, progress: Callable[[str, int, int], None]
    ) -> FeatureStore:
        store = FeatureStore(
            self.network,
            table,
            folder=folder,
            stored=self.recipe.cache_features,
            progress=progress,
        )
        self.network.eval()
        store.fill()
        return store

    def _draws(self) -> Iterator[tuple[list[int], list[int]]]:
        """Pictures and sentence rows of each remaining step; depends on the seed and step only."""
        table = self.train.table
        per_epoch = max(len(table.by_image) // self.recipe.images, 1)
        while self.step < self.recipe.steps:
            epoch, place = divmod(self.step, per_epoch)
            order = np.random.default_rng([self.recipe.seed, 1, epoch]).permutation(
                len(table.by_image)
            )
            images = order[place * self.recipe.images :][: self.recipe.images].tolist()
            draw = np.random.default_rng([self.recipe.seed, 2, self.step])
            rows = [
                row
                for image in images
                for row in draw.permutation(table.by_image[image])[: self.recipe.sentences].tolist()
            ]
            yield images, rows

    def _one_step(self, images: list[int], rows: list[int]) -> tuple[float, float]:
        rate = learning_rate(self.recipe, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        outputs, target, valid, present = self._forward(self.train, images, rows)
        loss = total_loss(outputs, target, valid, present, weights=self.recipe.loss)
        if not torch.isfinite(loss):
            raise RecipeError(
                f"The loss is {loss.item()} at step {self.step}; lower learning_rate, or switch "
                "bfloat16 off."
            )
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        if self.recipe.grad_clip:
            nn.utils.clip_grad_norm_(_trained(self.network), self.recipe.grad_clip)
        self.optimizer.step()
        self.step += 1
        with torch.no_grad():
            inter, union = _overlap(outputs.logits, target, valid)
        iou = 100 * inter[present].sum().item() / max(union[present].sum().item(), 1)
        return loss.item(), iou

    def _forward(
        self, store: FeatureStore, images: list[int], rows: list[int]
    ) -> tuple[Outputs, Tensor, Tensor, Tensor]:
        """Outputs, targets [N, h, w], valid cells [N, h, w] and presence [N] of some sentences."""
        entries: list[Entry] = [store.table.entries[row] for row in rows]
        texts = [entry.sentence for entry in entries]
        place = {image: index for index, image in enumerate(images)}
        index = torch.tensor([place[entry.image] for entry in entries])
        frozen = {
            stage: tuple(value.to(self.device) for value in values)
            for stage, values in store.frozen(images, texts).items()
        }
        values = {TOKEN_MASK: store.masks.read(texts).to(self.device)}
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.recipe.bfloat16):
            outputs = self.network.run(values, index.to(self.device), frozen=frozen)
        target = store.targets.read([entry.ref for entry in entries]).float() / 255
        valid = store.valid.read([entry.image for entry in entries]).float() / 255
        present = torch.tensor([entry.present for entry in entries])
        return outputs, target.to(self.device), valid.to(self.device), present.to(self.device)

    def _save(self) -> None:
        buffer = io.BytesIO()
        state = {
            "step": self.step,
            "network": trained_state(self.network),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, buffer)
        write_atomically(self.out / "state.pt", buffer.getvalue())
        metadata = metadata_of(
            architecture=self.recipe.arch,
            variant=self.recipe.variant,
            step=self.step,
            recipe=asdict(self.recipe),
        )
        save_checkpoint(self.out / "checkpoint.safetensors", self.network, metadata=metadata)

    def _resume(self) -> None:
        path = self.out / "state.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.network.load_state_dict(state["network"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = int(state["step"])
        except Exception as error:  # a damaged pickle fails in any way it likes
            raise CheckpointError(
                f"'{path}' cannot be resumed from ({error}); move the folder away to start anew."
            ) from error
        _LOG.info("resuming %s at step %d of %d", self.out, self.step, self.recipe.steps)

    def _tell(
        self,
        report: Callable[[Report], None],
        loss: float,
        iou: float,
        rate: float,
        validation: dict[str, float] | None,
    ) -> None:
        said = Report(
            step=self.step,
            steps=self.recipe.steps,
            loss=loss,
            iou=iou,
            rate=rate,
            validation=validation,
        )
        line = {**asdict(said), "learning_rate": learning_rate(self.recipe, self.step - 1)}
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        report(said)


def learning_rate(recipe: TrainRecipe, step: int) -> float:
    """The learning rate of a step, counted from 0."""
    warm = min((step + 1) / max(recipe.warmup_steps, 1), 1.0)
    if recipe.schedule == "step":
        return recipe.learning_rate * warm * (0.1 if step >= 0.6 * recipe.steps else 1.0)
    return recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))


def read_log(path: Path) -> list[dict[str, object]]:
    """The lines of a log, each step once: a resumed run repeats some, and the last one counts."""
    lines: dict[int, dict[str, object]] = {}
    for text in path.read_text("utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:  # the line that a power cut tore
            continue
        lines[line["step"]] = line
    return [lines[step] for step in sorted(lines)]


def _optimizer(network: nn.Module, recipe: TrainRecipe) -> torch.optim.Optimizer:
    decayed = [value for value in _trained(network) if value.ndim > 1]
    plain = [value for value in _trained(network) if value.ndim <= 1]
    groups = [
        {"params": decayed, "weight_decay": recipe.weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]
    made = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return made(groups, lr=recipe.learning_rate)


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [value for value in network.parameters() if value.requires_grad]


def _overlap(logits: Tensor, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
    """Intersection and union in cells, [N] each."""
    inside = valid > 0.5
    predicted = (logits > 0) & inside
    wanted = (target > 0.5) & inside
    return (predicted & wanted).sum((1, 2)), (predicted | wanted).sum((1, 2))


def _spread(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of ``count`` rows, evenly spread."""
    if count <= wanted:
        return list(range(count))
    return [round(place * (count - 1) / (wanted - 1)) for place in range(wanted)]


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"The folder of the run, '{path}', cannot be made ({error.strerror}); choose another "
            "one (--out)."
        ) from error


def _same_recipe(recipe: TrainRecipe, path: Path) -> None:
    wanted = json.dumps(asdict(recipe), indent=1, sort_keys=True)
    if path.exists() and path.read_text("utf-8") != wanted:
        raise RecipeError(
            f"'{path.parent}' holds a run of another recipe; choose another folder (--out), or "
            "move that one away."
        )
    write_atomically(path, wanted.encode())
