from __future__ import annotations

import pytest
import torch

from rt_ris_train.threads import use_threads


def test_none_leaves_the_choice_to_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    use_threads(None)
    use_threads(3)
    assert asked == [3]
