"""The gate of engines: replay the golden vectors on this GPU, and write down that they passed."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Final

import rt_ris
from rt_ris.backends.tensorrt import here
from rt_ris.build.cache import kernels_identity
from rt_ris.build.find import find_engines
from rt_ris.build.gate import write_gate
from rt_ris.build.record import GateRecord
from rt_ris.build.replay import Replay, replay
from rt_ris.build.request import BUCKETS, Target
from rt_ris.bundle import Bundle
from rt_ris.errors import ParityError
from rt_ris.predictor import Predictor

COUNTS: Final = tuple(most for _, _, most in BUCKETS)
"""How many sentences at once are replayed on engines: the most that each profile takes."""


def missed(found: Replay) -> ParityError | None:
    """The error of the first comparison that is beyond its limit; None where all are within."""
    miss = found.first_miss
    if miss is None:
        return None
    return ParityError(
        f"This machine does not compute what PyTorch computed: '{miss.step}' is the first step "
        f"that differs, {miss.name!r} of picture {miss.case} is off by {miss.error:.2e} (limit "
        f"{miss.limit:.0e}).",
        stage=miss.step,
        error=miss.error,
    )


def write_passed(bundle: Bundle, target: Target, folder: Path, found: Replay) -> Path:
    """Write the gate record of a replay that was accepted.

    Raises:
        StorageError: the record could not be written.
    """
    place = here(target)
    records = find_engines(folder, bundle, place)
    limits = bundle.manifest.parity
    record = GateRecord(
        gpu=place.gpu,
        target=target,
        version=place.version,
        bundle_sha256=bundle.sha256,
        engines={record.engine: record.sha256 for record in records.values()},
        kernels=kernels_identity() if any(one.plugin for one in records.values()) else None,
        relative_error=found.worst(masks=False),
        relative_error_limit=limits.relative_error_limit,
        mask_iou=1 - found.worst(masks=True),
        mask_iou_limit=limits.mask_iou_limit,
        flips=found.flips,
        tied=found.tied,
        rt_ris=rt_ris.__version__,
        created=datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ"),
    )
    return write_gate(folder, record)


def gate_of_build(
    bundle: Bundle, target: Target, say: Callable[[str], None]
) -> Callable[[Path], None]:
    """What a build for the GPU that is here asks of its finished folder."""

    def accept(folder: Path) -> None:
        say("running the gate on this GPU")
        with Predictor.load(
            bundle.path, backend=target, engines=folder, allow_unverified=True
        ) as predictor:
            found = replay(bundle, predictor, counts=COUNTS)
        miss = missed(found)
        if miss is not None:
            raise ParityError(
                f"{miss} The engines are not kept. A build with --no-plugin, unless this was one, "
                "or of the bundle in float32 (rt-ris export --precision fp32) may pass.",
                stage=miss.stage,
                error=miss.error,
            )
        write_passed(bundle, target, folder, found)

    return accept
