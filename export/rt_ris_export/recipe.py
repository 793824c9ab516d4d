"""What to export, as plain data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Final, Literal, get_args

from rt_ris.errors import RecipeError
from rt_ris_export.limits import LIMITS, Limits

Precision = Literal["fp32", "fp16"]
Remedy = Literal["none", "auto"]
Target = Literal["onnx", "onnxruntime"]
PRECISIONS: Final[tuple[str, ...]] = get_args(Precision)
TARGETS: Final[tuple[str, ...]] = get_args(Target)
REMEDIES: Final[tuple[str, ...]] = get_args(Remedy)


@dataclass(frozen=True, kw_only=True)
class ExportRecipe:
    """One export.

    Attributes:
        arch: name of an architecture.
        variant: one of its variants; None for its default.
        checkpoint: trained weights; None for those that ship with the variant, or seeded random
            ones where none ship.
        weights: published files of frozen encoders by label, such as ``sam``.
        out: the bundle to write; None for ``./<arch>-<variant>.bundle``.
        precision: arithmetic of the graphs.
        target: what the graphs are made for: ``onnx`` any runtime and builder, ``onnxruntime``
            that one on a processor, in float32.
        remedy: ``auto`` computes more of a stage that misses the gate in float32, and records what
            it took; ``none`` fails.
        tolerance: the gate on every stage output, as a relative error, alone and in the chain;
            None for the precision's own (``limits``).
        gate: data in RefCOCO's format whose pictures and sentences the gate takes, for a network
            that knows nothing on the shipped photographs; None for those.
        gate_split: split of ``gate``.
        overwrite: replace a bundle that is already at ``out``.

    Raises:
        RecipeError: a value that is not accepted.
    """

    arch: str
    variant: str | None = None
    checkpoint: Path | None = None
    weights: Mapping[str, Path] = field(default_factory=dict)
    out: Path | None = None
    precision: Precision = "fp32"
    target: Target = "onnx"
    remedy: Remedy = "none"
    tolerance: float | None = None
    gate: Path | None = None
    gate_split: str = "test"
    overwrite: bool = False

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("target", self.target, TARGETS)
        _one_of("remedy", self.remedy, REMEDIES)
        if (self.target, self.precision) == ("onnxruntime", "fp16"):
            raise RecipeError(
                "Half precision is for engines, whose builders do not read graphs for onnxruntime. "
                "Leave --precision fp16 out, or take --target onnx."
            )
        if self.tolerance is not None and not 0 < self.tolerance <= 0.1:
            raise RecipeError(
                f"tolerance is {self.tolerance}; accepted is a relative error above 0 and up to "
                f"0.1, such as {LIMITS[self.precision].tolerance}."
            )

    def limits(self) -> Limits:
        """What the gate allows."""
        limits = LIMITS[self.precision]
        if self.tolerance is None:
            return limits
        return replace(limits, alone=self.tolerance, tolerance=self.tolerance)

    @classmethod
    def from_mapping(cls, data: Mapping[str, object]) -> ExportRecipe:
        """A recipe from plain data, such as a TOML table; paths are strings there.

        Raises:
            RecipeError: an unknown key, a missing one or a value of the wrong type.
        """
        known = [entry.name for entry in fields(cls)]
        for key, value in data.items():
            if key not in known:
                raise RecipeError(f"Unknown key '{key}'; known are {', '.join(known)}.")
            kinds = _KINDS.get(key, (str,))
            if type(value) not in kinds:
                accepted = " or ".join(kind.__name__ for kind in kinds)
                raise RecipeError(f"Key '{key}' is {value!r}; accepted is {accepted}.")
        if "arch" not in data:
            raise RecipeError("Key 'arch' is missing; name the architecture to export.")
        return cls(**{key: _converted(key, value) for key, value in data.items()})

    def output(self, variant: str) -> Path:
        """Where the bundle goes, once the variant is known."""
        return Path(f"{self.arch}-{variant}.bundle") if self.out is None else self.out


_PATHS: Final = frozenset({"checkpoint", "out", "gate"})
_KINDS: Final[Mapping[str, tuple[type, ...]]] = {
    "tolerance": (float, int),
    "overwrite": (bool,),
    "weights": (dict,),
}


def _converted(key: str, value: Any) -> Any:  # noqa: ANN401 # its type was checked by the caller
    if key in _PATHS:
        return Path(value)
    if key == "weights":
        return {label: Path(path) for label, path in value.items()}
    return value


def _one_of(name: str, value: str, accepted: tuple[str, ...]) -> None:
    if value not in accepted:
        raise RecipeError(
            f"{name} is {value!r}; this version of rt-ris exports {', '.join(accepted)} only."
        )
