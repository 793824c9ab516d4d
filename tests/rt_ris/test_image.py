from __future__ import annotations

import errno
import io
import os
import warnings
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import rt_ris.image
from rt_ris.errors import ImageError
from rt_ris.image import fit_box, load_image, prepare
from rt_ris.spec import Fit, ImageSpec, Resample

FITS: tuple[Fit, ...] = ("longest_side", "letterbox", "stretch")


def spec(size: int = 64, fit: Fit = "longest_side", resample: Resample = "bilinear") -> ImageSpec:
    return ImageSpec(size=size, fit=fit, resample=resample, mean=(0, 0, 0), std=(1, 1, 1))


def random_image(height: int, width: int, channels: int = 3) -> npt.NDArray[np.uint8]:
    draw = np.random.default_rng([height, width])
    return draw.integers(0, 256, (height, width, channels)).astype(np.uint8)


def saved(path: Path, image: Image.Image, **options: object) -> npt.NDArray[np.uint8]:
    image.save(path, **options)
    return load_image(path)


def test_all_ways_in_give_the_same_pixels(tmp_path: Path) -> None:
    pixels = random_image(5, 7)
    image = Image.fromarray(pixels)
    assert np.array_equal(saved(tmp_path / "a.png", image), pixels)
    assert np.array_equal(load_image(str(tmp_path / "a.png")), pixels)
    assert np.array_equal(load_image(image), pixels)
    assert np.array_equal(load_image(pixels), pixels)
    assert np.array_equal(load_image(pixels[:, ::-1])[:, ::-1], pixels)


def test_grey_is_repeated(tmp_path: Path) -> None:
    grey = random_image(4, 6)[..., 0]
    expected = np.repeat(grey[..., None], 3, axis=2)
    assert np.array_equal(load_image(grey), expected)
    assert np.array_equal(load_image(grey[..., None]), expected)
    assert np.array_equal(saved(tmp_path / "a.png", Image.fromarray(grey)), expected)


def test_transparency_is_laid_over_white(tmp_path: Path) -> None:
    pixels = random_image(4, 6, 4)
    pixels[0, 0, 3], pixels[0, 1, 3] = 0, 255
    loaded = load_image(pixels)
    assert np.array_equal(loaded[0, 0], [255, 255, 255])
    assert np.array_equal(loaded[0, 1], pixels[0, 1, :3])
    alpha = pixels[..., 3:] / 255
    assert np.abs(loaded - (pixels[..., :3] * alpha + 255 * (1 - alpha))).max() <= 0.5 + 1e-9
    assert np.array_equal(saved(tmp_path / "a.png", Image.fromarray(pixels)), loaded)


def test_transparent_palettes_and_grey_with_alpha(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.putpixel((1, 0), 1)
    assert saved(tmp_path / "a.png", palette).tolist() == [[[10, 20, 30], [40, 50, 60]]]
    through = saved(tmp_path / "b.png", palette, transparency=1)
    assert through.tolist() == [[[10, 20, 30], [255, 255, 255]]]
    assert load_image(Image.new("LA", (1, 1), (0, 0))).tolist() == [[[255, 255, 255]]]


@pytest.mark.parametrize("mode", ["1", "CMYK", "YCbCr", "HSV", "LAB"])
def test_other_modes_become_rgb(mode: str) -> None:
    assert load_image(Image.new(mode, (3, 2))).shape == (2, 3, 3)


@pytest.mark.parametrize(
    "format", ["BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP"]
)
def test_formats_are_read(tmp_path: Path, format: str) -> None:
    loaded = saved(tmp_path / "a", Image.new("RGB", (32, 16), (200, 90, 10)), format=format)
    assert loaded.shape == (16, 32, 3)
    assert np.abs(loaded.astype(int) - [200, 90, 10]).max() < 12


def test_cmyk_jpeg(tmp_path: Path) -> None:
    white = Image.new("CMYK", (8, 8), (0, 0, 0, 0))
    assert saved(tmp_path / "a.jpg", white).min() > 250


def test_sixteen_bits_are_scaled(tmp_path: Path) -> None:
    wide = np.array([[0, 128, 129, 32768, 65406, 65407, 65535]], dtype=np.uint16)
    expected = [0, 0, 1, 128, 254, 255, 255]
    assert load_image(wide)[0, :, 0].tolist() == expected
    assert saved(tmp_path / "a.png", Image.fromarray(wide))[0, :, 2].tolist() == expected
    assert saved(tmp_path / "a.tif", Image.fromarray(wide))[0, :, 2].tolist() == expected


def test_exif_orientation_is_applied(tmp_path: Path) -> None:
    pixels = np.zeros((16, 32, 3), dtype=np.uint8)
    pixels[:, :16] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated by 90 degrees clockwise
    turned = saved(tmp_path / "a.jpg", Image.fromarray(pixels), exif=exif, quality=95)
    assert turned.shape == (32, 16, 3)
    assert turned[:12].min() > 200
    assert turned[20:].max() < 60


@pytest.mark.parametrize(
    ("array", "hint"),
    [
        (np.zeros((4, 4, 3), dtype=np.float32), "0..255"),
        (np.zeros((3, 8, 8), dtype=np.uint8), "transpose"),
        (np.zeros((4, 4, 2), dtype=np.uint8), "accepted"),
        (np.zeros((1, 4, 4, 3), dtype=np.uint8), "accepted"),
        (np.zeros((4, 4), dtype=np.int64), "accepted"),
        (np.zeros((0, 4, 3), dtype=np.uint8), "no pixels"),
    ],
)
def test_other_arrays_are_refused(array: npt.NDArray[np.uint8], hint: str) -> None:
    with pytest.raises(ImageError, match=hint):
        load_image(array)


def test_other_things_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="given as int"):
        load_image(7)  # type: ignore[arg-type]
    with pytest.raises(ImageError, match="does not exist"):
        load_image(tmp_path / "no.png")
    with pytest.raises(ImageError, match="folder"):
        load_image(tmp_path)
    (tmp_path / "a.png").write_text("not a picture")
    with pytest.raises(ImageError, match="not a picture"):
        load_image(tmp_path / "a.png")
    (tmp_path / "a.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    with pytest.raises(ImageError, match="not a picture"):
        load_image(tmp_path / "a.eps")
    with pytest.raises(ImageError, match="floating-point"):
        load_image(Image.new("F", (2, 2)))
    with pytest.raises(ImageError, match="integer samples"):
        load_image(Image.new("I", (2, 2), 70_000))


@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "tif", "webp", "bmp"])
def test_a_cut_off_file_is_refused(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(random_image(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the decoders, about the damage
        with pytest.raises(ImageError):
            load_image(path)


def test_a_broken_image_object_is_refused_like_a_file(tmp_path: Path) -> None:
    Image.fromarray(random_image(64, 64)).save(tmp_path / "a.png")
    raw = (tmp_path / "a.png").read_bytes()
    with pytest.raises(ImageError, match="the given image is damaged or cut off"):
        load_image(Image.open(io.BytesIO(raw[: len(raw) // 2])))


def test_what_the_disk_refuses_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ImageError, match="cannot be read"):
        load_image(tmp_path / ("a" * 300))

    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ImageError, match="no permission"):
        load_image(tmp_path / "a.png")


def test_a_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "a.png")
    monkeypatch.setattr(rt_ris.image, "MAX_PIXELS", 9_999)
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("it was decoded"))
    with pytest.raises(ImageError, match="too many pixels"):
        load_image(tmp_path / "a.png")


@given(st.integers(1, 20_000), st.integers(1, 20_000), st.integers(1, 1024), st.sampled_from(FITS))
def test_the_valid_box_lies_inside_and_keeps_the_shape(
    height: int, width: int, size: int, fit: Fit
) -> None:
    box = fit_box(height, width, spec(size, fit))
    assert 0 <= box.top < box.bottom <= size
    assert 0 <= box.left < box.right <= size
    if fit == "stretch":
        assert (box.height, box.width) == (size, size)
        return
    longest = max(height, width)
    assert max(box.height, box.width) == size
    for scaled, side in ((box.height, height), (box.width, width)):
        assert scaled == max(1, int(np.floor(np.longdouble(side) * size / longest + 0.5)))
    if fit == "longest_side":
        assert (box.top, box.left) == (0, 0)
    else:
        assert 0 <= (size - box.bottom) - box.top <= 1
        assert 0 <= (size - box.right) - box.left <= 1


@pytest.mark.parametrize("fit", FITS)
@pytest.mark.parametrize("size", [(1, 1), (20_000, 3), (3, 20_000), (64, 64), (31, 33), (480, 640)])
@pytest.mark.parametrize("resample", ["bilinear", "bicubic"])
def test_pixels_outside_the_valid_box_are_zero(
    fit: Fit, size: tuple[int, int], resample: Resample
) -> None:
    image = np.full((*size, 3), 200, dtype=np.uint8)
    prepared = prepare(image, spec(64, fit, resample))
    box = prepared.box
    assert prepared.pixels.shape == (1, 64, 64, 3)
    assert prepared.pixels.dtype == np.uint8
    assert prepared.valid_box.dtype == np.int32
    assert prepared.valid_box.tolist() == [[box.top, box.left, box.bottom, box.right]]
    assert prepared.size == size
    inside = prepared.pixels[0, box.top : box.bottom, box.left : box.right]
    assert (inside == 200).all()
    assert prepared.pixels.sum() == inside.sum(dtype=np.int64)


def test_an_image_of_the_right_size_is_untouched() -> None:
    image = random_image(64, 64)
    assert np.array_equal(prepare(image, spec()).pixels[0], image)


def test_the_digest_tells_content_and_place() -> None:
    image = random_image(20, 30)
    one = prepare(image, spec())
    assert one.digest == prepare(image.copy(), spec()).digest
    assert one.digest != prepare(image ^ 1, spec()).digest
    black = np.zeros_like(image)
    assert prepare(black, spec()).digest != prepare(black, spec(fit="stretch")).digest


def test_prepare_takes_rgb_only() -> None:
    with pytest.raises(ImageError, match="load_image"):
        prepare(np.zeros((4, 4), dtype=np.uint8), spec())
