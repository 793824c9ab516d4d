"""How to train, as plain data: a TOML file whose unknown keys are errors."""

from __future__ import annotations

import sys
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
        steps: optimiser steps in all.
        images: pictures per step.
        sentences: sentences drawn per picture and step.
        learning_rate: the highest, reached after the warm-up.
        warmup_steps: linear rise from zero.
        schedule: how the rate falls: ``cosine`` to zero, or ``step``, a tenth from 60 % on.
        optimizer: ``adam`` or ``adamw``.
        weight_decay: of matrices; norms and biases have none.
        grad_clip: largest norm of the gradient; 0 switches clipping off.
        loss: factor of each term.
        seed: of weights, order and draws.
        bfloat16: compute most operations in bfloat16.
        cache_features: store what frozen encoders give, once per picture and sentence.
        save_every: steps between states a killed run resumes from.
        validate_every: steps between validations.
        validate_sentences: sentences of the validation split that are used.
    """

    arch: str
    variant: str
    steps: int
    images: int = 4
    sentences: int = 4
    learning_rate: float = 1e-4
    warmup_steps: int = 200
    schedule: Literal["cosine", "step"] = "cosine"
    optimizer: Literal["adam", "adamw"] = "adamw"
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    loss: LossWeights = field(default_factory=LossWeights)
    seed: int = 0
    bfloat16: bool = False
    cache_features: bool = True
    save_every: int = 100
    validate_every: int = 200
    validate_sentences: int = 400

    def __post_init__(self) -> None:
        for name in ("steps", "images", "sentences", "save_every", "validate_every"):
            if getattr(self, name) < 1:
                raise RecipeError(f"{name} is {getattr(self, name)}; it must be at least 1.")
        if self.learning_rate <= 0:
            raise RecipeError(f"learning_rate is {self.learning_rate}; it must be above 0.")


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
