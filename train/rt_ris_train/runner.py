"""A PyTorch network behind the runtime's own predictor, so that both are measured the same way."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rt_ris.backends.base import Array, Runner
from rt_ris.predictor import Predictor
from rt_ris.session import Session
from rt_ris.text import Tokenizer
from rt_ris_train.architecture import ReferringNetwork, Stage, device_of


class TorchRunner(Runner):
    """One stage of a network, run in PyTorch."""

    def __init__(self, stage: Stage, device: torch.device) -> None:
        super().__init__(stage.spec)
        self._module = stage.module
        self._device = device

    def _run(self, inputs: Sequence[Array]) -> Sequence[Array]:
        with torch.inference_mode():
            tensors = [torch.tensor(array, device=self._device) for array in inputs]
            return [tensor.float().cpu().numpy() for tensor in self._module(*tensors)]

    def close(self) -> None:
        """Nothing to give back: the network belongs to the caller."""


def predictor_of(network: ReferringNetwork) -> Predictor:
    """The runtime's predictor over a network in evaluation mode, on the network's device."""
    device = device_of(network)
    runners = {stage.spec.id: TorchRunner(stage, device) for stage in network.eval().stages()}
    return Predictor(
        session=Session(network.graph(), runners),
        tokenizer=Tokenizer(network.tokenizer_json().encode(), network.text),
        image=network.image,
        mask=network.mask,
    )
