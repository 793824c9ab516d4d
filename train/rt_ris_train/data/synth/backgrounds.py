"""Backgrounds: photographs in pip packages, a folder of one's own, and textures from noise."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance, ImageFilter

from rt_ris.errors import DataError
from rt_ris_train.data.synth.vocabulary import Vocabulary, read_table

SPLITS: tuple[str, ...] = ("train", "val", "test")
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
_LONGEST_SIDE = 1200  # pixels kept of a photograph: twice a scene, so that crops stay sharp
_PACKAGED = {
    "skimage": ("data", ("brick.png", "grass.png", "gravel.png", "rocket.jpg", "ihc.png")),
    "sklearn": ("datasets/images", ("china.jpg", "flower.jpg")),
}
_TEXTURE_SHARE = 0.25  # of the scenes whose split has photographs


@dataclass(frozen=True)
class Background:
    """A picture to put things on.

    Attributes:
        path: of the file.
        shows: nouns that it deserves itself, as far as the table knows it.
    """

    path: Path
    shows: frozenset[str]


def find_backgrounds(folder: Path | None, vocabulary: Vocabulary) -> list[Background]:
    """The photographs of installed packages, and every picture in `folder`, sorted by name.

    Raises:
        DataError: if `folder` is given and holds no picture.
    """
    paths = _packaged_pictures()
    if folder is not None:
        own = [p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file()]
        if not own:
            raise DataError(
                f"'{folder}' holds no picture. Give a folder with {', '.join(_SUFFIXES)} files, "
                "or leave it out to use the photographs of scikit-image and scikit-learn."
            )
        paths += own
    shown = dict(_pad(row) for row in read_table("backgrounds.tsv"))
    return [
        Background(path, _possible(shown.get(path.name, ""), vocabulary))
        for path in sorted(paths, key=lambda p: p.name)
    ]


def share_out(backgrounds: Sequence[Background]) -> dict[str, list[Background]]:
    """Divide the pictures among the splits, so that val and test stand on unseen ones.

    About one in seven goes to val and one in seven to test, chosen by the hash of the name: a
    picture keeps its split when others are added.
    """
    shares: dict[str, list[Background]] = {split: [] for split in SPLITS}
    for background in backgrounds:
        digest = hashlib.sha256(_family(background.path.stem).encode()).digest()
        split = {0: "val", 1: "test"}.get(digest[0] % 7, "train")
        shares[split].append(background)
    return shares


def paint_background(
    choices: Sequence[Background], *, width: int, height: int, rng: np.random.Generator
) -> tuple[npt.NDArray[np.uint8], frozenset[str]]:
    """Make one background, uint8 [H, W, 3], and tell what it shows."""
    if choices and rng.random() >= _TEXTURE_SHARE:
        chosen = choices[int(rng.integers(len(choices)))]
        picture, shows = _crop(_open(chosen.path), width, height, rng), chosen.shows
    else:
        picture, shows = _texture(width, height, rng), frozenset[str]()
    return np.asarray(_vary(picture, rng)), shows


def _family(stem: str) -> str:
    """Stereo pairs and copies share a name up to one last letter or digit."""
    return stem.rstrip("0123456789").rstrip("ABLR")


def _pad(row: list[str]) -> tuple[str, str]:
    return row[0], row[1] if len(row) > 1 else ""


def _possible(nouns: str, vocabulary: Vocabulary) -> frozenset[str]:
    names = [noun for noun in nouns.split(",") if noun]
    return frozenset[str]().union(*(vocabulary.possible_names(name) for name in names))


def _packaged_pictures() -> list[Path]:
    found = []
    for package, (folder, names) in _PACKAGED.items():
        try:
            root = files(package)
        except ModuleNotFoundError:
            continue
        for name in names:
            with as_file(root / folder / name) as path:
                found.append(path)
    return [path for path in found if path.is_file()]


@lru_cache(maxsize=96)
def _open(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            image.draft("RGB", (_LONGEST_SIDE, _LONGEST_SIDE))
            rgb: Image.Image = image.convert("RGB")
    except (OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"Cannot read the background '{path}': {error}.") from error
    rgb.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    return rgb


def _crop(photo: Image.Image, width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """A window of the right shape at a random place and scale, perhaps mirrored."""
    largest = min(photo.width / width, photo.height / height)
    scale = largest * rng.uniform(0.45, 1.0)
    across, down = width * scale, height * scale
    left = rng.uniform(0, photo.width - across)
    top = rng.uniform(0, photo.height - down)
    window = (left, top, left + across, top + down)
    crop = photo.resize((width, height), Image.Resampling.BILINEAR, box=window)
    return crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else crop


def _texture(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """Clouds of two colours, in half of the cases as a wall above a floor."""
    wall = _clouds(width, height, rng)
    if rng.random() < 0.5:
        horizon = int(height * rng.uniform(0.3, 0.75))
        wall[horizon:] = _clouds(width, height, rng)[horizon:]
    return Image.fromarray(wall)


def _clouds(width: int, height: int, rng: np.random.Generator) -> npt.NDArray[np.uint8]:
    noise = np.zeros((height, width), dtype=np.float32)
    stretch = rng.uniform(0.3, 3.0)  # wood and water run along one direction
    for cells, weight in ((3, 1.0), (9, 0.6), (40, 0.35), (150, 0.25)):
        shape = (max(2, int(cells / stretch)), max(2, int(cells * stretch)))
        small = Image.fromarray(rng.random(shape, dtype=np.float32))
        smooth = small.resize((width, height), Image.Resampling.BICUBIC)
        noise += weight * rng.uniform(0.2, 1.0) * np.asarray(smooth)
    noise = (noise - noise.min()) / max(float(np.ptp(noise)), 1e-6)
    dark = rng.uniform(20, 200, 3)
    light = np.clip(dark + rng.uniform(10, 90) + rng.uniform(-35, 35, 3), 0, 255)
    mixed = dark + noise[..., None] * (light - dark)
    return np.asarray(mixed, dtype=np.uint8)


def _vary(picture: Image.Image, rng: np.random.Generator) -> Image.Image:
    if rng.random() < 0.35:
        picture = picture.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.7, 3.0))))
    picture = ImageEnhance.Brightness(picture).enhance(float(rng.uniform(0.7, 1.2)))
    picture = ImageEnhance.Contrast(picture).enhance(float(rng.uniform(0.65, 1.1)))
    return ImageEnhance.Color(picture).enhance(float(rng.uniform(0.6, 1.15)))
