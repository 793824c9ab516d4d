"""PyTorch's side of the gate: what a network computes, stage by stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from rt_ris.spec import Dependency
from rt_ris_train.architecture import ReferringNetwork, device_of

Array = npt.NDArray[Any]


def activations(network: ReferringNetwork, given: Mapping[str, Array]) -> dict[str, Array]:
    """Every value of one run on one picture and N sentences.

    Does what ``ReferringNetwork.run`` does and keeps what lies between; a value that is given
    already is not computed again.

    Args:
        network: in evaluation mode.
        given: external inputs [1, ...] and [N, ...], and whatever else is known.

    Returns:
        All values by name, image values [1, ...] and the others [N, ...].
    """
    graph, device = network.graph(), device_of(network)
    known = {name: torch.from_numpy(np.array(array)).to(device) for name, array in given.items()}
    with torch.inference_mode():
        for stage in network.stages():
            if all(spec.name in known for spec in stage.spec.outputs):
                continue
            inputs = [known[spec.name] for spec in stage.spec.inputs]
            if graph.dependency(stage.spec.id) is Dependency.BOTH:
                count = max(len(tensor) for tensor in inputs)
                inputs = [tensor.expand(count, *tensor.shape[1:]) for tensor in inputs]
            made = stage.module(*inputs)
            known.update(zip((spec.name for spec in stage.spec.outputs), made, strict=True))
    return {name: tensor.cpu().numpy() for name, tensor in known.items()}
