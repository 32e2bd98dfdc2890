"""What a build may be told: sizes, batches, the target, and how hard the compiler tries. Part of an engine's key."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import msgspec

from latentrt.engines.bundle.manifest import Manifest
from latentrt.engines.bundle.text_lengths import MOST_FIXED, split_length
from latentrt.engines.errors import RequestError
from latentrt.engines.tensor_names import STATE_ROWS, level_axes

FIXED_TOKENS = "text_tokens"  # the axis of a text encoder's input whose rows are of one length, see components.py
Recipe = Literal["nhwc", "plain"]


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """One set of shapes that engines are compiled for. Sizes are in pixels; `rows` are the denoiser's batch.

    frames: how many of the rows it sees at once, where they are a video's
    chunks: of a prompt, each a row of a text encoder; fixed_tokens: of a text encoder whose rows are of one length
    """

    width: int
    height: int
    pictures: int
    rows: int
    tokens: int
    frames: int = 1
    chunks: int = 1
    fixed_tokens: int | None = None

    def __str__(self) -> str:
        video = f" frames {self.frames}" if self.frames > 1 else ""
        return f"{self.width}x{self.height} pictures {self.pictures} rows {self.rows} tokens {self.tokens}{video}"

    def axes(self, factor: int) -> dict[str, int]:
        """Return the size of each axis that a component's graph may name."""
        return {
            "batch": self.pictures,
            "pictures": self.pictures,
            "rows": self.rows,
            "frames": self.frames,
            "tokens": self.tokens,
            **({FIXED_TOKENS: self.fixed_tokens} if self.fixed_tokens else {}),
            "height": self.height,
            "width": self.width,
            "latent_height": self.height // factor,
            "latent_width": self.width // factor,
            **level_axes(self.height // factor, self.width // factor),
        }


class BuildOptions(msgspec.Struct, frozen=True, kw_only=True):
    """How to build engines. What is None or empty is the bundle's or library's own.

    The backend `cuda` takes recipe and tf32, those that compile for fixed shapes take the others.

    sizes: (width, height) in pixels
    batches: how many pictures are drawn at once
    tokens: lengths of the prompt's encoding, in tokens
    compute_capability: the GPU type to build for, `8.9`, on a machine that may have none
    optimization_level: 0 to 5, how long the compiler searches
    workspace_mb: scratch memory that a layer may use
    version_compatible: engines for the lean runtime
    refit: weights can be exchanged later
    state_rows: rows of state of the largest sampler that the fused denoiser must hold
    references: whether a row of each size is computed on the CPU, in float32, for `verify` to compare with; it is no
        part of the key, for the engines are the same
    timing_cache: a file of what the compiler measured before, which is read and written; no part of the key either
    aux_streams: how many streams beside its own an engine may run independent layers in
    separate_skips: the UNet's concatenations read copies of its skip connections, see `compiled.separate_skips`
    recipe: what graphs are written for: `nhwc`, fused kernels that take channels last; `plain`, standard operators
    tf32: whether float32 products may be rounded to 19 bits on the GPU
    """

    sizes: tuple[tuple[int, int], ...] = ()
    batches: tuple[int, ...] = (1,)
    tokens: tuple[int, ...] = ()
    compute_capability: str | None = None
    optimization_level: int | None = None
    workspace_mb: int | None = None
    version_compatible: bool = False
    refit: bool = False
    state_rows: int = STATE_ROWS
    references: bool = True
    timing_cache: Path | None = None
    aux_streams: int | None = None
    separate_skips: bool = False
    recipe: Recipe | None = None
    tf32: bool | None = None

    def profiles(self, manifest: Manifest) -> tuple[Profile, ...]:
        """Return every combination of sizes, batches and tokens, each with every number of groups of model rows.

        Where the denoiser's rows are frames, a batch is as many pictures and a video of as many frames.

        Raises RequestError if a size does not fit the bundle's latents or a number is not positive.
        """
        self._check(manifest.latents.cell)
        lengths = tuple(dict.fromkeys(manifest.text_tokens(name) for name in manifest.denoisers))
        texts = {tokens: split_length(tokens, manifest, manifest.denoiser) for tokens in (*lengths, *self.tokens)}
        if len(lengths) == 1 and not all(texts[tokens] for tokens in self.tokens):
            always = manifest.text_tokens(manifest.denoiser, chunks=0)
            if lengths == (always,):
                raise RequestError(
                    f"--tokens: found {', '.join(map(str, self.tokens))}, and this bundle reads no text; omit it"
                )
            raise RequestError(
                f"--tokens: found {', '.join(map(str, self.tokens))}, expected "
                + (f"1 to {MOST_FIXED} more than " if always else "")
                + f"multiples of {lengths[0] - always}: a long prompt is encoded in parts of that length"
            )
        groups = max(map(manifest.row_groups, manifest.denoisers))
        combinations = itertools.product(
            self.sizes or (manifest.default_size,), self.batches, range(1, groups + 1), self.tokens or lengths
        )
        profiles = (
            Profile(
                width=width,
                height=height,
                pictures=pictures,
                rows=own * groups,
                tokens=tokens,
                frames=frames,
                chunks=text.chunks if (text := texts[tokens]) else 1,
                fixed_tokens=text.fixed if text and manifest.fixed_tokens else None,
            )
            for (width, height), pictures, groups, tokens in combinations
            for own, frames in _rows_and_frames(manifest, pictures)
        )
        return tuple(dict.fromkeys(profiles))

    def _check(self, factor: int) -> None:
        for size in self.sizes:
            if min(size) < 1 or any(edge % factor for edge in size):
                raise RequestError(f"--size: found {size[0]}x{size[1]}, expected multiples of {factor}")
        for name, numbers in (
            ("--batch", self.batches),
            ("--tokens", self.tokens),
            ("--state-rows", (self.state_rows,)),
        ):
            if any(number < 1 for number in numbers):
                raise RequestError(f"{name}: found {min(numbers)}, expected 1 or more")
        if self.optimization_level is not None and not 0 <= self.optimization_level <= 5:
            raise RequestError(f"--optimization-level: found {self.optimization_level}, expected 0 to 5")

    def key_lines(self) -> tuple[str, ...]:
        """Return what the engine key says of these options; the shapes and the target are fields of its own."""
        named: Mapping[str, str | int | bool | None] = {
            "optimization level": self.optimization_level,
            "workspace MB": self.workspace_mb,
            "version compatible": self.version_compatible,
            "refit": self.refit,
            "auxiliary streams": self.aux_streams,
            "separate skips": self.separate_skips,
            "state rows": self.state_rows,
        }
        return tuple(f"{name} {value}" for name, value in named.items() if value is not None and value is not False)


def _rows_and_frames(manifest: Manifest, pictures: int) -> tuple[tuple[int, int], ...]:
    """Return how many rows a group of them has, and of these a window: of pictures alone, and of a video of as many."""
    found = set[tuple[int, int]]()
    for spec in manifest.denoisers.values():
        if spec.frames is None or not spec.frames.whole:
            found.add((pictures, 1))
        if spec.frames is not None:
            windows = spec.frames.windows(pictures)
            found.add((sum(map(len, windows)), len(windows[0])))
    return tuple(sorted(found))


REFITTABLE = "refit True"  # as an engine's key says it
