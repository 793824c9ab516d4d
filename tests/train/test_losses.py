from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rt_ris_train.architecture import Outputs
from rt_ris_train.losses import (
    LossWeights,
    Target,
    cross_entropy,
    dice_loss,
    focal_loss,
    total_loss,
)


def target(share: Tensor, present: Tensor | None = None) -> Target:
    there = torch.ones(len(share), dtype=torch.bool) if present is None else present
    return Target(share=share, valid=torch.ones_like(share), present=there)


def value(term: tuple[Tensor, Tensor]) -> float:
    return float(term[0] / term[1])


def test_one_logit_has_the_weighted_cross_entropy_of_two_channels() -> None:
    torch.manual_seed(0)
    both = torch.randn(3, 2, 4, 4)
    wanted = torch.randint(0, 2, (3, 4, 4))
    theirs = functional.cross_entropy(both, wanted, weight=torch.tensor([0.9, 1.1]))
    ours = cross_entropy(both[:, 1] - both[:, 0], target(wanted.float()), (0.9, 1.1))
    assert value(ours) == pytest.approx(float(theirs), rel=1e-5)


def test_plain_cross_entropy_is_a_mean() -> None:
    torch.manual_seed(0)
    logits, share = torch.randn(3, 4, 4), torch.rand(3, 4, 4)
    theirs = functional.binary_cross_entropy_with_logits(logits, share)
    assert value(cross_entropy(logits, target(share))) == pytest.approx(float(theirs), rel=1e-5)


def test_dice_by_hand() -> None:
    # Sure of the left half of a mask that covers everything: 1 - (2 * 8 + 1) / (8 + 16 + 1).
    logits = torch.full((1, 4, 4), -40.0)
    logits[:, :, :2] = 40.0
    assert value(dice_loss(logits, target(torch.ones(1, 4, 4)))) == pytest.approx(1 - 17 / 25)


def test_dice_leaves_out_what_has_no_target() -> None:
    logits = torch.zeros(2, 4, 4)
    present = torch.tensor([True, False])
    share = torch.stack((torch.ones(4, 4), torch.zeros(4, 4)))
    alone = value(dice_loss(logits[:1], target(share[:1])))
    assert value(dice_loss(logits, target(share, present))) == pytest.approx(alone)


def test_focal_by_hand() -> None:
    # Probability 1/2 on a cell of the mask: alpha (1/2)^2 log 2.
    loss = focal_loss(torch.zeros(1, 1, 1), target(torch.ones(1, 1, 1)))
    assert value(loss) == pytest.approx(0.25 * 0.25 * 0.693147, rel=1e-5)


def test_padding_counts_nothing() -> None:
    torch.manual_seed(0)
    logits, share, valid = torch.randn(2, 4, 4), torch.rand(2, 4, 4), torch.ones(2, 4, 4)
    valid[:, 2:] = 0
    there = torch.ones(2, dtype=torch.bool)
    weights = LossWeights(focal=1.0, dice=1.0, cross_entropy=1.0)
    losses = []
    for padding in (0.0, 50.0):
        moved = torch.where(valid > 0, logits, padding)
        outputs = Outputs(logits=moved, existence=None)
        wanted = Target(share=share * valid, valid=valid, present=there)
        losses.append(float(total_loss(outputs, wanted, weights=weights)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)
