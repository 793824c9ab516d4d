"""Weight files that others publish, read without running anything from them.

Taken are safetensors files and ``torch.save`` files that hold tensors only: a state dict, or one
under ``state_dict`` or ``model``. Every name goes through an explicit map; a missing or unknown
tensor is an error that names the nearest expected ones.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors.torch import load_file
from torch import Tensor

from rt_ris.errors import CheckpointError
from rt_ris_train.architecture import OfficialFile, ReferringNetwork

CONTAINERS: Final = ("state_dict", "model")
WRAPPER: Final = "module."


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What a published file gave.

    Attributes:
        label: the name the user gave the file.
        sha256: of the file.
        taken: number of tensors that went into the network.
        dropped: number of tensors by the prefix that says why they are not used.
    """

    label: str
    sha256: str
    taken: int
    dropped: Mapping[str, int]

    def __str__(self) -> str:
        dropped = ", ".join(f"{count} of {prefix}*" for prefix, count in self.dropped.items())
        return f"{self.label}: {self.taken} tensors taken; not used: {dropped or 'none'}"


def load_official(network: ReferringNetwork, files: Mapping[str, Path]) -> tuple[Imported, ...]:
    """Fill frozen encoders from the files their authors publish.

    Args:
        network: what to fill.
        files: path by label; the labels are those of ``network.official_keys()``.

    Raises:
        CheckpointError: an unknown label, an unreadable file, or tensors that do not fit.
    """
    return tuple(_load_one(network, label, path) for label, path in files.items())


def _load_one(network: ReferringNetwork, label: str, path: Path) -> Imported:
    known = network.official_keys()
    if label not in known:
        raise CheckpointError(
            f"This network takes no weight file '{label}'; it takes "
            f"{', '.join(known) or 'none: its encoders come with packages'}."
        )
    wanted = known[label]
    found = read_tensors(path)
    state = network.state_dict()
    _check(found, wanted, path, {own: tuple(state[own].shape) for own in wanted.keys})
    network.load_state_dict(
        {own: found[released] for own, released in wanted.keys.items()}, strict=False
    )
    dropped = {prefix: sum(name.startswith(prefix) for name in found) for prefix in wanted.unused}
    return Imported(
        label=label,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        taken=len(wanted.keys),
        dropped={prefix: count for prefix, count in dropped.items() if count},
    )


def check_complete(
    network: ReferringNetwork, files: Mapping[str, Path], *, published: bool
) -> None:
    """Refuse to work on a published size whose frozen encoders have random weights.

    Raises:
        CheckpointError: naming the files that are missing.
    """
    missing = [label for label in network.official_keys() if label not in files]
    if published and missing:
        titles = ", ".join(network.official_keys()[label].title for label in missing)
        options = " ".join(f"--weights {label}=FILE" for label in missing)
        raise CheckpointError(
            f"The frozen encoders of a published size would have random weights: {titles} was not "
            f"given. Checkpoints hold what was trained only; add {options}.",
            keys=tuple(missing),
        )


def named_files(pairs: Sequence[str]) -> dict[str, Path]:
    """Paths by label from ``label=path`` strings, as the command line takes them.

    Raises:
        CheckpointError: a string without a label.
    """
    wrong = [pair for pair in pairs if "=" not in pair]
    if wrong:
        raise CheckpointError(f"'{wrong[0]}' names no weight file; write LABEL=FILE (sam=FILE).")
    return {label: Path(path) for label, _, path in (pair.partition("=") for pair in pairs)}


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The named tensors of a published file, on the CPU.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than tensors.
    """
    if not path.is_file():
        raise CheckpointError(f"There is no weight file '{path}'.")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in any way it likes
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"'{path}' cannot be read as plain tensors ({reason}). Accepted are safetensors "
            "files and torch.save files of a state dict; nothing in a file is run."
        ) from error
    for container in CONTAINERS:
        if isinstance(content, dict) and isinstance(content.get(container), dict):
            content = content[container]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"'{path}' holds no state dict of tensors.")
    return {name.removeprefix(WRAPPER): tensor for name, tensor in content.items()}


def _check(
    found: Mapping[str, Tensor],
    wanted: OfficialFile,
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    released = set(wanted.keys.values())
    missing = sorted(released - set(found))
    extra = sorted(
        name for name in found if name not in released and not name.startswith(tuple(wanted.unused))
    )
    misfit = sorted(
        f"{name} is {tuple(found[name].shape)}, expected {shapes[own]}"
        for own, name in wanted.keys.items()
        if name in found and tuple(found[name].shape) != shapes[own]
    )
    if not missing and not extra and not misfit:
        return
    said = [f"missing: {', '.join(missing[:5])}"] if missing else []
    said += (
        [f"unknown: {', '.join(_nearest(name, released) for name in extra[:5])}"] if extra else []
    )
    said += [f"of another shape: {'; '.join(misfit[:5])}"] if misfit else []
    raise CheckpointError(
        f"'{path}' is not the expected file ({wanted.title}): {'. '.join(said)}. "
        "Is it the file of another variant?",
        keys=tuple((*missing, *extra)[:5]),
    )


def _nearest(name: str, expected: set[str]) -> str:
    close = difflib.get_close_matches(name, expected, n=1)
    return f"{name} (nearest expected: {close[0]})" if close else name
