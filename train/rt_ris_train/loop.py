"""The training loop: resumable, on one process or several, prints what it decided.

A run is a folder: ``state.pt`` (what a killed run resumes from), ``checkpoint.safetensors`` (the
trained weights), ``best.safetensors`` (where the recipe names a measure), ``log.jsonl`` (a line per
interval), ``curve.png``, ``recipe.json``.
"""

from __future__ import annotations

import io
import json
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from rt_ris.errors import CheckpointError, OutputError, RecipeError
from rt_ris.mask import logit
from rt_ris.records import to_data
from rt_ris.spec import EXISTENCE
from rt_ris_train.architecture import Outputs, load
from rt_ris_train.checkpoint import (
    metadata_of,
    save_checkpoint,
    start_from,
    trained_state,
    write_atomically,
)
from rt_ris_train.data import TrainingData
from rt_ris_train.data.features import Entry, FeatureStore, SplitTable
from rt_ris_train.draws import check_shares, rows_of, total_steps, validation_rows
from rt_ris_train.losses import Target, total_loss
from rt_ris_train.official import check_complete, load_official
from rt_ris_train.parallel import (
    add_gradients,
    first_alone,
    processes,
    rank,
    share_batch_norms,
    total,
)
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
        RecipeError: the folder holds a run of another recipe, or on other data.
        CheckpointError: the folder's state cannot be read.
    """

    def __init__(
        self,
        recipe: TrainRecipe,
        *,
        data: TrainingData,
        out: Path,
        cache: Path | None = None,
        weights: Mapping[str, Path] | None = None,
        init: Path | None = None,
        progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    ) -> None:
        self.recipe, self.out = recipe, out
        variant = load(recipe.arch).variant(recipe.variant)
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.network = variant.network(tokens=recipe.tokens)
        field = self.network.text.field
        tables = [SplitTable(dataset, field=field) for dataset in (data.train, data.val)]
        given = weights or {}
        for imported in load_official(self.network, given):
            _LOG.info("%s", imported)
        if init is not None:
            start_from(
                self.network, init, arch=recipe.arch, variant=recipe.variant, weights=given.keys()
            )
        else:
            check_complete(self.network, given, published=variant.published)
        self.network.to(self.device)
        share_batch_norms(self.network)
        check_shares(recipe, tables[0])
        self.network.tokenizer_json()
        # Nothing is written before everything that was given has been read.
        if rank() == 0:
            _make_folder(out)
            _same_run(_plain(recipe), out / "recipe.json", what="recipe")
            digests = [table.digest for table in tables]
            _same_run({"train": digests[0], "val": digests[1]}, out / "data.json", what="data")
        self.optimizer = _optimizer(self.network, recipe)
        self.steps = total_steps(recipe, tables[0])
        self.step = 0
        self.best = 0.0
        self._resume()
        folder = cache or out / "features"
        with first_alone():
            self.train, self.val = (self._store(table, folder, progress) for table in tables)

    def run(self, report: Callable[[Report], None] = lambda report: None) -> Path:
        """Train to the end of the recipe and return the path of the checkpoint."""
        self.network.train()
        losses: list[float] = []
        began, seen = time.monotonic(), 0
        while self.step < self.steps:
            rows = rows_of(self.recipe, self.train.table, self.step)
            loss, iou = self._one_step(rows)
            losses.append(loss)
            seen += len(rows)
            ended = self.step == self.steps
            validation = None
            if self.step % self.recipe.validate_every == 0 or ended:
                validation = self.validate()
                self._keep_best(validation)
            if self.step % self.recipe.save_every == 0 or ended:
                self._save()  # after the validation, so that a resumed run knows the best so far
            if self.step % LOG_EVERY == 0 or ended or validation:
                rate = processes() * seen / max(time.monotonic() - began, 1e-9)
                self._tell(report, float(np.mean(losses)), iou, rate, validation)
                losses, began, seen = [], time.monotonic(), 0
        return self.out / "checkpoint.safetensors"

    def validate(self) -> dict[str, float]:
        """Overall and mean IoU of the validation split, where the loss compares, in percent."""
        self.network.eval()
        rows = validation_rows(self.recipe, self.val.table)
        groups: dict[int, list[int]] = {}
        for row in rows:
            groups.setdefault(self.val.table.entries[row].image, []).append(row)
        totals = np.zeros(2)
        per_sentence: list[float] = []
        right = 0
        with torch.no_grad():
            for members in groups.values():
                outputs, target, _ = self._forward(self.val, members, training=False)
                present = target.present
                inter, union = _overlap(outputs.logits, target, self.cut)
                totals += np.array([inter[present].sum().item(), union[present].sum().item()])
                per_sentence += (inter / union.clamp(min=1))[present].tolist()
                if outputs.existence is not None:
                    right += int(((outputs.existence > 0) == present).sum())
        self.network.train()
        found = {"oIoU": 100 * totals[0] / max(totals[1], 1), "mIoU": 100 * _mean(per_sentence)}
        if EXISTENCE in self.network.graph().values:
            found["existence_accuracy"] = 100 * right / len(rows)
        return found

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

    @property
    def cut(self) -> float:
        """The logit above which a cell belongs to the mask."""
        return logit(self.network.mask.threshold)

    def _one_step(self, rows: list[int]) -> tuple[float, float]:
        rate = learning_rate(self.recipe, self.step, steps=self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["factor"]
        # What is dropped at random depends on the step, so that a resumed run drops the same, and
        # on the process.
        torch.manual_seed((self.recipe.seed * 1_000_003 + self.step) * 1024 + rank())
        outputs, target, auxiliary = self._forward(self.train, rows, training=True)
        loss = total_loss(outputs, self._supervised(target), weights=self.recipe.loss)
        for name, factor in self.recipe.loss.auxiliary.items():
            if name not in auxiliary:
                known = ", ".join(auxiliary) or "none"
                raise RecipeError(f"loss.auxiliary has '{name}'; this network brings {known}.")
            # A mean over the sentences of a process, as the authors have it on several devices.
            loss = loss + factor * auxiliary[name] / processes()
        self._descend(loss)
        with torch.no_grad():
            inter, union = _overlap(outputs.logits, target, self.cut)
            present = target.present
            counts = total(torch.stack((inter[present].sum(), union[present].sum())).float())
        return total(loss.detach()).item(), 100 * (counts[0] / counts[1].clamp(min=1)).item()

    def _descend(self, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise RecipeError(
                f"The loss is {loss.item()} at step {self.step}; lower learning_rate, or switch "
                "bfloat16 off."
            )
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        add_gradients(_trained(self.network))
        if self.recipe.grad_clip:
            nn.utils.clip_grad_norm_(_trained(self.network), self.recipe.grad_clip)
        self.optimizer.step()
        self.step += 1

    def _forward(
        self, store: FeatureStore, rows: list[int], *, training: bool
    ) -> tuple[Outputs, Target, Mapping[str, Tensor]]:
        """Outputs of some sentences where the loss compares, their targets, further losses."""
        entries: list[Entry] = [store.table.entries[row] for row in rows]
        texts = [entry.sentence for entry in entries]
        images = list(dict.fromkeys(entry.image for entry in entries))
        place = {image: index for index, image in enumerate(images)}
        index = torch.tensor([place[entry.image] for entry in entries]).to(self.device)
        frozen = {
            stage: tuple(value.to(self.device) for value in values)
            for stage, values in store.frozen(images, texts).items()
        }
        made = store.values(images, texts, seed=self.recipe.seed if training else None)
        values = {name: value.to(self.device) for name, value in made.items()}
        present = torch.tensor([entry.present for entry in entries]).to(self.device)
        with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.recipe.bfloat16):
            if training:
                outputs, auxiliary = self.network.training_run(
                    values, index, present=present, frozen=frozen
                )
            else:
                outputs, auxiliary = self.network.run(values, index, frozen=frozen), {}
        share, valid = store.target(
            [entry.ref for entry in entries], [entry.image for entry in entries]
        )
        target = Target(share=share.to(self.device), valid=valid.to(self.device), present=present)
        return self._compared(outputs), target, auxiliary

    def _compared(self, outputs: Outputs) -> Outputs:
        """With the logits on the input, where the network is supervised there."""
        if self.network.supervision.at == "grid":
            return outputs
        upsample = self.network.mask.upsample
        logits = functional.interpolate(
            outputs.logits.float()[:, None],
            size=self.network.image.size,
            mode="bicubic" if upsample == "bicubic_corners" else "bilinear",
            align_corners=upsample != "bilinear",
        )[:, 0]
        return replace(outputs, logits=logits)

    def _supervised(self, target: Target) -> Target:
        """What the loss looks at; the measures always look at the picture alone."""
        if self.network.supervision.padding == "left_out":
            return target
        return replace(target, valid=torch.ones_like(target.valid))

    def _keep_best(self, validation: Mapping[str, float]) -> None:
        measure = self.recipe.best
        if measure is not None and validation[measure] > self.best and rank() == 0:
            self.best = validation[measure]
            self._write_checkpoint("best.safetensors")

    def _write_checkpoint(self, name: str) -> None:
        metadata = metadata_of(
            architecture=self.recipe.arch,
            variant=self.recipe.variant,
            step=self.step,
            recipe=_plain(self.recipe),
        )
        save_checkpoint(self.out / name, self.network, metadata=metadata)

    def _save(self) -> None:
        if rank():
            return
        buffer = io.BytesIO()
        state = {
            "step": self.step,
            "best": self.best,
            "network": trained_state(self.network),
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, buffer)
        write_atomically(self.out / "state.pt", buffer.getvalue())
        self._write_checkpoint("checkpoint.safetensors")

    def _resume(self) -> None:
        path = self.out / "state.pt"
        if not path.exists():
            return
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            self.network.load_state_dict(state["network"], strict=False)
            self.optimizer.load_state_dict(state["optimizer"])
            self.step, self.best = int(state["step"]), float(state["best"])
        except Exception as error:  # a damaged pickle fails in any way it likes
            raise CheckpointError(
                f"'{path}' cannot be resumed from ({error}); move the folder away to start anew."
            ) from error
        _LOG.info("resuming %s at step %d of %d", self.out, self.step, self.steps)

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
            steps=self.steps,
            loss=loss,
            iou=iou,
            rate=rate,
            validation=validation,
        )
        if rank():
            return
        rate_now = learning_rate(self.recipe, self.step - 1, steps=self.steps)
        line = {**asdict(said), "learning_rate": rate_now}
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(line) + "\n")
        report(said)


def learning_rate(recipe: TrainRecipe, step: int, *, steps: int) -> float:
    """The learning rate of a step, counted from 0, of so many."""
    warm = recipe.learning_rate * min((step + 1) / max(recipe.warmup_steps, 1), 1.0)
    if recipe.schedule == "step":
        return warm * (0.1 if step >= recipe.drop_at * steps else 1.0)
    if recipe.schedule == "poly":
        return float(warm * (1 - step / steps) ** 0.9)
    return warm * 0.5 * (1 + math.cos(math.pi * step / steps))


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
    """Groups by the factor of their rate and by whether they decay."""
    groups: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, value in network.named_parameters():
        if value.requires_grad:
            begins = (by for at, by in recipe.rate_factors.items() if name.startswith(at))
            decays = value.ndim > 1 or recipe.decay_vectors
            decays = decays and not any(fnmatchcase(name, part) for part in recipe.undecayed)
            groups.setdefault((next(begins, 1.0), decays), []).append(value)
    listed = [
        {
            "params": values,
            "factor": factor,
            "weight_decay": recipe.weight_decay if decays else 0.0,
        }
        for (factor, decays), values in groups.items()
    ]
    made = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.Adam
    return made(listed, lr=recipe.learning_rate, betas=recipe.betas)


def _trained(network: nn.Module) -> list[nn.Parameter]:
    return [value for value in network.parameters() if value.requires_grad]


def _overlap(logits: Tensor, target: Target, cut: float) -> tuple[Tensor, Tensor]:
    """Intersection and union in cells, [N] each."""
    inside = target.valid > 0.5
    predicted = (logits > cut) & inside
    wanted = (target.share > 0.5) & inside
    return (predicted & wanted).sum((1, 2)), (predicted | wanted).sum((1, 2))


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


def _plain(recipe: TrainRecipe) -> dict[str, object]:
    """A recipe as plain data."""
    data = to_data(recipe)
    assert isinstance(data, dict)
    return data


def _same_run(content: Mapping[str, object], path: Path, *, what: str) -> None:
    wanted = json.dumps(content, indent=1, sort_keys=True)
    if path.exists() and path.read_text("utf-8") != wanted:
        raise RecipeError(
            f"'{path.parent}' holds a run of another {what}; choose another folder (--out), or "
            "move that one away."
        )
    write_atomically(path, wanted.encode())
