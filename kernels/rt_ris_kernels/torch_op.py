"""Masked mutual attention as a PyTorch operator, ``torch.ops.rt_ris.masked_mutual_attention``.

Importing this module registers it. On a GPU the forward pass is the CUDA kernel on PyTorch's
current stream; elsewhere, and for types and sizes without a kernel, it is made of PyTorch
operations. The backward pass always is: it computes the forward pass again in float32.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from rt_ris_kernels.arrays import DeviceArray
from rt_ris_kernels.geometry import CHANNELS, WORD_CAPACITIES
from rt_ris_kernels.launch import LEAST_CAPABILITY, MaskedMutualAttentionLauncher

_SUPPRESSED = -1e4
_MASS_FLOOR = 1e-6
_DTYPES = {torch.float16: "float16", torch.float32: "float32"}


def eager(
    z_v: Tensor,
    z_l: Tensor,
    word_mask: Tensor,
    gamma_v: Tensor,
    beta_v: Tensor,
    gamma_l: Tensor,
    beta_l: Tensor,
    threshold: float = 0.5,
    scale: float = 1.0,
    epsilon: float = 1e-5,
    normalize: int = 0,
) -> tuple[Tensor, Tensor]:
    """The operator in PyTorch operations, computed in the type of its inputs; differentiable."""
    scores = z_v @ z_l.transpose(1, 2) * scale
    keep = (scores.detach() >= _logit(threshold)) & (word_mask[:, None] > 0)
    weights = torch.where(keep, scores, _SUPPRESSED).softmax(-1) * keep
    collected = weights.transpose(1, 2) @ z_v
    if normalize:
        collected = collected / (weights.sum(1)[..., None] + _MASS_FLOOR)
    width = (z_v.shape[-1],)
    f_lav = functional.layer_norm(weights @ z_l + z_v, width, gamma_v, beta_v, epsilon)
    return f_lav, functional.layer_norm(collected + z_l, width, gamma_l, beta_l, epsilon)


def has_kernel(z_v: Tensor, z_l: Tensor) -> bool:
    """Whether the CUDA kernel takes these pixels [N or 1, P, C] and words [N, L, C]."""
    return (
        z_v.is_cuda
        and z_v.dtype in _DTYPES
        and z_v.dtype == z_l.dtype
        and z_v.shape[-1] in CHANNELS
        and 1 <= z_l.shape[1] <= WORD_CAPACITIES[-1]
        and _capability(z_v.device.index or 0) >= LEAST_CAPABILITY
    )


@torch.library.custom_op("rt_ris::masked_mutual_attention", mutates_args=())
def masked_mutual_attention(
    z_v: Tensor,
    z_l: Tensor,
    word_mask: Tensor,
    gamma_v: Tensor,
    beta_v: Tensor,
    gamma_l: Tensor,
    beta_l: Tensor,
    threshold: float = 0.5,
    scale: float = 1.0,
    epsilon: float = 1e-5,
    normalize: int = 0,
) -> tuple[Tensor, Tensor]:
    """f_lav [N, P, C] and f_val [N, L, C]; arguments as in the operator's numpy reference."""
    inputs = (z_v, z_l, word_mask, gamma_v, beta_v, gamma_l, beta_l)
    if not has_kernel(z_v, z_l):
        return eager(*inputs, threshold, scale, epsilon, normalize)
    attributes = {
        "threshold": threshold,
        "scale": scale,
        "epsilon": epsilon,
        "normalize": normalize,
    }
    with torch.cuda.device(z_v.device):
        return _launched(inputs, attributes)


def _launched(
    inputs: tuple[Tensor, ...], attributes: dict[str, float | int]
) -> tuple[Tensor, Tensor]:
    z_v, z_l = inputs[:2]
    f_lav = z_l.new_empty(z_l.shape[0], z_v.shape[1], z_v.shape[2])
    f_val = torch.empty_like(z_l, memory_format=torch.contiguous_format)
    launcher = _launcher(z_v.device.index or 0)
    plan = launcher.geometry(
        expressions=z_l.shape[0],
        pixels=z_v.shape[1],
        words=z_l.shape[1],
        channels=z_v.shape[2],
        dtype=_DTYPES[z_v.dtype],
    )
    kept = [tensor.contiguous() for tensor in inputs]  # until the launches are on the stream
    launcher.launch(
        [_described(tensor) for tensor in kept],
        [_described(f_lav), _described(f_val)],
        workspace=_described(torch.empty(plan.workspace_bytes // 4, device=z_v.device)),
        stream=torch.cuda.current_stream(z_v.device).cuda_stream,
        attributes=attributes,
    )
    return f_lav, f_val


@masked_mutual_attention.register_fake
def _(z_v: Tensor, z_l: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    return z_l.new_empty(z_l.shape[0], z_v.shape[1], z_v.shape[2]), torch.empty_like(z_l)


def _remember(
    ctx: torch.autograd.function.FunctionCtx,
    inputs: tuple[Tensor | float, ...],
    output: tuple[Tensor, Tensor],
) -> None:
    ctx.save_for_backward(*(each for each in inputs if isinstance(each, Tensor)))
    ctx.attributes = [each for each in inputs if not isinstance(each, Tensor)]  # type: ignore[attr-defined]


def _backward(
    ctx: torch.autograd.function.FunctionCtx, for_pixels: Tensor, for_words: Tensor
) -> tuple[Tensor | None, ...]:
    saved: tuple[Tensor, ...] = ctx.saved_tensors  # type: ignore[attr-defined]
    attributes: list[float] = ctx.attributes  # type: ignore[attr-defined]
    with torch.enable_grad(), torch.autocast(saved[0].device.type, enabled=False):
        leaves = [tensor.detach().to(_wide(tensor)).requires_grad_() for tensor in saved]
        outputs = eager(*leaves, *attributes)  # type: ignore[arg-type]
        gradients = torch.autograd.grad(
            outputs,
            leaves,
            [for_pixels.to(outputs[0]), for_words.to(outputs[1])],
            allow_unused=True,
        )
    narrowed = (
        None if gradient is None else gradient.to(tensor)
        for gradient, tensor in zip(gradients, saved, strict=True)
    )
    return (*narrowed, *(None for _ in attributes))


masked_mutual_attention.register_autograd(_backward, setup_context=_remember)


def _described(tensor: Tensor) -> DeviceArray:
    """Without the interfaces for foreign arrays, which take longer than the kernels."""
    return DeviceArray(
        pointer=tensor.data_ptr(),
        shape=tuple(tensor.shape),
        dtype=_DTYPES.get(tensor.dtype, str(tensor.dtype)),
    )


def _wide(tensor: Tensor) -> torch.dtype:
    """Float32 at least: sums over thousands of pixels follow."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _logit(threshold: float) -> float:
    if threshold in (0.0, 1.0):
        return math.inf if threshold else -math.inf
    return math.log(threshold / (1 - threshold))


@lru_cache
def _capability(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@lru_cache
def _launcher(device: int) -> MaskedMutualAttentionLauncher:
    return MaskedMutualAttentionLauncher(device)
