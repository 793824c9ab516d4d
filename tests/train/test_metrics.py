from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from rt_ris_train.metrics import Metrics, MetricsByKind


def square(*, side: int, at: int = 0) -> npt.NDArray[np.bool_]:
    mask = np.zeros((10, 10), dtype=bool)
    mask[at : at + side, at : at + side] = True
    return mask


def empty() -> npt.NDArray[np.bool_]:
    return np.zeros((10, 10), dtype=bool)


def test_hand_computed_numbers() -> None:
    metrics = Metrics()
    metrics.update(square(side=4), square(side=4), absent=False)  # 16 of 16
    metrics.update(square(side=2), square(side=4), absent=False)  # 4 of 16
    found = metrics.summary()
    assert found["oIoU"] == pytest.approx(100 * 20 / 32)
    assert found["mIoU"] == pytest.approx(100 * (1 + 0.25) / 2)
    assert found["Pr@0.5"] == 50.0
    assert found["Pr@0.9"] == 50.0
    assert found["T_acc"] == 100.0
    assert found["N_acc"] is None


def test_a_precision_bound_includes_itself() -> None:
    metrics = Metrics()
    half = square(side=10)
    half[5:] = False
    metrics.update(half, square(side=10), absent=False)
    assert metrics.summary()["Pr@0.5"] == 100.0
    assert metrics.summary()["Pr@0.6"] == 0.0


def test_sentences_without_a_target_leave_overall_iou_alone() -> None:
    metrics = Metrics()
    metrics.update(square(side=4), square(side=4), absent=False)
    metrics.update(square(side=3), empty(), absent=True)
    metrics.update(empty(), empty(), absent=True)
    found = metrics.summary()
    assert found["oIoU"] == 100.0
    assert found["N_acc"] == 50.0
    assert found["gIoU"] == pytest.approx(100 * 2 / 3)
    assert found["cIoU"] == pytest.approx(100 * 16 / 25)


def test_a_rejected_target_counts_its_whole_area() -> None:
    metrics = Metrics()
    metrics.update(empty(), square(side=4), absent=False)
    found = metrics.summary()
    assert found["T_acc"] == 0.0
    assert found["cIoU"] == 0.0
    assert found["gIoU"] == 0.0


def test_only_absent_sentences_have_no_overall_iou() -> None:
    metrics = Metrics()
    metrics.update(square(side=2), empty(), absent=True)
    assert metrics.summary()["oIoU"] is None


def test_kinds_are_counted_apart() -> None:
    metrics = MetricsByKind()
    metrics.update(square(side=4), square(side=4), absent=False, kind="size")
    metrics.update(empty(), square(side=4), absent=False, kind="colour")
    found = metrics.summary()
    kinds = found["kinds"]
    assert isinstance(kinds, dict)
    assert kinds["size"]["oIoU"] == 100.0
    assert kinds["colour"]["oIoU"] == 0.0
    assert found["sentences"] == 2


def test_a_target_that_a_small_grid_has_lost_is_a_target_still() -> None:
    metrics = Metrics()
    metrics.update(square(side=4), square(side=4), absent=False)
    metrics.update(empty(), empty(), absent=False)
    metrics.update(square(side=4), empty(), absent=False)
    found = metrics.summary()
    assert (found["targeted"], found["no_target"]) == (3, 0)
    assert found["mIoU"] == pytest.approx(100 / 3)
    assert found["oIoU"] == pytest.approx(100 * 16 / 32)
    assert found["N_acc"] is None


def test_a_rejected_mask_counts_as_none_except_in_the_union_of_ciou() -> None:
    """ReLA's evaluator takes the union before it looks at what was decided."""
    metrics = Metrics()
    metrics.update(square(side=4, at=2), square(side=4), absent=False, rejected=True)
    found = metrics.summary()
    assert found["T_acc"] == 0.0
    assert (metrics.intersection, metrics.union) == (0, 16)
    assert (metrics.generous_intersection, metrics.generous_union) == (0, 16 + 16 - 4)
    metrics.update(square(side=3), empty(), absent=True, rejected=True)
    assert metrics.summary()["N_acc"] == 100.0
    assert metrics.generous_union == 16 + 16 - 4


def test_strict_precision_leaves_the_bound_itself_out() -> None:
    metrics = Metrics()
    half = square(side=10)
    half[5:] = False
    metrics.update(half, square(side=10), absent=False)
    assert metrics.summary(strict=True)["Pr@0.5"] == 0.0
    assert metrics.summary()["Pr@0.5"] == 100.0
