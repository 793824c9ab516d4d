"""Pictures: reading them from anywhere, and fitting them to the square input of a network.

This is the only definition of pre-processing; training and evaluation use it too.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps, UnidentifiedImageError

from rt_ris.errors import ImageError
from rt_ris.spec import ImageSpec
from rt_ris.warp import affine, fit_axis

MAX_PIXELS: Final = 80_000_000
"""Most pixels of a picture: 240 MB as RGB. Larger ones are refused before they are decoded."""

FORMATS: Final = ("BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")
"""File formats that are read; others of Pillow's would start programs or are too rarely tested."""

Pixels: TypeAlias = npt.NDArray[np.uint8]
ImageSource: TypeAlias = (
    str | os.PathLike[str] | Image.Image | npt.NDArray[np.uint8] | npt.NDArray[np.uint16]
)

_FILTERS: Final = {
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@dataclass(frozen=True)
class Box:
    """A half-open rectangle in pixels: rows top to bottom, columns left to right."""

    top: int
    left: int
    bottom: int
    right: int

    @property
    def height(self) -> int:
        """Number of rows."""
        return self.bottom - self.top

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.right - self.left


@dataclass(frozen=True, kw_only=True, eq=False)
class Prepared:
    """A picture as a network takes it.

    Attributes:
        pixels: uint8 [1, S, S, 3], zeros outside the valid area.
        valid_box: int32 [1, 4], top, left, bottom, right of the valid area.
        box: the same numbers.
        size: height and width of the original picture.
        warped: the picture was fitted by an affine warp, whose padding belongs to it.
    """

    pixels: Pixels
    valid_box: npt.NDArray[np.int32]
    box: Box
    size: tuple[int, int]
    warped: bool = False

    @cached_property
    def digest(self) -> bytes:
        """Identifies ``pixels`` and ``valid_box`` by content, 32 bytes."""
        digest = hashlib.sha256(self.valid_box.tobytes())
        digest.update(np.ascontiguousarray(self.pixels).data)
        return digest.digest()


def load_image(source: ImageSource) -> Pixels:
    """Read a picture as uint8 [H, W, 3] RGB.

    A file's EXIF orientation is applied, 16-bit samples are scaled to 8, transparency is laid over
    white, and grey, palette, CMYK and the like become RGB.

    Args:
        source: a path; a Pillow image; or an array, uint8 or uint16, [H, W], [H, W, 1],
            [H, W, 3] in RGB order or [H, W, 4] with alpha.

    Returns:
        uint8 [H, W, 3], C-contiguous; may share memory with an array that was given.

    Raises:
        ImageError: there is no such file, it may not be read, is no picture or damaged, has no
            pixels or more than ``MAX_PIXELS``, or an array has another type or shape.
    """
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, Image.Image):
        with _refusing("the given image"):
            return _decode(source, name="the given image")
    if isinstance(source, str | os.PathLike):
        return _from_file(Path(source))
    raise ImageError(
        f"A picture was given as {type(source).__name__}; accepted are a path, a Pillow image and "
        "a uint8 numpy array [H, W, 3] in RGB order."
    )


def prepare(image: Pixels, spec: ImageSpec) -> Prepared:
    """Resize a picture into the S x S input and say where it lies.

    Args:
        image: uint8 [H, W, 3], RGB.
        spec: how to fit it.

    Raises:
        ImageError: ``image`` is not such an array.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ImageError(
            f"prepare() got {image.dtype} {list(image.shape)}; accepted is uint8 [H, W, 3] with "
            "pixels in it. load_image() makes such an array from any picture."
        )
    height, width = image.shape[:2]
    box = fit_box(height, width, spec)
    valid = np.array([[box.top, box.left, box.bottom, box.right]], dtype=np.int32)
    warped = spec.fit == "warp"
    pixels = _warp(image, spec) if warped else _resize(image, box, spec)
    return Prepared(
        pixels=pixels[None], valid_box=valid, box=box, size=(height, width), warped=warped
    )


def _resize(image: Pixels, box: Box, spec: ImageSpec) -> Pixels:
    """uint8 [S, S, 3], zeros outside the box."""
    resized = Image.fromarray(np.ascontiguousarray(image)).resize(
        (box.width, box.height), _FILTERS[spec.resample]
    )
    pixels = np.zeros((spec.size, spec.size, 3), dtype=np.uint8)
    pixels[box.top : box.bottom, box.left : box.right] = np.asarray(resized)
    return pixels


def _warp(image: Pixels, spec: ImageSpec) -> Pixels:
    """uint8 [S, S, 3], ``fill`` outside the picture.

    OpenCV rounds the products of two weights to 15 bits; here they are exact, so that a value in a
    few hundred differs by one.
    """
    fill = np.array(spec.fill, dtype=np.float32)
    values = image.astype(np.float32) - fill
    for rows in (True, False):  # the columns after turning
        length = len(values)
        scale, first = fit_axis(length, spec.size, longest=max(image.shape[:2]))
        taps = affine(length, spec.size, scale=1 / scale, offset=-first / scale, rows=rows)
        values = taps.apply(values).transpose(1, 0, 2)
    rounded: Pixels = np.clip(np.rint(values + fill), 0, 255).astype(np.uint8)
    return np.ascontiguousarray(rounded)


def fit_box(height: int, width: int, spec: ImageSpec) -> Box:
    """The part of the S x S input that a picture of this size fills; never empty, all of a warp."""
    side, longest = spec.size, max(height, width)
    if spec.fit in ("stretch", "warp"):
        return Box(0, 0, side, side)
    rows, columns = _scaled(height, side, longest), _scaled(width, side, longest)
    centred = spec.fit == "letterbox"
    top = (side - rows) // 2 if centred else 0
    left = (side - columns) // 2 if centred else 0
    return Box(top, left, top + rows, left + columns)


def _scaled(length: int, side: int, longest: int) -> int:
    """``floor(length * side / longest + 0.5)`` in exact arithmetic, at least 1."""
    return max(1, (2 * length * side + longest) // (2 * longest))


def _from_file(path: Path) -> Pixels:
    with _refusing(str(path)):
        if not path.is_file():
            what = "is a folder, not a picture" if path.is_dir() else "does not exist"
            raise ImageError(f"{path} {what}; give the path of a picture.")
        with Image.open(path, formats=FORMATS) as image:
            return _decode(image, name=str(path))


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Turn whatever Pillow and the disk raise into an ``ImageError``."""
    try:
        yield
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise _too_large(name, str(error)) from error
    except UnidentifiedImageError as error:
        accepted = ", ".join(FORMATS)
        raise ImageError(
            f"{name} is not a picture that can be read; accepted are {accepted}."
        ) from error
    except Exception as error:  # decoders raise anything on damaged files
        raise ImageError(_why_unreadable(name, error)) from error


def _why_unreadable(name: str, error: Exception) -> str:
    """One sentence; only the disk's own errors have a number, those of decoders have none."""
    if not isinstance(error, OSError) or error.errno is None:
        return f"{name} is damaged or cut off ({error}); copy or download it again."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"{name} may not be read (no permission); change its or its folder's mode."
    return f"{name} cannot be read ({error.strerror}); give the path of a picture."


def _decode(image: Image.Image, *, name: str) -> Pixels:
    """Decode, turn upright, convert."""
    _check_size(image.height, image.width, name=name)
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I"):
        return _from_integers(np.asarray(upright), name=name)
    if upright.mode == "F":
        raise ImageError(f"{name} has floating-point samples; convert it to 8 or 16 bits first.")
    if upright.has_transparency_data:
        return _over_white(np.asarray(upright.convert("RGBA")))
    return np.ascontiguousarray(np.asarray(upright.convert("RGB")))


def _from_integers(samples: npt.NDArray[np.generic], *, name: str) -> Pixels:
    """Grey samples wider than 8 bits; Pillow reads 16-bit files into 16 or 32 bits."""
    wide = samples.astype(np.int64)
    if wide.min() < 0 or wide.max() > 65535:
        raise ImageError(
            f"{name} has integer samples from {wide.min()} to {wide.max()}; accepted are 8 and 16 "
            "bits. Scale it first."
        )
    return _from_array(wide.astype(np.uint16))


def _from_array(array: npt.NDArray[np.generic]) -> Pixels:
    _check_array(array)
    _check_size(array.shape[0], array.shape[1], name="the given array")
    samples = _to_8_bits(array)
    if samples.ndim == 2 or samples.shape[2] == 1:
        return np.repeat(samples.reshape(*samples.shape[:2], 1), 3, axis=2)
    if samples.shape[2] == 4:
        return _over_white(samples)
    return np.ascontiguousarray(samples)


def _check_array(array: npt.NDArray[np.generic]) -> None:
    shape_ok = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype in (np.dtype(np.uint8), np.dtype(np.uint16)) and shape_ok:
        return
    hint = ""
    if array.ndim == 3 and not shape_ok and array.shape[0] in (1, 3, 4):
        hint = " Channels seem to come first; use array.transpose(1, 2, 0)."
    elif array.dtype.kind == "f":
        hint = " Scale floating-point pixels to 0..255 and use array.astype(numpy.uint8)."
    raise ImageError(
        f"The picture was given as {array.dtype} {list(array.shape)}; accepted are uint8 and "
        f"uint16 [H, W], [H, W, 3] in RGB order and [H, W, 4].{hint}"
    )


def _to_8_bits(array: npt.NDArray[np.generic]) -> Pixels:
    """Full scale stays full scale: 65535 becomes 255, to the nearest."""
    if array.dtype == np.uint8:
        return array.astype(np.uint8, copy=False)
    return ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)


def _over_white(rgba: Pixels) -> Pixels:
    """uint8 [H, W, 4] -> [H, W, 3]: the picture on white paper, to the nearest."""
    alpha = rgba[..., 3:].astype(np.uint32)
    mixed = rgba[..., :3] * alpha + 255 * (255 - alpha)
    return ((mixed + 127) // 255).astype(np.uint8)


def _check_size(height: int, width: int, *, name: str) -> None:
    if height < 1 or width < 1:
        raise ImageError(f"{name} has no pixels: {width} x {height}; give a picture with content.")
    if height * width > MAX_PIXELS:
        raise _too_large(name, f"{width} x {height}")


def _too_large(name: str, size: str) -> ImageError:
    return ImageError(
        f"{name} has too many pixels ({size}); at most {MAX_PIXELS} are read. Shrink it first."
    )
