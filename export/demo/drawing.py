"""Scenes of the demo model: what a picture shows, how it is drawn, and the sentences that describe it."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from math import cos, pi, sin
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Pixels: TypeAlias = NDArray[np.uint8]
Mask: TypeAlias = NDArray[np.float32]
Point: TypeAlias = tuple[float, float]
Colour: TypeAlias = tuple[int, int, int]

SIDE = 128
OVERSAMPLING = 4
CELL = 16  # pixels a stripe or a check: two latent pixels, so that patterns fall on the latent grid

# Each colour with its shade: backgrounds are patterned between the two.
PALETTE: dict[str, tuple[Colour, Colour]] = {
    "red": ((215, 35, 40), (150, 24, 28)),
    "orange": ((245, 135, 25), (182, 95, 12)),
    "yellow": ((250, 220, 45), (188, 164, 25)),
    "green": ((45, 165, 65), (28, 108, 42)),
    "blue": ((40, 85, 215), (25, 54, 145)),
    "purple": ((135, 55, 180), (90, 34, 122)),
    "pink": ((250, 155, 200), (196, 106, 150)),
    "white": ((245, 245, 245), (186, 186, 186)),
    "black": ((20, 20, 20), (78, 78, 78)),
}
COLOURS = tuple(PALETTE)
SHAPES = ("circle", "square", "triangle", "diamond", "star", "ring", "cross", "heart")
PATTERNS = ("plain", "striped", "checkered", "gradient")
RADII = {"small": 22.0, "medium": 30.0, "large": 39.0}  # pixels
PAIR_RADIUS = 23.0  # pixels: each of two objects side by side
RING_HOLE = 0.46
HELD_OUT_PART = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One object: what it is and where it lies; centre and radius in pixels."""

    shape: str
    colour: str
    centre: Point
    radius: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """One picture: one object, or two from left to right, before a background."""

    items: tuple[Item, ...]
    background: str
    pattern: str

    @property
    def held_out(self) -> bool:
        """Whether training must never see this scene."""
        return any(is_held_out(item.colour, item.shape, self.background) for item in self.items)


def is_held_out(colour: str, shape: str, background: str) -> bool:
    """Whether a combination is kept out of training, by a hash that is the same everywhere."""
    return zlib.crc32(f"{colour} {shape} {background}".encode()) % HELD_OUT_PART == 0


def draw_scene(scene: Scene) -> Pixels:
    """Draw a scene without jagged edges.

    returns: (128, 128, 3), uint8, sRGB
    """
    picture = draw_background(scene.background, scene.pattern)
    for item in scene.items:
        cover = draw_mask(item.shape, item.centre, item.radius)[..., None]
        picture = picture * (1 - cover) + np.asarray(PALETTE[item.colour][0], dtype=np.float32) * cover
    return np.rint(picture).astype(np.uint8)


def draw_background(background: str, pattern: str) -> NDArray[np.float32]:
    """Draw a pattern between a colour and its shade.

    returns: (128, 128, 3), float32, 0 to 255
    """
    colour, shade = (np.asarray(rgb, dtype=np.float32) for rgb in PALETTE[background])
    share = pattern_share(pattern)[..., None]
    return np.asarray(colour * (1 - share) + shade * share, dtype=np.float32)


def pattern_share(pattern: str) -> Mask:
    """How much of the shade every pixel of a pattern takes: (128, 128), float32, 0 to 1."""
    rows, columns = np.indices((SIDE, SIDE))
    share = {
        "plain": np.zeros((SIDE, SIDE)),
        "striped": rows // CELL % 2,
        "checkered": (rows // CELL + columns // CELL) % 2,
        "gradient": rows / (SIDE - 1),
    }[pattern]
    return share.astype(np.float32)


def draw_mask(shape: str, centre: Point, radius: float) -> Mask:
    """Draw how much of every pixel a shape covers: (128, 128), float32, 0 to 1."""
    canvas = Image.new("L", (SIDE * OVERSAMPLING, SIDE * OVERSAMPLING))
    pen = ImageDraw.Draw(canvas)
    size = radius * OVERSAMPLING
    middle = (centre[0] * OVERSAMPLING, centre[1] * OVERSAMPLING)
    if shape in ("circle", "ring"):
        _draw_disc(pen, middle, size, 255)
        if shape == "ring":
            _draw_disc(pen, middle, size * RING_HOLE, 0)
    else:
        pen.polygon([(middle[0] + x * size, middle[1] + y * size) for x, y in outline(shape)], fill=255)
    reduced = canvas.resize((SIDE, SIDE), Image.Resampling.BOX)
    return np.asarray(reduced, dtype=np.float32) / np.float32(255)


def outline(shape: str) -> list[Point]:
    """List the corners of a shape of radius one around the origin, y downwards."""
    if shape == "star":
        return [_polar(1.18 if k % 2 == 0 else 0.5, k / 10) for k in range(10)]
    if shape == "heart":
        return [_heart(k / 60) for k in range(60)]
    return {
        "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
        "triangle": [(0.0, -1.0), (1.1, 0.9), (-1.1, 0.9)],
        "diamond": [(0.0, -1.2), (0.8, 0.0), (0.0, 1.2), (-0.8, 0.0)],
        "cross": [(x, y) for x, y in _CROSS],
    }[shape]


_ARM = 0.34
_CROSS = (
    (-_ARM, -1.05), (_ARM, -1.05), (_ARM, -_ARM), (1.05, -_ARM), (1.05, _ARM), (_ARM, _ARM),
    (_ARM, 1.05), (-_ARM, 1.05), (-_ARM, _ARM), (-1.05, _ARM), (-1.05, -_ARM), (-_ARM, -_ARM),
)  # fmt: skip


def _polar(radius: float, turn: float) -> Point:
    return radius * sin(2 * pi * turn), -radius * cos(2 * pi * turn)


def _heart(turn: float) -> Point:
    angle = 2 * pi * turn
    x = 16 * sin(angle) ** 3
    y = 13 * cos(angle) - 5 * cos(2 * angle) - 2 * cos(3 * angle) - cos(4 * angle)
    return x / 15, -(y + 2.5) / 14


def _draw_disc(pen: ImageDraw.ImageDraw, middle: Point, size: float, fill: int) -> None:
    left, top = middle[0] - size, middle[1] - size
    pen.ellipse((left, top, left + 2 * size, top + 2 * size), fill=fill)


def random_scene(generator: np.random.Generator, *, pairs: float = 0.15) -> Scene:
    """Make up a scene that training may see; a share of `pairs` holds two objects."""
    while True:
        scene = any_scene(generator, pairs=pairs)
        if not scene.held_out:
            return scene


def any_scene(generator: np.random.Generator, *, pairs: float) -> Scene:
    """Make up any scene; a share of `pairs` holds two objects."""
    background, *colours = (str(name) for name in generator.permutation(COLOURS)[:3])
    pattern = str(generator.choice(PATTERNS))
    shapes = [str(name) for name in generator.permutation(SHAPES)[:2]]
    if generator.random() < pairs:
        items = tuple(
            Item(shape=shape, colour=colour, centre=_near(generator, (x, 64.0), 4.0), radius=PAIR_RADIUS)
            for shape, colour, x in zip(shapes, colours, (34.0, 94.0), strict=True)
        )
        return Scene(items=items, background=background, pattern=pattern)
    radius = float(generator.choice(list(RADII.values())))
    item = Item(shape=shapes[0], colour=colours[0], centre=_near(generator, (64.0, 64.0), 8.0), radius=radius)
    return Scene(items=(item,), background=background, pattern=pattern)


def _near(generator: np.random.Generator, centre: Point, reach: float) -> Point:
    x, y = generator.uniform(-reach, reach, 2)
    return centre[0] + float(x), centre[1] + float(y)
