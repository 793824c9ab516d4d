"""From published weight files to a checkpoint that holds everything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rt_ris.errors import CheckpointError, OutputError
from rt_ris_train.architecture import Architecture, ReferringNetwork, load
from rt_ris_train.checkpoint import SEEDED_HEAD, save_checkpoint
from rt_ris_train.containers import read_tree, shape_of, tensors_of
from rt_ris_train.official import (
    Imported,
    check_complete,
    expected_shapes,
    import_file,
    load_official,
)


@dataclass(frozen=True, kw_only=True)
class ImportRequest:
    """What to import.

    Attributes:
        arch: architecture.
        variant: one of its sizes; None for its default.
        files: published files, each with its label or None where the names in it tell.
        tokenizer: the published vocabulary, where the network needs one.
        tokens: length of the sentences that the weights were trained on, which no published file
            tells; None for the usual one.
        out: the checkpoint to write.
        overwrite: replace a file that is there.
    """

    arch: str
    variant: str | None
    files: Sequence[tuple[str | None, Path]]
    tokenizer: Path | None
    out: Path
    tokens: int | None = None
    overwrite: bool = False


@dataclass(frozen=True, kw_only=True)
class Import:
    """What was imported.

    Attributes:
        files: what each file gave.
        tokens: length of sentences that the checkpoint now stands for.
        any_length: the network could have been made for another one.
    """

    files: tuple[Imported, ...]
    tokens: int
    any_length: bool


def import_checkpoint(request: ImportRequest) -> Import:
    """Fill a network from published files and write it whole.

    A network whose head no file filled is written all the same, for a training to begin from; its
    checkpoint says that the head is random.

    Raises:
        OutputError: the checkpoint exists.
        RecipeError: there is no such architecture or variant.
        CheckpointError: a file is unreadable, does not fit, or one is missing.
        StorageError: the checkpoint cannot be written.
    """
    if request.out.is_dir():
        raise OutputError(f"'{request.out}' is a folder; give the name of a file.")
    if request.out.exists() and not request.overwrite:
        raise OutputError(f"'{request.out}' exists; give another file, or --overwrite.")
    architecture = load(request.arch)
    name = request.variant or architecture.default
    variant = architecture.variant(request.variant)
    network = variant.network(tokens=request.tokens)
    metadata = {"architecture": request.arch, "variant": name}
    _take_vocabulary(network, request.tokenizer)
    imported = tuple(
        _one(network, label, path, architecture=architecture, variant=name)
        for label, path in request.files
    )
    check_complete(network, {file.label for file in imported}, published=variant.published)
    if not any(file.whole for file in imported):
        metadata["head"] = SEEDED_HEAD
    metadata["files"] = ", ".join(f"{file.label} {file.sha256}" for file in imported)
    save_checkpoint(request.out, network, metadata=metadata, whole=True)
    return Import(
        files=imported, tokens=network.text.max_tokens, any_length=variant.longest is not None
    )


def _take_vocabulary(network: ReferringNetwork, path: Path | None) -> None:
    wanted = network.official_tokenizer()
    if path is None:
        if wanted is not None:
            network.tokenizer_json()  # says which file is missing, and where it is
        return
    if wanted is None:
        raise CheckpointError(f"'{path}' was given, but this network brings its own tokenizer.")
    if not path.is_file():
        raise CheckpointError(f"There is no vocabulary '{path}'; {wanted.title} is expected.")
    network.use_tokenizer(wanted.convert(path.read_bytes()))


def _one(
    network: ReferringNetwork,
    label: str | None,
    path: Path,
    *,
    architecture: Architecture,
    variant: str,
) -> Imported:
    try:
        if label is None:
            return import_file(network, path)
        return load_official(network, {label: path})[0]
    except CheckpointError as error:
        fitting = _fitting(architecture, path, besides=variant) if error.keys else ()
        if not fitting:
            raise
        raise CheckpointError(
            f"{error} It fits {architecture.name} --variant {' or '.join(fitting)}.",
            keys=error.keys,
        ) from error


def _fitting(architecture: Architecture, path: Path, *, besides: str) -> tuple[str, ...]:
    """Other variants that take every tensor of a file."""
    tree = read_tree(path)
    found = []
    for name, variant in architecture.variants.items():
        if name == besides or variant.checkpoint is not None:
            continue
        with torch.device("meta"):
            network = variant.build()
        state = {own: tuple(value.shape) for own, value in network.state_dict().items()}
        for file in network.official_keys().values():
            try:
                tensors = tensors_of(tree, path, file.containers)
            except CheckpointError:
                continue
            wanted = expected_shapes(file, state)
            if all(name in tensors and shape_of(tensors[name]) == wanted[name] for name in wanted):
                found.append(name)
                break
    return tuple(found)
