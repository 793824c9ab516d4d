"""What is stored of a network: the weights that were trained, or all of them.

A checkpoint is one safetensors file. Its metadata names the architecture, the variant, the number
of tokens and the recipe. One of a training holds what was trained; frozen encoders are not in it,
since their packages or files bring them. One that was imported holds everything.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from rt_ris.errors import CheckpointError, StorageError
from rt_ris_train.architecture import Architecture, ReferringNetwork, load
from rt_ris_train.official import Imported, check_complete, file_digest, load_official

FORMAT: Final = "rt-ris-checkpoint-1"
TRAINED, WHOLE = "trained", "whole"
SEEDED_HEAD: Final = "seeded random weights"
"""What an imported checkpoint says of its head if no file filled it."""


@dataclass(frozen=True, kw_only=True)
class LoadedNetwork:
    """A network ready to evaluate or export, in evaluation mode.

    Attributes:
        network: with the checkpoint's weights.
        architecture: what it is an instance of.
        variant_name: which size.
        checkpoint_sha256: of the checkpoint file; None where no checkpoint was loaded.
        seeded: the head's weights are seeded random ones, not trained.
        metadata: what the checkpoint says about itself.
        imported: what the published files of frozen encoders gave.
    """

    network: ReferringNetwork
    architecture: Architecture
    variant_name: str
    checkpoint_sha256: str | None
    seeded: bool
    metadata: Mapping[str, str]
    imported: tuple[Imported, ...] = ()


def trained_state(network: ReferringNetwork) -> dict[str, Tensor]:
    """Every tensor of the state dict that training changes, buffers such as BatchNorm's too."""
    frozen = _frozen_names(network)
    return {
        name: tensor.detach() for name, tensor in _unshared(network).items() if name not in frozen
    }


def save_checkpoint(
    path: Path, network: ReferringNetwork, *, metadata: Mapping[str, str], whole: bool = False
) -> None:
    """Write a checkpoint atomically.

    Args:
        path: file to make or replace.
        network: whose weights are written.
        metadata: ``architecture``, ``variant`` and whatever else should travel along.
        whole: write the frozen weights, too.

    Raises:
        StorageError: the file cannot be written, as on a full disk; the old one stays.
    """
    kept = whole_state(network) if whole else trained_state(network)
    said = {"format": FORMAT, "contents": WHOLE if whole else TRAINED}
    said |= {"tokens": str(network.text.max_tokens), **metadata}
    if network.official_tokenizer() is not None:
        said["tokenizer"] = network.tokenizer_json()
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in kept.items()}
    write_atomically(path, save(tensors, metadata=said))


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a kill at any moment leaves either the old one or the new one.

    Raises:
        StorageError: the file cannot be written, as on a full disk; the old one stays.
    """
    partial = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        raise StorageError(
            f"'{path}' cannot be written ({error.strerror}); make room, or choose another folder. "
            "What was there before is unchanged."
        ) from error
    finally:
        partial.unlink(missing_ok=True)


def load_network(
    arch: str,
    variant: str | None,
    checkpoint: Path | None,
    *,
    weights: Mapping[str, Path] | None = None,
) -> LoadedNetwork:
    """Build a network and fill it with a checkpoint.

    Args:
        arch: name of an architecture.
        variant: name of a variant, or None for the default one.
        checkpoint: file to load; None for the checkpoint that ships with the variant, or seeded
            random weights where none ships.
        weights: published files of frozen encoders by label, as ``official_keys`` names them.

    Raises:
        CheckpointError: a file is missing, damaged or of another network.
        RecipeError: there is no such architecture or variant.
    """
    architecture = load(arch)
    chosen = architecture.variant(variant)
    name = variant or architecture.default
    source = checkpoint or chosen.checkpoint
    tokens = None if source is None else _tokens_of(source, arch=arch, variant=name)
    network = chosen.network(tokens=tokens)
    imported = load_official(network, weights or {})
    digest, metadata = (
        (None, {}) if source is None else fill(network, source, arch=arch, variant=name)
    )
    if source is not None:
        _check_frozen(network, metadata, weights or {}, published=chosen.published)
    network.eval()
    return LoadedNetwork(
        network=network,
        architecture=architecture,
        variant_name=name,
        checkpoint_sha256=digest,
        seeded=metadata.get("head") == SEEDED_HEAD
        or (source is None and not any(file.whole for file in imported)),
        metadata=metadata,
        imported=imported,
    )


def fill(
    network: ReferringNetwork, path: Path, *, arch: str, variant: str
) -> tuple[str, dict[str, str]]:
    """Load a checkpoint into a network that fits it exactly.

    Returns:
        SHA-256 of the file and its metadata.

    Raises:
        CheckpointError: the file is missing, damaged, or its tensors are not the network's.
    """
    tensors, metadata = _read(path)
    said = _said_of(metadata)
    whole = metadata.get("contents") == WHOLE
    wanted = whole_state(network) if whole else trained_state(network)
    differing = _differing(tensors, wanted)
    if differing or said != f"{arch} {variant}":
        raise CheckpointError(
            f"'{path}' is a checkpoint of {said}; {arch} {variant} was asked for. "
            + (f"First differences: {'; '.join(differing[:5])}. " if differing else "")
            + "Name the architecture and the variant it was trained for (--arch, --variant).",
            keys=tuple(difference.split(":")[0] for difference in differing[:5]),
        )
    tokens = metadata.get("tokens", str(network.text.max_tokens))
    trained = metadata.get("head") != SEEDED_HEAD  # encoders alone know no length of sentences
    if trained and tokens != str(network.text.max_tokens):
        raise CheckpointError(
            f"'{path}' was trained with sentences of {tokens} tokens; {arch} {variant} takes "
            f"{network.text.max_tokens}, and its results depend on that number (--tokens)."
        )
    network.load_state_dict(tensors, strict=False)
    if network.official_tokenizer() is not None and "tokenizer" in metadata:
        network.use_tokenizer(metadata["tokenizer"])
    return file_digest(path), metadata


def start_from(
    network: ReferringNetwork,
    path: Path,
    *,
    arch: str,
    variant: str,
    weights: Collection[str] = (),
) -> None:
    """Fill a network that is about to be trained from a checkpoint of the same kind.

    Args:
        network: with the published files of encoders that were given.
        path: the checkpoint.
        arch: architecture of the network.
        variant: its size.
        weights: labels of those files.

    Raises:
        CheckpointError: as ``fill``; or frozen weights stay random.
    """
    _, metadata = fill(network, path, arch=arch, variant=variant)
    published = load(arch).variant(variant).published
    _check_frozen(network, metadata, weights, published=published)


def _check_frozen(
    network: ReferringNetwork,
    metadata: Mapping[str, str],
    weights: Collection[str],
    *,
    published: bool,
) -> None:
    """Refuse frozen weights that neither the checkpoint nor a published file has filled."""
    if metadata.get("contents", TRAINED) == TRAINED:
        filled = set(network.state_dict()) - _frozen_names(network)
        check_complete(network, weights, published=published, filled=filled)


def _tokens_of(path: Path, *, arch: str, variant: str) -> int | None:
    """The number of tokens that a checkpoint was trained with; None for one of another network."""
    _, metadata = _read(path, tensors=False)
    tokens = metadata.get("tokens")
    if tokens is None or _said_of(metadata) != f"{arch} {variant}":
        return None
    if not tokens.isdecimal():
        raise CheckpointError(f"'{path}' says that its sentences have '{tokens}' tokens.")
    return int(tokens)


def _said_of(metadata: Mapping[str, str]) -> str:
    """Architecture and variant that a checkpoint names."""
    return f"{metadata.get('architecture', '?')} {metadata.get('variant', '?')}"


def whole_state(network: ReferringNetwork) -> dict[str, Tensor]:
    """Every tensor of the state dict, shared ones under their first names."""
    return {name: tensor.detach() for name, tensor in _unshared(network).items()}


def _read(path: Path, *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    if not path.is_file():
        raise CheckpointError(f"There is no checkpoint file '{path}'.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            names = file.keys() if tensors else ()
            found = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"'{path}' cannot be read as a safetensors checkpoint ({error}). Files that "
            "others publish for an encoder are given with --weights LABEL=FILE."
        ) from error
    if metadata.get("format") != FORMAT:
        raise CheckpointError(
            f"'{path}' is a safetensors file, but not a checkpoint of this project: its metadata "
            f"has no format '{FORMAT}'."
        )
    return found, metadata


def _differing(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> list[str]:
    differences = [f"{name}: not in the file" for name in wanted if name not in found]
    differences += [f"{name}: unknown to the network" for name in found if name not in wanted]
    differences += [
        f"{name}: shape {tuple(found[name].shape)}, the network has {tuple(wanted[name].shape)}"
        for name in found
        if name in wanted and found[name].shape != wanted[name].shape
    ]
    return sorted(differences)


def _frozen_names(network: ReferringNetwork) -> set[str]:
    """Names of parameters that never train, and of the buffers of modules that hold only such.

    Where frozen BatchNorms go on counting in training (ETRIS), their statistics are not frozen.
    """
    frozen = {name for name, value in network.named_parameters() if not value.requires_grad}
    counting = _counting(network)
    for prefix, module in network.named_modules():
        parameters = list(module.parameters())
        if parameters and not any(value.requires_grad for value in parameters):
            frozen |= {f"{prefix}.{name}" for name in module.state_dict()} - counting
    return frozen - set(network.kept_frozen())


def _counting(network: ReferringNetwork) -> set[str]:
    """Statistics that a training step of this network changes."""
    before = network.training
    network.train()
    norms = {
        prefix: module
        for prefix, module in network.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training
    }
    network.train(before)
    return {
        f"{prefix}.{name}" for prefix, norm in norms.items() for name, _ in norm.named_buffers()
    }


def _unshared(network: ReferringNetwork) -> dict[str, Tensor]:
    """The state dict with each shared tensor under its first name only."""
    seen: set[int] = set()
    kept: dict[str, Tensor] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            kept[name] = tensor
    return kept


def metadata_of(
    *, architecture: str, variant: str, step: int, recipe: Mapping[str, object]
) -> dict[str, str]:
    """The metadata that training writes into a checkpoint."""
    return {
        "architecture": architecture,
        "variant": variant,
        "step": str(step),
        "torch": torch.__version__,
        "recipe": json.dumps(recipe, sort_keys=True, default=str),
    }
