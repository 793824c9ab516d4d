"""The rule by which weights are made for the golden vectors, and the vectors.

``tests/fixtures/goldens/README.md`` says where they come from and states the rule.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from rt_ris_train.architecture import OfficialFile, ReferringNetwork

GOLDENS = Path(__file__).parents[1] / "fixtures" / "goldens"
EMBEDDINGS = ("_embedding", "_embeddings", "_embedding.weight", "_embeddings.weight")


def golden(name: str) -> Mapping[str, npt.NDArray[Any]]:
    """The arrays of one variant."""
    with np.load(GOLDENS / f"{name}.npz") as file:
        return dict(file)


def rule_tensor(name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """The weight of that name, without its overrides."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    drawn = np.random.Generator(np.random.PCG64(seed)).standard_normal(shape)
    return np.asarray(_scaled(name, drawn), dtype=np.float32)


def _scaled(name: str, drawn: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    if name.endswith("running_mean"):
        return 0.1 * drawn
    if name.endswith("running_var"):
        return 1 + 0.1 * np.abs(drawn)
    if name.endswith(EMBEDDINGS):
        return 0.02 * drawn
    if name.endswith(("vis_weight", "lan_weight")):
        return drawn
    if drawn.ndim >= 2:
        scale = 0.25 if _is_bert_output(name) else 1.0
        return scale * drawn / np.sqrt(np.prod(drawn.shape[1:]))
    return 1 + 0.1 * drawn if name.endswith(".weight") else 0.02 * drawn


def _is_bert_output(name: str) -> bool:
    return name.startswith("bert_model.") and name.endswith("attention.output.dense.weight")


def fill(network: ReferringNetwork, file: OfficialFile, overrides: Mapping[str, float]) -> None:
    """Fill a network with the rule's weights, through the key map of its authors' file.

    Args:
        network: what to fill.
        file: the map.
        overrides: values by name in the file and position, written ``name[0]``.
    """
    state = network.state_dict()
    made: dict[str, Tensor] = {}
    known: dict[str, Tensor] = {}
    for own, name in file.keys.items():
        if not state[own].is_floating_point():
            continue
        conversion = file.conversions.get(own)
        if name not in known:
            shape = conversion.shape if conversion else tuple(state[own].shape)
            known[name] = torch.from_numpy(rule_tensor(name, shape))
            for place, value in overrides.items():
                if place.startswith(f"{name}["):
                    known[name][int(place[len(name) + 1 : -1])] = value
        made[own] = conversion.apply(known[name]) if conversion else known[name]
    network.load_state_dict(made, strict=False)


def compare(found: Tensor, name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> float:
    """The worse of two relative errors: of the first sixteen values, and of mean, spread and norm.

    ``found`` has the authors' layout.
    """
    assert tuple(found.shape) == tuple(arrays[f"{name}.shape"]), name
    values = found.double().numpy()
    stats = np.array([values.mean(), values.std(), np.linalg.norm(values)])
    wanted, first = arrays[f"{name}.stats"], arrays[f"{name}.first16"].astype(float)
    rms = wanted[2] / np.sqrt(values.size)
    return max(
        float(np.linalg.norm(values.ravel()[:16] - first) / max(np.linalg.norm(first), 4 * rms)),
        float(np.abs(stats[:2] - wanted[:2]).max() / rms),
        float(abs(stats[2] - wanted[2]) / wanted[2]),
    )


def relative(found: npt.NDArray[Any], truth: npt.NDArray[Any]) -> float:
    """||a - b|| / ||b||."""
    return float(np.linalg.norm(found - truth) / np.linalg.norm(truth))


def laid_out(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """In the authors' layout, which has tokens or channels first in places."""
    if tensor.ndim == 4 and len(shape) == 3:
        tensor = tensor.flatten(2).mT
    if tensor.ndim == 4 and tuple(tensor.shape) != shape:
        return tensor.permute(0, 3, 1, 2)
    if tensor.ndim == 3 and len(shape) == 4:
        return tensor.mT.reshape(shape)
    if tuple(tensor.shape) != shape and tuple(tensor.mT.shape) == shape:
        return tensor.mT
    return tensor if tuple(tensor.shape) == shape else tensor.transpose(0, 1)


@contextmanager
def taps(
    made: Mapping[str, nn.Module], taken: Mapping[str, nn.Module]
) -> Iterator[dict[str, Tensor]]:
    """Collect tensors by name while a network runs.

    Args:
        made: modules whose outputs are collected; of several outputs, those under ``name`` and
            ``name+`` are the first and the second.
        taken: modules whose first inputs are collected.
    """
    found: dict[str, Tensor] = {}

    def after(name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        both = output if isinstance(output, tuple) else (output,)
        found.update(zip((name, f"{name}+"), both, strict=False))

    with ExitStack() as hooks:
        for name, module in made.items():
            hook = module.register_forward_hook(lambda _m, _i, out, name=name: after(name, out))
            hooks.callback(hook.remove)
        for name, module in taken.items():
            before = module.register_forward_pre_hook(
                lambda _m, inputs, name=name: found.__setitem__(name, inputs[0])
            )
            hooks.callback(before.remove)
        yield found


def worst(found: Mapping[str, Tensor], truth: Mapping[str, npt.NDArray[Any]]) -> tuple[float, str]:
    """The largest error of all inner tensors that the goldens name, and whose it is."""
    names = {name.removesuffix(".shape") for name in truth if name.endswith(".shape")}
    assert names <= set(found), names - set(found)
    return max(
        (compare(laid_out(found[name], tuple(truth[f"{name}.shape"])), name, truth), name)
        for name in names
    )
