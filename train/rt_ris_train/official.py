"""Weight files that others publish, fitted to a network by explicit maps of names.

A missing or unknown tensor is an error that names the nearest expected ones; what a network has no
use for is dropped for a stated reason. ``containers`` reads the files and runs nothing.
"""

from __future__ import annotations

import difflib
import hashlib
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Final, TypeAlias

import torch
from torch import Tensor

from rt_ris.errors import CheckpointError
from rt_ris_train.architecture import OfficialFile, ReferringNetwork
from rt_ris_train.containers import Pending, loaded, read_tree, shape_of, tensors_of

Found: TypeAlias = Mapping[str, Tensor | Pending]
COUNTER: Final = ".num_batches_tracked"
"""A BatchNorm's count of steps, which old files lack and nothing here reads."""


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What a published file gave.

    Attributes:
        label: the name the user gave the file.
        sha256: of the file.
        taken: number of tensors that went into the network.
        dropped: number of tensors by the pattern of their names.
        reasons: why they are not used, by the same patterns.
        whole: the file filled the whole network.
    """

    label: str
    sha256: str
    taken: int
    dropped: Mapping[str, int]
    reasons: Mapping[str, str]
    whole: bool

    def __str__(self) -> str:
        dropped = ", ".join(
            f"{count} of {pattern} ({self.reasons[pattern]})"
            for pattern, count in self.dropped.items()
        )
        return f"{self.label}: {self.taken} tensors taken; not used: {dropped or 'none'}"


def load_official(network: ReferringNetwork, files: Mapping[str, Path]) -> tuple[Imported, ...]:
    """Fill encoders, or a whole network, from the files their authors publish.

    Args:
        network: what to fill.
        files: path by label; the labels are those of ``network.official_keys()``.

    Raises:
        CheckpointError: an unknown label, an unreadable file, or tensors that do not fit.
    """
    known = network.official_keys()
    for label in files:
        if label not in known:
            raise CheckpointError(
                f"This network takes no weight file '{label}'; it takes "
                f"{', '.join(known) or 'none: its encoders come with packages'}."
            )
    return tuple(_load_one(network, label, path, read_tree(path)) for label, path in files.items())


def import_file(network: ReferringNetwork, path: Path) -> Imported:
    """Fill a network from a file whose label is told by the names in it.

    Raises:
        CheckpointError: as ``load_official``; or no name in the file is known.
    """
    tree = read_tree(path)
    known = network.official_keys()
    shares = {}
    for label, file in known.items():
        try:
            names = set(tensors_of(tree, path, file.containers))
        except CheckpointError:
            if file.containers:
                continue
            raise
        shares[label] = len(names & set(file.keys.values())) / len(set(file.keys.values()))
    best = max(shares, key=shares.__getitem__, default=None)
    if best is None or not shares[best]:
        titles = "; ".join(file.title for file in known.values()) or "none"
        raise CheckpointError(
            f"No tensor in '{path}' is known to this network. The files it takes are: {titles}."
        )
    return _load_one(network, best, path, tree)


def _load_one(network: ReferringNetwork, label: str, path: Path, tree: object) -> Imported:
    wanted = network.official_keys()[label]
    found = tensors_of(tree, path, wanted.containers)
    state = network.state_dict()
    _check(found, wanted, path, {own: tuple(state[own].shape) for own in wanted.keys})
    fill_from(network, wanted, found)
    dropped = Counter(
        pattern
        for name in found
        for pattern in wanted.unused
        if name not in wanted.keys.values() and matches(name, pattern)
    )
    return Imported(
        label=label,
        sha256=file_digest(path),
        taken=len({name for name in wanted.keys.values() if name in found}),
        dropped=dict(dropped),
        reasons=wanted.unused,
        whole=wanted.whole,
    )


def fill_from(network: ReferringNetwork, wanted: OfficialFile, found: Found) -> None:
    """Copy the tensors of a file into their places, one at a time."""
    state = network.state_dict(keep_vars=True)
    with torch.no_grad():
        for own, name in wanted.keys.items():
            if name in found:
                tensor = loaded(found[name], name, weights=state[own].is_floating_point())
                conversion = wanted.conversions.get(own)
                value = tensor if conversion is None else conversion.apply(tensor.float())
                state[own].copy_(value)


def matches(name: str, pattern: str) -> bool:
    """Whether a name begins with a prefix, or fits a pattern with ``*``."""
    return fnmatchcase(name, pattern) if "*" in pattern else name.startswith(pattern)


def file_digest(path: Path) -> str:
    """SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
    return digest.hexdigest()


def check_complete(
    network: ReferringNetwork,
    files: Collection[str],
    *,
    published: bool,
    filled: Collection[str] = (),
) -> None:
    """Refuse to work on a published size whose encoders have random weights.

    Args:
        network: what is checked.
        files: labels of the files that were given.
        published: whether a paper states this size.
        filled: names of weights that a checkpoint has filled already.

    Raises:
        CheckpointError: naming the files that are missing.
    """
    known = network.official_keys()
    if not published or any(known[label].whole for label in files if label in known):
        return
    missing = [
        label
        for label, file in known.items()
        if not file.whole and label not in files and not file.keys.keys() <= set(filled)
    ]
    if missing:
        titles = ", ".join(known[label].title for label in missing)
        options = " ".join(f"--weights {label}=FILE" for label in missing)
        raise CheckpointError(
            f"The encoders of a published size would have random weights: {titles} was not given. "
            f"Checkpoints of a training hold what was trained only; add {options} (rt-ris import: "
            "--from FILE), or begin from a checkpoint that rt-ris import has made.",
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


def _check(
    found: Found,
    wanted: OfficialFile,
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
) -> None:
    released = set(wanted.keys.values())
    missing = sorted(name for name in released - set(found) if not name.endswith(COUNTER))
    extra = sorted(
        name
        for name in set(found) - released
        if not any(matches(name, pattern) for pattern in wanted.unused)
    )
    misfit = sorted(
        f"{name} is {shape_of(found[name])}, expected {shape}"
        for name, shape in expected_shapes(wanted, shapes).items()
        if name in found and shape_of(found[name]) != shape
    )
    if not missing and not extra and not misfit:
        return
    said = []
    if missing:
        said.append(f"missing: {', '.join(_nearest(name, extra, 'found') for name in missing[:5])}")
    if extra:
        said.append(f"unknown: {', '.join(_nearest(name, released) for name in extra[:5])}")
    said += [f"of another shape: {'; '.join(misfit[:5])}"] if misfit else []
    raise CheckpointError(
        f"'{path}' is not the expected file ({wanted.title}): {'. '.join(said)}. "
        "Is it the file of another variant?",
        keys=tuple((*missing, *extra)[:5]),
    )


def expected_shapes(
    wanted: OfficialFile, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor in the file, by its name there.

    Args:
        wanted: the file's map.
        shapes: of the network's tensors, by their names in it.
    """
    return {
        name: wanted.conversions[own].shape if own in wanted.conversions else shapes[own]
        for own, name in wanted.keys.items()
    }


def _nearest(name: str, others: Collection[str], what: str = "nearest expected") -> str:
    close = difflib.get_close_matches(name, others, n=1)
    return f"{name} ({what}: {close[0]})" if close else name
