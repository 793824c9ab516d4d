"""How many processor threads PyTorch uses."""

from __future__ import annotations

import torch


def use_threads(count: int | None) -> None:
    """Use ``count`` threads from now on; None leaves the choice to PyTorch."""
    if count is not None:
        torch.set_num_threads(count)
