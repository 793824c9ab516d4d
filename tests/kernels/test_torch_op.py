"""The PyTorch operator without a GPU: its eager form, its gradients, what torch.compile needs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from rt_ris_kernels import torch_op
from rt_ris_kernels.ops.masked_mutual_attention import MASKED_MUTUAL_ATTENTION

OPERATOR = torch.ops.rt_ris.masked_mutual_attention


def inputs(dtype: torch.dtype = torch.float64, *, shared: bool = True) -> list[Tensor]:
    draw = torch.Generator().manual_seed(4)
    n, p, length, c = 2, 30, 5, 8
    shapes = [(1 if shared else n, p, c), (n, length, c), (n, length), (c,), (c,), (c,), (c,)]
    tensors = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    tensors[2] = torch.ones(n, length, dtype=torch.float64)
    tensors[2][:, -1] = 0
    return [tensor.to(dtype) for tensor in tensors]


@pytest.mark.parametrize("normalize", [0, 1])
@pytest.mark.parametrize("threshold", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("shared", [True, False])
def test_it_is_the_operator(normalize: int, threshold: float, shared: bool) -> None:
    tensors = inputs(shared=shared)
    found = OPERATOR(*tensors, threshold, 0.7, 1e-5, normalize)
    attributes = {"threshold": threshold, "scale": 0.7, "normalize": normalize}
    wanted = MASKED_MUTUAL_ATTENTION.run([each.numpy() for each in tensors], attributes)
    for a, b in zip(found, wanted, strict=True):
        np.testing.assert_allclose(a.numpy(), b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("normalize", [0, 1])
def test_its_gradients_are_those_of_differences(normalize: int) -> None:
    tensors = [each.requires_grad_(k != 2) for k, each in enumerate(inputs())]
    assert torch.autograd.gradcheck(lambda *x: OPERATOR(*x, 0.5, 1.0, 1e-5, normalize), tensors)


def test_half_precision_sums_its_gradients_in_float32() -> None:
    wide = [each.requires_grad_(k != 2) for k, each in enumerate(inputs())]
    half = [each.detach().half().requires_grad_(k != 2) for k, each in enumerate(wide)]
    for tensors in (wide, half):
        pixels, words = OPERATOR(*tensors)
        (pixels.double().square().sum() + words.double().square().sum()).backward()
    for a, b in zip(half, wide, strict=True):
        if a.grad is not None and b.grad is not None:
            assert a.grad.dtype == torch.float16
            torch.testing.assert_close(a.grad.double(), b.grad, rtol=5e-2, atol=5e-2)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # opcheck looks at it
def test_torch_library_finds_nothing_wrong() -> None:
    tensors = [each.requires_grad_(k != 2) for k, each in enumerate(inputs(torch.float32))]
    torch.library.opcheck(OPERATOR.default, (*tensors, 0.5, 1.0, 1e-5, 0))


def test_without_a_gpu_no_kernel_is_claimed() -> None:
    z_v, z_l, *_ = inputs(torch.float16)
    assert not torch_op.has_kernel(z_v, z_l)


def test_training_takes_the_operator_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a tensor that claims to be on a GPU: the same numbers, in single precision."""
    from rt_ris_train.blocks.mutual_attention import Settings, masked_mutual_attention

    tensors = inputs(torch.float32)
    settings = Settings(threshold=0.4, scale=0.7, normalize=True)

    def attend(z_v: Tensor) -> tuple[Tensor, Tensor]:
        norms = (tensors[3], tensors[4], tensors[5], tensors[6])
        return masked_mutual_attention(
            z_v, tensors[1], word_mask=tensors[2], norms=norms, settings=settings
        )

    wanted = attend(tensors[0])
    seen: list[torch.dtype] = []

    def noted(*given: Tensor | float) -> tuple[Tensor, Tensor]:
        seen.append(given[0].dtype)  # type: ignore[union-attr]
        found: tuple[Tensor, Tensor] = torch_op.eager(*given)  # type: ignore[arg-type]
        return found

    monkeypatch.setattr(torch.ops.rt_ris, "masked_mutual_attention", noted)
    found = attend(tensors[0].half().as_subclass(OnGpu))
    assert seen == [torch.float32]
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.as_subclass(Tensor), b, rtol=2e-2, atol=2e-2)


class OnGpu(Tensor):
    is_cuda = True
