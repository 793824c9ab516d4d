"""Mutual-aware attention of MARIS (arXiv 2311.15727 v1, section 3.2, equations 3 to 5)."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

OPERATOR = "rt_ris::MaskedMutualAttention"
FUSED = "masked_mutual_attention"
"""The CUDA kernel as a PyTorch operator, where something has registered it (rt_ris_kernels)."""
MASKED = -1e4
"""A score that softmax turns into zero; finite, so that half precision stays clean."""

MASS_FLOOR = 1e-6
"""Keeps the mean over a word's pixels finite where no pixel attends to the word."""

LanguageGuided = Literal["transpose", "normalized"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The operator's attributes.

    Attributes:
        threshold: tau, a probability; the test is made on the score, against logit(tau).
        scale: factor of the scores.
        epsilon: of both LayerNorms.
        normalize: divide what a word collects by the total weight of its pixels.
    """

    threshold: float = 0.5
    scale: float = 1.0
    epsilon: float = 1e-5
    normalize: bool = False


def masked_mutual_attention(
    z_v: Tensor,
    z_l: Tensor,
    *,
    word_mask: Tensor,
    norms: tuple[Tensor, Tensor, Tensor, Tensor],
    settings: Settings,
) -> tuple[Tensor, Tensor]:
    """Attend from pixels to the words that concern them, and back with the same weights.

    A pixel with no word at or above the threshold attends to nothing: its row of weights is
    zero, as PyTorch's scaled_dot_product_attention does for a row without visible keys.

    Args:
        z_v: pixels, [N or 1, P, C].
        z_l: words, [N, L, C].
        word_mask: 1 for a real word and 0 for padding, [N, L], of the same dtype.
        norms: weight and bias [C] of the pixels' LayerNorm, then of the words'.
        settings: the operator's attributes.

    Returns:
        Language-aware pixels [N, P, C] and vision-aware words [N, L, C].
    """
    if torch.onnx.is_in_onnx_export():
        return _as_node((z_v, z_l, word_mask, *norms), settings)
    if z_v.is_cuda and hasattr(torch.ops.rt_ris, FUSED):
        fused = getattr(torch.ops.rt_ris, FUSED)
        tensors = (z_v, z_l, word_mask, *norms)
        outputs: tuple[Tensor, Tensor] = fused(
            *(tensor.float() for tensor in tensors),
            settings.threshold,
            settings.scale,
            settings.epsilon,
            int(settings.normalize),
        )
        return outputs
    with _single_precision(z_v.device.type):
        # A hard test follows, so the scores and the sums over pixels stay in single precision.
        z_v, z_l = z_v.float(), z_l.float()
        scores = z_v @ z_l.transpose(1, 2) * settings.scale
        bound = math.log(settings.threshold / (1 - settings.threshold))
        keep = (scores.detach() >= bound) & (word_mask[:, None] > 0)
        weights = torch.where(keep, scores, MASKED).softmax(-1) * keep
        collected = weights.transpose(1, 2) @ z_v
        if settings.normalize:
            collected = collected / (weights.sum(1)[..., None] + MASS_FLOOR)
    width = (z_v.shape[-1],)
    pixels = functional.layer_norm(weights @ z_l + z_v, width, norms[0], norms[1], settings.epsilon)
    words = functional.layer_norm(collected + z_l, width, norms[2], norms[3], settings.epsilon)
    return pixels, words


def _single_precision(device: str) -> AbstractContextManager[object]:
    """Switch autocast off where there is one; ``meta``, where sizes are counted, has none."""
    if torch.amp.is_autocast_available(device):
        return torch.autocast(device, enabled=False)
    return nullcontext()


def _as_node(inputs: tuple[Tensor, ...], settings: Settings) -> tuple[Tensor, Tensor]:
    """One node of the project's own domain, so that a plugin can take its place."""
    z_v, z_l = inputs[:2]
    expressions, words, width = z_l.shape
    pixels, found = torch.onnx.ops.symbolic_multi_out(
        OPERATOR,
        inputs,
        attrs={
            "threshold": settings.threshold,
            "scale": settings.scale,
            "epsilon": settings.epsilon,
            "normalize": int(settings.normalize),
            "plugin_namespace": "rt_ris",
            "plugin_version": "1",
        },
        dtypes=(z_l.dtype, z_l.dtype),
        shapes=((expressions, z_v.shape[1], width), (expressions, words, width)),
        version=1,
    )
    return pixels, found


class MutualAttention(nn.Module):
    """One mutual-aware attention block, from already projected features.

    ``project_v`` and ``project_l`` are W_v and W_l of equation 3. They are called apart from the
    attention, because the first block's belong to the stages that are cached per picture and
    per sentence.
    """

    def __init__(
        self,
        *,
        width: int,
        pixel_width: int,
        word_width: int,
        threshold: float,
        scaled: bool,
        lga: LanguageGuided,
    ) -> None:
        super().__init__()
        self.project_v = nn.Linear(pixel_width, width, bias=False)
        self.project_l = nn.Linear(word_width, width, bias=False)
        self.norm_v = nn.LayerNorm(width)
        self.norm_l = nn.LayerNorm(width)
        self.settings = Settings(
            threshold=threshold,
            scale=width**-0.5 if scaled else 1.0,
            epsilon=self.norm_v.eps,
            normalize=lga == "normalized",
        )
        for projection in (self.project_v, self.project_l):
            # Unscaled products of two C-wide vectors: small weights keep first scores near zero.
            nn.init.normal_(projection.weight, std=0.02)

    def forward(self, z_v: Tensor, z_l: Tensor, word_mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels [N or 1, P, C], words [N, L, C], bool [N, L] to F_lav and F_val of equation 5."""
        return masked_mutual_attention(
            z_v,
            z_l,
            word_mask=word_mask.to(z_l.dtype),
            norms=(self.norm_v.weight, self.norm_v.bias, self.norm_l.weight, self.norm_l.bias),
            settings=self.settings,
        )
