"""Losses on mask logits; each is a mean over sentences of a mean over the valid cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from torch.nn import functional

from rt_ris_train.architecture import Outputs

FOCAL_ALPHA = 0.25
FOCAL_GAMMA = 2.0
DICE_SMOOTH = 1.0


@dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Factor of each term; MARIS prints focal 1 and dice 1."""

    focal: float = 1.0
    dice: float = 1.0
    cross_entropy: float = 0.0
    existence: float = 0.0


def total_loss(
    outputs: Outputs, target: Tensor, valid: Tensor, present: Tensor, *, weights: LossWeights
) -> Tensor:
    """Weighted sum of the losses that have a weight.

    Args:
        outputs: of N sentences.
        target: share of each cell that the mask covers, float32 [N, h, w] in 0..1.
        valid: 1 inside the picture and 0 in the padding, float32 [N, h, w].
        present: whether the sentence names something that is there, bool [N].
        weights: factor of each term.
    """
    logits = outputs.logits.float()
    terms: dict[str, Callable[[], Tensor]] = {
        "focal": lambda: focal_loss(logits, target, valid),
        "dice": lambda: dice_loss(logits, target, valid, present),
        "cross_entropy": lambda: cross_entropy(logits, target, valid),
        "existence": lambda: existence_loss(outputs, present),
    }
    factors = asdict(weights)
    chosen = [factors[name] * term() for name, term in terms.items() if factors[name]]
    return torch.stack(chosen).sum()


def focal_loss(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Focal loss on logits (Lin et al., arXiv 1708.02002), alpha 0.25, gamma 2."""
    plain = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    right = probability * target + (1 - probability) * (1 - target)
    alpha = FOCAL_ALPHA * target + (1 - FOCAL_ALPHA) * (1 - target)
    return _masked_mean(alpha * (1 - right) ** FOCAL_GAMMA * plain, valid)


def cross_entropy(logits: Tensor, target: Tensor, valid: Tensor) -> Tensor:
    """Binary cross-entropy on logits."""
    plain = functional.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return _masked_mean(plain, valid)


def dice_loss(logits: Tensor, target: Tensor, valid: Tensor, present: Tensor) -> Tensor:
    """1 - (2 sum pg + 1) / (sum p + sum g + 1), over the sentences that have a target."""
    probability = logits.sigmoid() * valid
    wanted = target * valid
    shared = 2 * (probability * wanted).sum((1, 2)) + DICE_SMOOTH
    total = probability.sum((1, 2)) + wanted.sum((1, 2)) + DICE_SMOOTH
    counted = present.to(logits.dtype)
    return ((1 - shared / total) * counted).sum() / counted.sum().clamp(min=1)


def existence_loss(outputs: Outputs, present: Tensor) -> Tensor:
    """Binary cross-entropy of the existence logit; zero for a network without one."""
    if outputs.existence is None:
        return outputs.logits.new_zeros(())
    found = outputs.existence.float()
    return functional.binary_cross_entropy_with_logits(found, present.to(found.dtype))


def _masked_mean(values: Tensor, valid: Tensor) -> Tensor:
    per_sentence = (values * valid).sum((1, 2)) / valid.sum((1, 2)).clamp(min=1)
    return per_sentence.mean()
