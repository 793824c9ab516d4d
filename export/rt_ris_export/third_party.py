"""Whether pictures and masks are handled as others handle them.

The gate starts from what ``rt_ris.image`` makes of a picture and ends with what ``rt_ris.mask``
makes of logits, on both of its sides; a fault of theirs would be compared with itself. So each gate
first compares the two with stored results of segment-anything, torchvision, PyTorch, Pillow and
OpenCV (``tools/third_party_vectors.py``).
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from importlib import resources
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt
from PIL import Image

from rt_ris.errors import ParityError
from rt_ris.image import load_image, prepare
from rt_ris.mask import Mask, Placement, place
from rt_ris.spec import Fit, ImageSpec, MaskSpec, Resample, Upsample

PREPARE: Final = "prepare"
MASK: Final = "mask"

SIDE: Final = 48
"""Of the input in the stored results."""

WARP_FILL: Final = (123, 117, 104)
WARP_SHARE: Final = 0.005
"""OpenCV rounds its weights to 15 bits: so many values of a warp may be off, by one level."""

PLACED_LIMIT: Final = 1.0e-5
"""Largest difference of placed logits, as a share of the largest; float32 rounds at 1e-6."""

_SOURCES: Final[Mapping[str, str]] = {
    "png": "torchvision",
    "longest_side-bilinear": "segment-anything",
    "letterbox-bilinear": "Pillow's ImageOps.pad",
    "stretch-bilinear": "torchvision",
    "stretch-bicubic": "torchvision",
    "stretch-bilinear_corners": "PyTorch",
    "warp-bicubic": "OpenCV",
    "warp-bicubic_corners": "OpenCV",
}

Case = Mapping[str, npt.NDArray[Any]]


def check_conventions() -> None:
    """Compare the runtime's handling of pictures and masks with that of others.

    Raises:
        ParityError: they differ; ``stage`` is ``prepare`` or ``mask``.
    """
    cases = _cases()
    for rule, case in cases["load"] + cases["prepare"]:
        share = _loaded(case) if rule == "png" else _prepared(rule, case)
        if share > (WARP_SHARE if rule.startswith("warp") else 0.0):
            raise _differs(PREPARE, rule, f"{share:.1%} of the values of a picture differ")
    for rule, case in cases["mask"]:
        off = _placed(rule, case)
        if not off <= PLACED_LIMIT:
            raise _differs(MASK, rule, f"placed logits differ by up to {off:.1e}")
    scores = cases["threshold"].pop(0)[1]["values"]
    for rule, case in cases["threshold"]:
        share = float((_inside(scores, float(rule)) != case["inside"]).mean())
        if share:
            raise ParityError(
                f"rt_ris.mask puts {share:.1%} of the pixels on the other side of the threshold "
                f"{rule} than PyTorch's sigmoid does. Mend it; no bundle was written.",
                stage=MASK,
                error=share,
            )


def _cases() -> dict[str, list[tuple[str, Case]]]:
    """``what`` -> (rule, arrays by part), in the stored order."""
    raw = (resources.files("rt_ris_export") / "gate" / "third_party.npz").read_bytes()
    grouped: dict[tuple[str, str, str], dict[str, npt.NDArray[Any]]] = {}
    with np.load(io.BytesIO(raw), allow_pickle=False) as stored:
        for name in stored.files:
            what, rule, number, part = name.split("/")
            grouped.setdefault((what, rule, number), {})[part] = stored[name]
    found: dict[str, list[tuple[str, Case]]] = {}
    for (what, rule, number), case in grouped.items():
        if what == "prepare":
            source = rule if rule.startswith("warp") else "any"
            case |= grouped["picture", source, number]
        if what != "picture":
            found.setdefault(what, []).append((rule, case))
    return found


def _loaded(case: Case) -> float:
    """Share of values that a file gives otherwise."""
    found = load_image(Image.open(io.BytesIO(case["content"].tobytes())))
    return float((found != case["pixels"]).mean()) if found.shape == case["pixels"].shape else 1.0


def _prepared(rule: str, case: Case) -> float:
    """Share of values that are off; all of them where one of a warp is off by more than one."""
    found, truth = prepare(case["picture"], _image_spec(rule)).pixels[0], case["pixels"]
    off = np.abs(found.astype(np.int64) - truth.astype(np.int64))
    return 1.0 if off.max() > 1 and rule.startswith("warp") else float((off > 0).mean())


def _image_spec(rule: str) -> ImageSpec:
    fit, resample = rule.split("-")
    return ImageSpec(
        size=SIDE,
        fit=cast(Fit, fit),
        resample=cast(Resample, resample),
        fill=WARP_FILL,
        mean=(0.0, 0.0, 0.0),
        std=(1.0, 1.0, 1.0),
    )


def _placed(rule: str, case: Case) -> float:
    """The largest difference of logits at the picture's size."""
    fit, upsample = rule.split("-")
    height, width = (int(length) for length in case["size"])
    blank = np.zeros((height, width, 3), dtype=np.uint8)
    prepared = prepare(blank, _image_spec(f"{fit}-bilinear"))
    placed = place(case["logits"], Placement.of(prepared), upsample=cast(Upsample, upsample))
    return float(np.abs(placed - case["placed"]).max() / np.abs(case["placed"]).max())


def _inside(scores: npt.NDArray[np.float32], threshold: float) -> npt.NDArray[np.bool_]:
    """What a mask takes, of logits that need no resizing."""
    row = np.repeat(scores[None], len(scores), axis=0)
    mask = Mask(
        sentence="",
        logits=row,
        existence=None,
        truncated_after=None,
        placement=Placement.on_input(len(scores)),
        spec=MaskSpec(size=len(scores), threshold=threshold),
    )
    return np.asarray(mask.binary[0], dtype=np.bool_)


def _differs(stage: str, rule: str, what: str) -> ParityError:
    return ParityError(
        f"rt_ris.{'image' if stage == PREPARE else 'mask'} does not do by the rule '{rule}' what "
        f"{_SOURCES[rule]} does: {what}. Mend it; no bundle was written.",
        stage=stage,
        error=1.0,
    )
