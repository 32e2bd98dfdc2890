"""Large pictures in parts: overlapping tiles through the VAE, blended, so that its memory is a tile's.

A workspace of the tile's shape, or an engine, decodes one tile after another, whatever the backend is.
A VAE normalises over all that it sees and attends to all of it, so a tile is not exactly the part of the whole
picture: tiles overlap by a quarter, as in diffusers' tiled VAE, and each fades into the next one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from math import ceil

import msgspec
import numpy as np

from latentrt.engines.errors import RequestError
from latentrt.engines.spec import Array

OVERLAP = 0.25  # of a tile at least, on each side: diffusers' own
LEAST_CELLS = 4  # of a tile's side: fewer have no overlap of a quarter


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """How one side of a picture is cut, in cells of the latents: tiles of `tile` cells begin at `starts`."""

    length: int
    tile: int
    starts: tuple[int, ...]

    def weights(self, scale: int) -> list[Array]:
        """Return how much each tile weighs along this side: (tile * scale,), float32, one in every place together.

        A tile rises from its edge inside the picture to one over the overlap that is promised, and falls the same way.
        """
        tile, fade = self.tile * scale, overlap(self.tile) * scale
        place = np.arange(tile)
        profiles = [
            np.minimum(
                np.ones(tile) if start == 0 else place / fade,
                np.ones(tile) if start + self.tile == self.length else (tile - place) / fade,
            ).clip(max=1)
            for start in self.starts
        ]
        total = np.zeros(self.length * scale)
        for start, profile in zip(self.starts, profiles, strict=True):
            total[start * scale :][:tile] += profile
        return [
            (profile / total[start * scale :][:tile]).astype(np.float32)
            for start, profile in zip(self.starts, profiles, strict=True)
        ]


def overlap(tile: int) -> int:
    """Return how many cells neighbouring tiles share at least."""
    return round(tile * OVERLAP)


def cut(length: int, tile: int) -> Side:
    """Cut a side of `length` cells into as few tiles of `tile` cells as overlap enough, at even distances."""
    tile = min(tile, length)
    count = 1 if tile == length else ceil((length - overlap(tile)) / (tile - overlap(tile)))
    spare = length - tile
    starts = tuple(round(k * spare / (count - 1)) for k in range(count)) if count > 1 else (0,)
    return Side(length=length, tile=tile, starts=starts)


class Tiling(msgspec.Struct, frozen=True, kw_only=True):
    """How a picture is cut into tiles, all of one size; `tiles` counts them."""

    rows: Side
    columns: Side

    @property
    def tiles(self) -> int:
        """Return how many there are."""
        return len(self.rows.starts) * len(self.columns.starts)

    def parts(self, array: Array, *, scale: int = 1) -> Iterator[Array]:
        """Give the tiles of an array (…, height, width) whose cells are `scale` wide, row by row, as copies."""
        for top, left in itertools.product(self.rows.starts, self.columns.starts):
            rows = slice(top * scale, (top + self.rows.tile) * scale)
            yield np.ascontiguousarray(array[..., rows, left * scale : (left + self.columns.tile) * scale])

    def blend(self, parts: Iterable[Array], *, scale: int) -> Array:
        """Put tiles together, each fading into the next: (n, height * scale, width * scale, channels), float32.

        parts: (n, tile height * scale, tile width * scale, channels), in the order of `parts`
        """
        whole: Array | None = None
        down, across = self.rows.weights(scale), self.columns.weights(scale)
        places = itertools.product(
            zip(self.rows.starts, down, strict=True), zip(self.columns.starts, across, strict=True)
        )
        for ((top, rows), (left, columns)), part in zip(places, parts, strict=True):
            if whole is None:
                size = (self.rows.length * scale, self.columns.length * scale)
                whole = np.zeros((len(part), *size, part.shape[-1]), dtype=np.float32)
            weight = (rows[:, None] * columns)[..., None]
            whole[:, top * scale :, left * scale :][:, : len(rows), : len(columns)] += weight * part
        assert whole is not None
        return whole


def plan_tiles(size: tuple[int, int], tile: int | None, *, factor: int) -> Tiling | None:
    """Cut a picture of (width, height) pixels into tiles of `tile` pixels; None if one tile holds all of it.

    factor: how many pixels a cell of the latents is wide. Raises RequestError on a tile that cannot be.
    """
    if tile is None:
        return None
    if type(tile) is not int or tile < LEAST_CELLS * factor or tile % factor:
        raise RequestError(f"tile: found {tile!r}, expected a multiple of {factor} pixels from {LEAST_CELLS * factor}")
    width, height = size
    tiling = Tiling(rows=cut(height // factor, tile // factor), columns=cut(width // factor, tile // factor))
    return tiling if tiling.tiles > 1 else None


def decode_tiles(latents: Array, decode: Callable[[Array], Array], tiling: Tiling, *, factor: int) -> Array:
    """Return the pictures that latents show: (n, height, width, 3), uint8, sRGB.

    latents: (n, C, h, w), float32; decode: turns those of a tile into its pixels
    """
    return np.rint(tiling.blend(map(decode, tiling.parts(latents)), scale=factor)).astype(np.uint8)


def encode_tiles(pixels: Array, encoder: Callable[[Array], Array], tiling: Tiling, *, factor: int) -> Array:
    """Return what an encoder gives for large pictures: (m, channels, h, w), float32.

    pixels: (m, 3, height, width), float32; encoder: gives (m, channels, h, w) for a tile
    """
    parts = (np.moveaxis(encoder(part), 1, -1) for part in tiling.parts(pixels, scale=factor))
    return np.ascontiguousarray(np.moveaxis(tiling.blend(parts, scale=1), -1, 1))
