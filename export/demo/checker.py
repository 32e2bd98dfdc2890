"""Checker of demo pictures: reads shape, colour and background with NumPy alone, no learned model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from latentrt.export.demo.drawing import (
    COLOURS,
    PALETTE,
    PATTERNS,
    SHAPES,
    SIDE,
    Pixels,
    Scene,
    draw_mask,
    pattern_share,
)

Floats: TypeAlias = NDArray[np.float32]
Bits: TypeAlias = NDArray[np.bool_]

MATCH = 0.7  # a shape counts when it overlaps its template by this much, intersection over union
FRAME = 8  # pixels: no drawn object reaches the outermost ones
FEWEST_PIXELS = 60
_RADII = tuple(np.arange(16.0, 46.0, 2.0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a part of a picture shows: an object and how well it overlaps its template, 0 to 1."""

    shape: str
    colour: str
    radius: float
    overlap: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """What a picture shows: objects from left to right, background colour and pattern."""

    objects: tuple[Found | None, ...]
    background: str
    pattern: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """Which attributes of a picture are as asked."""

    shape: bool
    colour: bool
    background: bool
    pattern: bool

    @property
    def right(self) -> bool:
        """Whether shape, colour and background colour are all right."""
        return self.shape and self.colour and self.background


def check_picture(pixels: Pixels, scene: Scene) -> Verdict:
    """Judge a picture of (128, 128, 3), uint8, by the scene it should show; places and sizes are free."""
    reading = read_picture(pixels, len(scene.items))
    pairs = list(zip(reading.objects, scene.items, strict=True))
    return Verdict(
        shape=all(found is not None and found.shape == item.shape for found, item in pairs),
        colour=all(found is not None and found.colour == item.colour for found, item in pairs),
        background=reading.background == scene.background,
        pattern=reading.pattern == scene.pattern,
    )


def read_picture(pixels: Pixels, count: int = 1) -> Reading:
    """Read what a picture shows: `count` objects side by side before a background."""
    distances = measure_colours(pixels)
    families = distances.argmin(0)
    background = _commonest(families[_frame()])
    foreground = families != background
    objects = tuple(_read_object(pixels, families, foreground & part, background) for part in _columns(count))
    pattern = read_pattern(pixels, ~_grow(foreground), COLOURS[background])
    return Reading(objects=objects, background=COLOURS[background], pattern=pattern)


def measure_colours(pixels: Pixels) -> Floats:
    """Distance of every pixel to each palette colour's way to its shade: (9, 128, 128), float32."""
    points = pixels.astype(np.float32)
    distances = []
    for colour, shade in _ends():
        share = np.clip(_project(points, colour, shade), 0, 1)[..., None]
        distances.append(np.linalg.norm(points - (colour + share * (shade - colour)), axis=-1))
    return np.stack(distances)


def read_pattern(pixels: Pixels, where: Bits, background: str) -> str:
    """Name the pattern that explains the pixels of a background best."""
    colour, shade = (np.asarray(rgb, dtype=np.float32) for rgb in PALETTE[background])
    share = _project(pixels.astype(np.float32), colour, shade)
    weight = where.astype(np.float32)
    errors = [(np.square(share - pattern_share(pattern)) * weight).sum() for pattern in PATTERNS]
    return PATTERNS[int(np.argmin(errors))]


def match_shape(mask: Bits) -> tuple[str, float, float]:
    """Name the template that overlaps a mask best over all places and sizes: shape, radius, overlap."""
    spectrum = np.fft.rfft2(mask.astype(np.float32))
    area = float(mask.sum())
    best = ("", 0.0, 0.0)
    for shape, radius, template, template_area in _templates():
        common = np.fft.irfft2(spectrum * template, s=(SIDE, SIDE)).max()
        overlap = float(common / (area + template_area - common))
        if overlap > best[2]:
            best = (shape, radius, overlap)
    return best


def count_right(verdicts: Iterable[Verdict]) -> dict[str, float]:
    """Share of the verdicts in which each attribute, and all that count, are right."""
    rows = [(verdict.shape, verdict.colour, verdict.background, verdict.pattern, verdict.right) for verdict in verdicts]
    names = ("shape", "colour", "background", "pattern", "right")
    return dict(zip(names, np.mean(rows, axis=0).tolist(), strict=True))


def _read_object(pixels: Pixels, families: NDArray[np.intp], mask: Bits, background: int) -> Found | None:
    if mask.sum() < FEWEST_PIXELS:
        return None
    core = _shrink(mask)
    colour = _commonest(families[core if core.any() else mask])
    nearer = _nearer(pixels, colour, background) & _grow(mask)
    if nearer.sum() < FEWEST_PIXELS:
        return None
    shape, radius, overlap = match_shape(nearer)
    return Found(shape=shape if overlap >= MATCH else "", colour=COLOURS[colour], radius=radius, overlap=overlap)


def _nearer(pixels: Pixels, colour: int, background: int) -> Bits:
    """Pixels nearer to an object's colour than to any colour of the background."""
    points = pixels.astype(np.float32)
    to_object = np.linalg.norm(points - np.asarray(PALETTE[COLOURS[colour]][0], dtype=np.float32), axis=-1)
    return np.asarray(to_object < measure_colours(pixels)[background])


def _commonest(numbers: NDArray[np.intp]) -> int:
    return int(np.bincount(numbers, minlength=len(COLOURS)).argmax())


def _ends() -> Iterator[tuple[Floats, Floats]]:
    for colour, shade in PALETTE.values():
        yield np.asarray(colour, dtype=np.float32), np.asarray(shade, dtype=np.float32)


def _project(points: Floats, start: Floats, end: Floats) -> Floats:
    """How far along the way from one colour to another each point lies, 0 to 1 between them."""
    way = end - start
    return np.asarray((points - start) @ way / (way @ way), dtype=np.float32)


def _frame() -> Bits:
    frame = np.ones((SIDE, SIDE), dtype=np.bool_)
    frame[FRAME:-FRAME, FRAME:-FRAME] = False
    return frame


def _columns(count: int) -> Iterator[Bits]:
    columns = np.arange(SIDE) * count // SIDE
    for number in range(count):
        yield np.broadcast_to(columns == number, (SIDE, SIDE))


def _shifted(mask: Bits) -> NDArray[np.bool_]:
    """A mask and its eight neighbours two pixels away, the border repeated: (9, 128, 128), bool."""
    wide = np.pad(mask, 2, mode="edge")
    return np.stack([wide[y : y + SIDE, x : x + SIDE] for y in (0, 2, 4) for x in (0, 2, 4)])


def _grow(mask: Bits) -> Bits:
    return np.asarray(_shifted(mask).any(0))


def _shrink(mask: Bits) -> Bits:
    return np.asarray(_shifted(mask).all(0))


@cache
def _templates() -> tuple[tuple[str, float, NDArray[np.complex128], float], ...]:
    """Every shape at every radius: its name, its radius, its conjugate spectrum and its area."""
    templates = []
    for shape in SHAPES:
        for radius in _RADII:
            mask = (draw_mask(shape, (SIDE / 2, SIDE / 2), radius) > 0.5).astype(np.float32)
            templates.append((shape, float(radius), np.conj(np.fft.rfft2(mask)), float(mask.sum())))
    return tuple(templates)
