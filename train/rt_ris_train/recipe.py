"""How to train, as plain data: a TOML file whose unknown keys are errors."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rt_ris.errors import ManifestError, RecipeError
from rt_ris.records import from_data
from rt_ris_train.losses import LossWeights

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """One training run.

    Attributes:
        arch: architecture.
        variant: its size.
        tokens: length of sentences, special tokens included; None for the size's usual one.
        steps: optimiser steps in all; or give epochs.
        epochs: times that every unit is seen; or give steps.
        unit: what a step draws: ``picture``, with several sentences of each; ``ref``, with one
            random sentence of each; ``sentence``.
        images: units per step, of all processes together.
        sentences: sentences drawn per picture and step, where units are pictures.
        spread_absent: sentences without a target stand evenly among the others in an epoch, where
            units are sentences.
        learning_rate: the highest, reached after the warm-up.
        rate_factors: factor of the rate of parameters whose names begin so.
        warmup_steps: linear rise from zero.
        schedule: how the rate falls: ``cosine`` to zero, ``poly`` to zero by the power 0.9, or
            ``step``, a tenth from ``drop_at`` on.
        drop_at: share of the steps after which a ``step`` schedule drops.
        optimizer: ``adam`` or ``adamw``.
        betas: of the optimiser.
        weight_decay: of matrices; norms and biases have none.
        decay_vectors: norms and biases have it as well.
        undecayed: patterns of names of further parameters without decay, ``*`` for anything.
        grad_clip: largest norm of the gradient; 0 switches clipping off.
        loss: factor of each term.
        seed: of weights, order and draws.
        bfloat16: compute most operations in bfloat16.
        cache_features: store what frozen encoders give, once per picture and sentence.
        save_every: steps between states a killed run resumes from.
        validate_every: steps between validations.
        validate_sentences: sentences of the validation split that are used, evenly spread.
        validate_first: use the first sentence of each ref only.
        best: measure by which the best checkpoint is kept; None keeps the last one only.
    """

    arch: str
    variant: str
    tokens: int | None = None
    steps: int | None = None
    epochs: int | None = None
    unit: Literal["picture", "ref", "sentence"] = "picture"
    images: int = 4
    sentences: int = 4
    spread_absent: bool = False
    learning_rate: float = 1e-4
    rate_factors: Mapping[str, float] = field(default_factory=dict)
    warmup_steps: int = 200
    schedule: Literal["cosine", "step", "poly"] = "cosine"
    drop_at: float = 0.6
    optimizer: Literal["adam", "adamw"] = "adamw"
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    decay_vectors: bool = False
    undecayed: tuple[str, ...] = ()
    grad_clip: float = 1.0
    loss: LossWeights = field(default_factory=LossWeights)
    seed: int = 0
    bfloat16: bool = False
    cache_features: bool = True
    save_every: int = 100
    validate_every: int = 200
    validate_sentences: int = 400
    validate_first: bool = False
    best: Literal["oIoU", "mIoU"] | None = None

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.epochs is None):
            raise RecipeError("Give either steps or epochs, the length of the run; not both.")
        counts = ("images", "sentences", "save_every", "validate_every", "validate_sentences")
        for name in ("tokens", "steps", "epochs", *counts):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise RecipeError(f"{name} is {value}; it must be at least 1.")
        for name, value, low, high in (
            ("learning_rate", self.learning_rate, 1e-12, 10.0),
            ("warmup_steps", self.warmup_steps, 0, 10**9),
            ("drop_at", self.drop_at, 0.0, 1.0),
            ("weight_decay", self.weight_decay, 0.0, 1.0),
            ("grad_clip", self.grad_clip, 0.0, 1e9),
            ("seed", self.seed, 0, 2**31 - 1),
            *(("betas", beta, 0.0, 0.9999999) for beta in self.betas),
            *((f"rate_factors.{at}", by, 0.0, 1e6) for at, by in self.rate_factors.items()),
        ):
            if not low <= value <= high:
                raise RecipeError(f"{name} is {value}; accepted is {low} to {high}.")
        if self.spread_absent and self.unit != "sentence":
            raise RecipeError("spread_absent needs the unit 'sentence'; other units draw them.")
        _check_loss(self.loss)


def _check_loss(loss: LossWeights) -> None:
    factors = {
        "focal": loss.focal,
        "dice": loss.dice,
        "cross_entropy": loss.cross_entropy,
        "existence": loss.existence,
        **{f"auxiliary.{name}": factor for name, factor in loss.auxiliary.items()},
    }
    for name, factor in factors.items():
        if factor < 0:
            raise RecipeError(f"loss.{name} is {factor}; a factor is 0 or more.")
    if not any(factors.values()):
        raise RecipeError("Every factor of the loss is 0; give one of them a weight.")
    if loss.classes is not None and min(loss.classes) <= 0:
        raise RecipeError(f"loss.classes is {list(loss.classes)}; both weights are above 0.")


def read_recipe(path: Path) -> TrainRecipe:
    """Read a recipe from a TOML file.

    Raises:
        RecipeError: the file is missing or not TOML, or a key is unknown, missing or of a wrong
            type.
    """
    try:
        data = tomllib.loads(path.read_text("utf-8"))
    except FileNotFoundError as error:
        shipped = ", ".join(sorted(recipe.stem for recipe in shipped_recipes()))
        raise RecipeError(f"There is no recipe '{path}'; shipped ones: {shipped}.") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"'{path}' cannot be read as TOML: {error}.") from error
    try:
        return from_data(TrainRecipe, data)
    except ManifestError as error:
        raise RecipeError(f"Recipe '{path}': {error}") from error


def shipped_recipes() -> list[Path]:
    """The recipes that come with the package."""
    return sorted((Path(__file__).parent / "recipes").glob("*.toml"))


def find_recipe(name: str) -> Path:
    """The path of a shipped recipe by its stem, or the path as given."""
    for path in shipped_recipes():
        if path.stem == name:
            return path
    return Path(name)
