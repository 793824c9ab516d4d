"""Losses on mask logits, each a sum over sentences divided by a count of them.

The two are kept apart until the end, so that several processes can add both up (``parallel``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor
from torch.nn import functional

from rt_ris_train.architecture import Outputs
from rt_ris_train.parallel import total

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0
DICE_SMOOTH = 1.0

Term: TypeAlias = tuple[Tensor, Tensor]
"""A sum over the sentences of this process, and what the sum over all processes is divided by."""


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Factor of each term; MARIS prints focal 1 and dice 1.

    Attributes:
        focal: of the focal loss.
        dice: of the dice loss.
        cross_entropy: of the binary cross-entropy.
        classes: of background and foreground in the cross-entropy, whose sum is then divided by
            the sum of these weights over all cells, as PyTorch's weighted cross-entropy does.
        existence: of the existence head's cross-entropy.
        auxiliary: of the losses a network brings itself, by their names.
    """

    focal: float = 1.0
    dice: float = 1.0
    cross_entropy: float = 0.0
    classes: tuple[float, float] | None = None
    existence: float = 0.0
    auxiliary: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Target:
    """What N sentences should get.

    Attributes:
        share: of each cell that the mask covers, float32 [N, h, w] in 0..1.
        valid: 1 inside the picture and 0 in the padding, float32 [N, h, w].
        present: whether the sentence names something that is there, bool [N].
    """

    share: Tensor
    valid: Tensor
    present: Tensor


def total_loss(outputs: Outputs, target: Target, *, weights: LossWeights) -> Tensor:
    """Weighted sum of the losses that have a weight: this process's part of it.

    The parts of all processes add up to the loss of all their sentences together.
    """
    logits = outputs.logits.float()
    terms: list[tuple[float, Callable[[], Term]]] = [
        (weights.focal, lambda: focal_loss(logits, target)),
        (weights.dice, lambda: dice_loss(logits, target)),
        (weights.cross_entropy, lambda: cross_entropy(logits, target, weights.classes)),
        (weights.existence, lambda: existence_loss(outputs, target)),
    ]
    found = logits.new_zeros(())
    for factor, term in terms:
        if factor:
            part, count = term()
            found = found + factor * part / total(count).clamp(min=1e-9)
    return found


def focal_loss(logits: Tensor, target: Target) -> Term:
    """Focal loss on logits (Lin et al., arXiv 1708.02002), alpha 0.25, gamma 2; over sentences."""
    share = target.share
    plain = functional.binary_cross_entropy_with_logits(logits, share, reduction="none")
    probability = logits.sigmoid()
    right = probability * share + (1 - probability) * (1 - share)
    alpha = FOCAL_ALPHA * share + (1 - FOCAL_ALPHA) * (1 - share)
    return _over_sentences(alpha * (1 - right) ** FOCAL_GAMMA * plain, target)


def cross_entropy(
    logits: Tensor, target: Target, classes: tuple[float, float] | None = None
) -> Term:
    """Binary cross-entropy on logits: a mean over sentences, or weighted over all cells.

    Two channels and a softmax over them have the same cross-entropy as their difference here.
    """
    share = target.share
    plain = functional.binary_cross_entropy_with_logits(logits, share, reduction="none")
    if classes is None:
        return _over_sentences(plain, target)
    weight = (classes[0] * (1 - share) + classes[1] * share) * target.valid
    return (weight * plain).sum(), weight.sum()


def dice_loss(logits: Tensor, target: Target) -> Term:
    """1 - (2 sum pg + 1) / (sum p + sum g + 1), over the sentences that have a target."""
    probability = logits.sigmoid() * target.valid
    wanted = target.share * target.valid
    shared = 2 * (probability * wanted).sum((1, 2)) + DICE_SMOOTH
    both = probability.sum((1, 2)) + wanted.sum((1, 2)) + DICE_SMOOTH
    counted = target.present.to(logits.dtype)
    return ((1 - shared / both) * counted).sum(), counted.sum()


def existence_loss(outputs: Outputs, target: Target) -> Term:
    """Binary cross-entropy of the existence logit; zero for a network without one."""
    count = outputs.logits.new_tensor(float(len(target.present)))
    if outputs.existence is None:
        return outputs.logits.new_zeros(()), count
    found = outputs.existence.float()
    wanted = target.present.to(found.dtype)
    loss = functional.binary_cross_entropy_with_logits(found, wanted, reduction="sum")
    return loss, count


def _over_sentences(values: Tensor, target: Target) -> Term:
    """The sum over sentences of each one's mean over the valid cells, and their number."""
    valid = target.valid
    per_sentence = (values * valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
    return per_sentence.sum(), values.new_tensor(float(len(values)))
