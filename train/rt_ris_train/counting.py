"""Counts of parameters and multiply-adds, also of networks too large for this machine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode


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
