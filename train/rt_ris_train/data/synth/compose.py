"""Composition of a scene: what is in it, where, how it is painted, and what remains visible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter

from rt_ris_train.data.synth.backgrounds import Background, paint_background
from rt_ris_train.data.synth.casting import Role, cast_roles
from rt_ris_train.data.synth.colouring import repaint
from rt_ris_train.data.synth.scene import Scene, Thing
from rt_ris_train.data.synth.sprites import SpriteLibrary
from rt_ris_train.data.synth.vocabulary import Vocabulary

_SIZES = ((640, 480), (640, 427), (500, 375), (512, 384), (480, 360), (480, 480), (375, 500))
_LEAST_VISIBLE = 0.6  # of an object; the rest may be hidden by others or outside
_LEAST_AREA = 300  # visible pixels
_GREATEST_ENLARGEMENT = 2.2
_HALF_OPAQUE = 128

Pixels = npt.NDArray[np.uint8]


@dataclass(frozen=True)
class Composite:
    """A painted scene.

    Attributes:
        pixels: uint8 [H, W, 3] RGB.
        owner: int16 [H, W], index of the thing seen at each pixel, -1 for the background.
        scene: the graph, with boxes and areas measured in `owner`.
    """

    pixels: Pixels
    owner: npt.NDArray[np.int16]
    scene: Scene


@dataclass(frozen=True)
class _Placed:
    """An object ready to be painted: uint8 [h, w, 4] at (left, top), which may be outside."""

    role: Role
    rgba: Pixels
    left: int
    top: int

    @property
    def box(self) -> tuple[int, int, int, int]:
        height, width = self.rgba.shape[:2]
        return self.left, self.top, self.left + width, self.top + height


def compose(
    library: SpriteLibrary,
    backgrounds: Sequence[Background],
    vocabulary: Vocabulary,
    rng: np.random.Generator,
) -> Composite:
    """Make one scene. The same state of `rng` gives the same pixels."""
    width, height = _SIZES[int(rng.integers(len(_SIZES)))]
    ground, shows = paint_background(backgrounds, width=width, height=height, rng=rng)
    roles = cast_roles(library, vocabulary, rng)
    placed = _place(roles, library, width=width, height=height, rng=rng)
    placed, owner = _drop_hidden(placed, width=width, height=height)
    pixels = _paint(ground, placed, rng)
    things = tuple(_measure(item, owner == index, vocabulary) for index, item in enumerate(placed))
    return Composite(pixels, owner, Scene(width, height, things, shows))


def _place(
    roles: Sequence[Role],
    library: SpriteLibrary,
    *,
    width: int,
    height: int,
    rng: np.random.Generator,
) -> list[_Placed]:
    """Find a place for each object; sort so that what stands lower is in front."""
    crowd = (4 / max(len(roles), 3)) ** 0.4
    may_touch = rng.random() < 0.5
    placed: list[_Placed] = []
    for role in roles:
        share = min(crowd * float(rng.triangular(0.18, 0.38, 0.8)), 0.75)
        side = min(width, height) * share
        rgba = _shape(role, library, side=side, rng=rng)
        options = [_try_place(role, rgba, width, height, rng) for _ in range(24)]
        limit = 0.45 if may_touch and rng.random() < 0.6 else 0.03
        overlaps = [max((_overlap(o, other) for other in placed), default=0.0) for o in options]
        fitting = next((o for o, v in zip(options, overlaps, strict=True) if v <= limit), None)
        if fitting is not None:
            placed.append(fitting)
    return sorted(placed, key=lambda item: item.box[3])


def _try_place(
    role: Role, rgba: Pixels, width: int, height: int, rng: np.random.Generator
) -> _Placed:
    outside = 0.15 if rng.random() < 0.12 else -0.01
    high, wide = rgba.shape[:2]
    left = _somewhere(width - wide, outside * wide, rng)
    top = _somewhere(height - high, outside * high, rng)
    return _Placed(role, rgba, left, top)


def _somewhere(room: int, outside: float, rng: np.random.Generator) -> int:
    """A place along one axis; what is larger than the picture sticks out at both ends."""
    low, high = sorted((-outside, room + outside))
    return int(rng.uniform(low, high))


def _overlap(one: _Placed, other: _Placed) -> float:
    """Shared part of two boxes, as a share of the smaller."""
    a, b = one.box, other.box
    across = min(a[2], b[2]) - max(a[0], b[0])
    down = min(a[3], b[3]) - max(a[1], b[1])
    if across <= 0 or down <= 0:
        return 0.0
    smaller = min((x[2] - x[0]) * (x[3] - x[1]) for x in (a, b))
    return across * down / smaller


def _shape(role: Role, library: SpriteLibrary, *, side: float, rng: np.random.Generator) -> Pixels:
    """The object in its colour, size and attitude: uint8 [h, w, 4]."""
    rgba = library.pixels(role.sprite)
    if role.paint is not None:
        rgba = repaint(rgba, role.paint, tint=role.sprite.may_be_tinted)
    image = Image.fromarray(rgba)
    if role.sprite.may_be_mirrored and rng.random() < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    scale = min(side / max(image.size), _GREATEST_ENLARGEMENT)
    size = (max(8, round(image.width * scale)), max(8, round(image.height * scale)))
    image = image.resize(size, Image.Resampling.LANCZOS)
    angle = rng.uniform(-60, 60) if role.sprite.may_lie else rng.normal(0, 3)
    image = image.rotate(float(angle), Image.Resampling.BICUBIC, expand=True)
    softened = image.getchannel("A").filter(ImageFilter.GaussianBlur(float(rng.uniform(0.4, 0.9))))
    alpha = np.minimum(np.asarray(image.getchannel("A")), np.asarray(softened))
    return _crop_visible(np.dstack([np.asarray(image)[..., :3], alpha]))


def _crop_visible(rgba: Pixels) -> Pixels:
    left, top, right, bottom = _box_of(rgba[..., 3] > 0)
    return rgba[top:bottom, left:right]


def _drop_hidden(
    placed: list[_Placed], *, width: int, height: int
) -> tuple[list[_Placed], npt.NDArray[np.int16]]:
    """Remove objects of which too little is seen, until all the others are seen well enough."""
    while True:
        owner = np.full((height, width), -1, dtype=np.int16)
        for index, item in enumerate(placed):
            window, part = _clip(item, width, height)
            owner[window][item.rgba[part][..., 3] >= _HALF_OPAQUE] = index
        seen = [int((owner == index).sum()) for index in range(len(placed))]
        whole = [int((item.rgba[..., 3] >= _HALF_OPAQUE).sum()) for item in placed]
        kept = [
            item
            for item, visible, all_of_it in zip(placed, seen, whole, strict=True)
            if visible >= max(_LEAST_VISIBLE * all_of_it, _LEAST_AREA)
        ]
        if len(kept) == len(placed):
            return placed, owner
        placed = kept


def _clip(
    item: _Placed, width: int, height: int
) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The window of the picture that an object covers, and the part of it that falls there.

    Both are empty where it lies beside the picture, as a shadow may.
    """
    left, top, right, bottom = item.box
    x0, y0 = min(max(left, 0), width), min(max(top, 0), height)
    x1, y1 = max(min(right, width), x0), max(min(bottom, height), y0)
    window = (slice(y0, y1), slice(x0, x1))
    return window, (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))


def _paint(ground: Pixels, placed: Sequence[_Placed], rng: np.random.Generator) -> Pixels:
    """Paint shadows and objects in order, then what a camera adds."""
    canvas = ground.astype(np.float32)
    light = _light_of(canvas)
    slant = float(rng.uniform(-0.12, 0.12))
    darkness = float(rng.uniform(0.2, 0.5))
    for item in placed:
        _paint_shadow(canvas, item, slant=slant, darkness=darkness)
        window, part = _clip(item, canvas.shape[1], canvas.shape[0])
        rgba = item.rgba[part].astype(np.float32)
        alpha = rgba[..., 3:] / 255
        lit = np.clip(rgba[..., :3] * light * rng.uniform(0.88, 1.1), 0, 255)
        canvas[window] += alpha * (lit - canvas[window])
    return _photograph(canvas, rng)


def _light_of(canvas: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Gain per channel [3] that brings an object a little towards the background's light."""
    mean = canvas.mean(axis=(0, 1)) + 1
    cast = (mean / mean.mean()) ** 0.2
    brightness = np.clip((mean.mean() / 120) ** 0.2, 0.75, 1.1)
    return np.asarray(cast * brightness, dtype=np.float32)


def _paint_shadow(
    canvas: npt.NDArray[np.float32], item: _Placed, *, slant: float, darkness: float
) -> None:
    """Darken the ground under what stands, and beside what lies."""
    height, width = item.rgba.shape[:2]
    if item.role.sprite.may_lie:
        shape, dx, dy = item.rgba[..., 3], round(slant * width / 2), max(2, round(0.04 * height))
    else:
        foot = item.rgba[int(0.88 * height) :, :, 3].max(axis=0)
        thickness = max(3, int(0.09 * width))
        shape = np.repeat(foot[None], thickness, axis=0)
        dx, dy = round(slant * width), height - thickness // 2 - 2
    radius = max(1.5, 0.035 * max(width, height))
    margin = int(3 * radius)
    padded = Image.fromarray(np.pad(shape, margin))
    blurred = np.asarray(padded.filter(ImageFilter.GaussianBlur(radius)))
    rgba = np.zeros((*blurred.shape, 4), dtype=np.uint8)
    rgba[..., 3] = blurred
    shadow = replace(item, rgba=rgba, left=item.left + dx - margin, top=item.top + dy - margin)
    window, part = _clip(shadow, canvas.shape[1], canvas.shape[0])
    canvas[window] *= 1 - darkness * rgba[part][..., 3:].astype(np.float32) / 255


def _photograph(canvas: npt.NDArray[np.float32], rng: np.random.Generator) -> Pixels:
    """Exposure, contrast, a soft lens, and noise."""
    gain, contrast = rng.uniform(0.88, 1.1), rng.uniform(0.85, 1.1)
    exposed = (canvas - 128) * contrast + 128
    exposed = exposed * gain
    image = Image.fromarray(np.clip(exposed, 0, 255).astype(np.uint8))
    if rng.random() < 0.5:
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.3, 0.9))))
    grain = rng.standard_normal(canvas.shape, dtype=np.float32) * np.float32(rng.uniform(0, 5))
    return np.asarray(np.clip(np.asarray(image) + grain, 0, 255), dtype=np.uint8)


def _measure(item: _Placed, mask: npt.NDArray[np.bool_], vocabulary: Vocabulary) -> Thing:
    noun = item.role.sprite.noun
    return Thing(
        noun=noun,
        colour=item.role.paint or item.role.sprite.colour,
        box=_box_of(mask),
        area=int(mask.sum()),
        names=vocabulary.certain_names(noun),
        possible_names=vocabulary.possible_names(noun),
        sprite=item.role.sprite.name,
    )


def _box_of(mask: npt.NDArray[np.bool_]) -> tuple[int, int, int, int]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1
