"""Make ``export/rt_ris_export/gate/third_party.npz``: what others make of pictures and logits.

Every export compares ``rt_ris.image`` and ``rt_ris.mask`` with these, so that a fault of theirs is
not compared with itself. Truths are segment-anything 1.0, torchvision, PyTorch, Pillow's own
``ImageOps.pad``, and OpenCV 4.12 by way of ``tests/fixtures/opencv.npz``.

    python tools/third_party_vectors.py
"""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps
from segment_anything.modeling import Sam
from segment_anything.utils.transforms import ResizeLongestSide
from torch.nn import functional
from torchvision.io import decode_png
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as vision

ROOT: Final = Path(__file__).parent.parent
STORED: Final = ROOT / "export" / "rt_ris_export" / "gate" / "third_party.npz"
OPENCV: Final = ROOT / "tests" / "fixtures" / "opencv.npz"

SIDE: Final = 48
GRID: Final = 12
SIZES: Final = ((30, 41), (61, 23), (70, 97))
"""Height and width: wide, tall, larger than the input; none has a side that ends on a half."""

OPENCV_CASES: Final = (0, 1, 8)

Array = npt.NDArray[Any]


def vectors() -> dict[str, Array]:
    """Everything but OpenCV's part, by ``<what>/<rule>/<number>/<part>``."""
    draw = np.random.default_rng(11)
    arrays: dict[str, Array] = {}
    for number, (height, width) in enumerate(SIZES):
        noise = draw.integers(0, 256, (height // 4 + 2, width // 4 + 2, 3), dtype=np.uint8)
        smooth = Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)
        picture = np.asarray(smooth)
        logits = draw.normal(0.0, 3.0, (GRID, GRID)).astype(np.float32)
        arrays[f"picture/any/{number}/picture"] = picture
        for rule, prepared in preparations(smooth).items():
            arrays[f"prepare/{rule}/{number}/pixels"] = prepared
        for rule, placed in placements(logits, (height, width)).items():
            arrays[f"mask/{rule}/{number}/logits"] = logits
            arrays[f"mask/{rule}/{number}/size"] = np.array((height, width))
            arrays[f"mask/{rule}/{number}/placed"] = placed
    stream = io.BytesIO()
    smooth.save(stream, "PNG")
    content = np.frombuffer(stream.getvalue(), np.uint8)
    arrays["load/png/0/content"] = content
    arrays["load/png/0/pixels"] = (
        decode_png(torch.from_numpy(content.copy())).permute(1, 2, 0).numpy()
    )
    scores = torch.linspace(-4, 4, 161)
    arrays["threshold/logits/0/values"] = scores.numpy()
    for threshold in (0.35, 0.5):
        arrays[f"threshold/{threshold}/0/inside"] = (scores.sigmoid() > threshold).numpy()
    return arrays


def preparations(picture: Image.Image) -> dict[str, Array]:
    """A picture on the input by each rule, uint8 [S, S, 3]."""
    longest = ResizeLongestSide(SIDE).apply_image(np.asarray(picture))
    padded = np.zeros((SIDE, SIDE, 3), dtype=np.uint8)
    padded[: longest.shape[0], : longest.shape[1]] = longest
    square = [SIDE, SIDE]
    return {
        "longest_side-bilinear": padded,
        "letterbox-bilinear": np.asarray(
            ImageOps.pad(picture, (SIDE, SIDE), Image.Resampling.BILINEAR, color=(0, 0, 0))
        ),
        "stretch-bilinear": np.asarray(vision.resize(picture, square, InterpolationMode.BILINEAR)),
        "stretch-bicubic": np.asarray(vision.resize(picture, square, InterpolationMode.BICUBIC)),
    }


def placements(logits: Array, size: tuple[int, int]) -> dict[str, Array]:
    """Logits at the picture's size by each rule, float32 [H, W]."""
    given = torch.from_numpy(logits)[None, None]
    sam: Any = SimpleNamespace(image_encoder=SimpleNamespace(img_size=SIDE))
    within = ResizeLongestSide.get_preprocess_shape(*size, SIDE)
    corners = functional.interpolate(given, (SIDE, SIDE), mode="bilinear", align_corners=True)
    return {
        "longest_side-bilinear": Sam.postprocess_masks(sam, given, within, size)[0, 0].numpy(),
        "stretch-bilinear_corners": functional.interpolate(corners, size, mode="bilinear")[
            0, 0
        ].numpy(),
    }


def opencv() -> dict[str, Array]:
    """OpenCV's warps, from the fixture."""
    arrays: dict[str, Array] = {}
    with np.load(OPENCV) as stored:
        for number, case in enumerate(OPENCV_CASES):
            picture = stored[f"{case}.smooth"]
            arrays[f"picture/warp-bicubic/{number}/picture"] = picture
            arrays[f"prepare/warp-bicubic/{number}/pixels"] = stored[f"{case}.smooth.warped"]
            arrays[f"mask/warp-bicubic_corners/{number}/logits"] = stored[f"{case}.grid"]
            arrays[f"mask/warp-bicubic_corners/{number}/size"] = np.array(picture.shape[:2])
            arrays[f"mask/warp-bicubic_corners/{number}/placed"] = stored[f"{case}.grid.back"]
    return arrays


def main() -> None:
    """Write the vectors."""
    np.savez_compressed(STORED, **vectors(), **opencv())  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
