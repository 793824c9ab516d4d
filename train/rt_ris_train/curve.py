"""The curve of a training run, drawn from its log."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from rt_ris_train.loop import read_log

matplotlib.use("Agg")


def draw_curve(log: Path, out: Path) -> None:
    """Loss and IoU over steps.

    Args:
        log: the ``log.jsonl`` of a run.
        out: picture to write; the suffix chooses the format.
    """
    import matplotlib.pyplot as plt

    lines = read_log(log)
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    left.plot([line["step"] for line in lines], [line["loss"] for line in lines], linewidth=1)
    left.set(xlabel="step", ylabel="training loss")
    right.plot(
        [line["step"] for line in lines],
        [line["iou"] for line in lines],
        linewidth=0.6,
        alpha=0.5,
        label="training batch",
    )
    checked = [line for line in lines if line["validation"]]
    for name in ("oIoU", "mIoU"):
        values = [line["validation"][name] for line in checked]  # type: ignore[index]
        right.plot([line["step"] for line in checked], values, marker=".", label=f"val {name}")
    right.set(xlabel="step", ylabel="IoU on the logit grid, points of 100")
    right.legend()
    figure.savefig(out, dpi=110)
    plt.close(figure)
