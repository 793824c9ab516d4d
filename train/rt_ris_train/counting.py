"""Counts of parameters and multiply-adds, also of networks too large for this machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Final

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from rt_ris.spec import EXPRESSIONS, DType, TensorSpec
from rt_ris_train.architecture import ReferringNetwork, Stage

TORCH: Final[Mapping[DType, torch.dtype]] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "uint8": torch.uint8,
    "int32": torch.int32,
    "int64": torch.int64,
    "bool": torch.bool,
}


def parameters(module: nn.Module) -> int:
    """Number of trained and frozen weights, each shared one counted once; buffers are none."""
    return sum(value.numel() for value in module.parameters())


def multiply_adds(call: Callable[[], object]) -> int:
    """Multiply-adds of a call: matrix products, convolutions and attention, one per pair.

    Args:
        call: runs a module; on the device ``meta`` it costs neither memory nor time.
    """
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops()) // 2


def stage_multiply_adds(stage: Stage) -> int:
    """Multiply-adds of a stage of a network on ``meta``, for one picture and one sentence."""
    return multiply_adds(partial(stage.module, *(_nothing(spec) for spec in stage.spec.inputs)))


def network_multiply_adds(network: ReferringNetwork) -> int:
    """Multiply-adds of all stages of a network on ``meta``, for one picture and one sentence."""
    return sum(stage_multiply_adds(stage) for stage in network.stages())


def _nothing(spec: TensorSpec) -> Tensor:
    shape = [1 if axis == EXPRESSIONS else int(axis) for axis in spec.shape]
    return torch.zeros(shape, dtype=TORCH[spec.dtype], device="meta")
