"""From latents to pixels: which decoder, and whether at once where the latents lie, in tiles, or from the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.spec import Array, Engine, TensorSpec
from latentrt.engines.tensor_names import FRAMES, PIXELS, SQUARES
from latentrt.engines.workspace.contract import STATE, Event, Workspace
from latentrt.runtime.draw.finite import check_decoded, check_sums

Decode = Callable[[Array], Array]
"""latents (n, C, h, w), float32, as the denoiser sees them -> pixels (n, height, width, 3), uint8"""


def decode_in_place(
    workspace: Workspace, events: list[Event], *, decoder: str, slots: slice, some: int | None = None
) -> Array:
    """Decode what was drawn in some slots, and note when that was done; return the pixels. Raises NotFiniteError.

    some: where the memory is this process's own, how many pictures at a time, None for all: those of a video are many
    """
    each = some if some and workspace.local else slots.stop - slots.start
    for first in range(slots.start, slots.stop, each):
        workspace.run(decoder, slice(first, first + each))
    events.append(workspace.event())
    events[-1].wait()  # the event is after the pixels, so reading them does not wait again
    return _checked_pixels(workspace, slots)


def takes_frames(inputs: Iterable[TensorSpec]) -> bool:
    """Tell whether a network sees several frames at once. inputs: what it takes"""
    return any(tensor.name == FRAMES for tensor in inputs)


def _checked_pixels(workspace: Workspace, slots: slice) -> Array:
    pixels = workspace.read(PIXELS, slots)
    check_decoded(workspace, slots)
    return pixels


def on_workspace(workspace: Workspace, decoder: str) -> Decode:
    """Return what decodes latents of the workspace's shape on it."""

    def decode(latents: Array) -> Array:
        state = np.zeros((len(latents), workspace.state_rows, *latents.shape[1:]), dtype=np.float32)
        state[:, 0] = latents
        slots = slice(0, len(latents))
        workspace.write(STATE, state, slots)
        workspace.run(decoder, slots)
        return _checked_pixels(workspace, slots)

    return decode


def through_engine(engine: Engine, space: LatentSpec, *, slots: int = 1) -> Decode:
    """Return what decodes latents with a decoder's engine, whatever that begins with.

    slots: the pictures that it takes at the least; where there are fewer, it is given grey ones beside them
    A decoder that sees several frames at once sees all that it is given.
    """
    from latentrt.engines.verify.canonical_view import as_canonical  # for pictures in tiles

    canonical, together = as_canonical(engine, space), takes_frames(engine.spec.inputs)

    def decode(latents: Array) -> Array:
        filled = np.zeros((max(slots, len(latents)), *latents.shape[1:]), dtype=np.float32)
        filled[: len(latents)] = space.unscaled(latents)
        seen = {FRAMES: np.zeros(len(filled), np.float32)} if together else {}
        decoded = canonical({"latent_sample": filled, **seen})
        check_sums(decoded[SQUARES][: len(latents)])
        return decoded[PIXELS][: len(latents)].copy()

    return decode
