"""Several processes that train or evaluate as one, started by ``torchrun``.

Each takes its share of a step's pictures. Losses are sums over all processes divided by counts over
all processes, and gradients are added, so that n processes do what one does with n times the
pictures. Batch norms take their moments over all processes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.nn import functional as with_gradient

Item = TypeVar("Item")
PATIENCE = timedelta(days=2)
"""How long processes wait for the first one to fill a cache of a whole data set."""


@contextmanager
def together() -> Iterator[None]:
    """Join the processes that ``torchrun`` has started; alone, do nothing."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def rank() -> int:
    """Number of this process, 0 for one that is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def processes() -> int:
    """How many work together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def first_alone() -> Iterator[None]:
    """Let process 0 do something long, such as fill a cache, before the others do it.

    They wait in a group of their own: NCCL, which does the rest, gives up after ten minutes, and
    should, since anything else that takes so long hangs. torchrun ends all if one of them dies.
    """
    if processes() == 1:
        yield
        return
    waiting: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
    if rank():
        dist.barrier(waiting)
    yield
    if not rank():
        dist.barrier(waiting)


def share_of(items: Sequence[Item]) -> list[Item]:
    """This process's part; each item is in one part only."""
    return list(items[rank() :: processes()])


def total(value: Tensor) -> Tensor:
    """The sum over all processes, without gradient; the value itself where there is one."""
    if processes() == 1:
        return value
    summed = value.detach().clone()
    dist.all_reduce(summed)
    return summed


def _summed(value: Tensor) -> Tensor:
    """The sum over all processes; its gradient is summed, too."""
    summed: Tensor = with_gradient.all_reduce(value)  # type: ignore[no-untyped-call]
    return summed


def add_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace each gradient by the sum over all processes; who has none adds nothing."""
    if processes() == 1:
        return
    trained = list(parameters)
    there = torch.tensor([float(value.grad is not None) for value in trained])
    there = total(there.to(trained[0].device))
    chosen = [value for value, some in zip(trained, there.tolist(), strict=True) if some]
    grads = [torch.zeros_like(v) if v.grad is None else v.grad for v in chosen]
    flat = torch.cat([grad.flatten() for grad in grads])
    dist.all_reduce(flat)
    sizes = [value.numel() for value in chosen]
    for value, part in zip(chosen, torch.split(flat, sizes), strict=True):
        value.grad = part.view_as(value).clone()


def gathered(item: Item) -> list[Item]:
    """What every process has, in their order, in every process."""
    if processes() == 1:
        return [item]
    found: list[Any] = [None] * processes()
    dist.all_gather_object(found, item)
    return found


class SharedBatchNorm(nn.BatchNorm2d):
    """A BatchNorm2d whose moments are those of all processes, on any device.

    They are taken in float32: a sum over a batch in bfloat16 has no digits left.
    """

    def forward(self, features: Tensor) -> Tensor:
        """[N, C, h, w] to the same shape."""
        if not self.training:
            return super().forward(features)
        axes = (0, 2, 3)
        wide = features.float()
        count = total(wide.new_tensor(float(wide.numel() // wide.shape[1])))
        mean = _summed(wide.sum(axes)) / count
        centred = wide - mean[:, None, None]
        variance = _summed(centred.square().sum(axes)) / count
        self._count(mean, variance * count / (count - 1))
        normal = centred * torch.rsqrt(variance + self.eps)[:, None, None]
        scaled = normal * self.weight[:, None, None] + self.bias[:, None, None]
        return scaled.to(features.dtype)

    def _count(self, mean: Tensor, unbiased: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(mean.detach(), self.momentum)
        self.running_var.lerp_(unbiased.detach(), self.momentum)


def share_batch_norms(network: nn.Module) -> None:
    """Let the batch norms of a network see all processes; alone, change nothing."""
    if processes() == 1:
        return
    for module in network.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedBatchNorm
