"""From latents to pixels: which decoder, and whether at once where the latents lie, in tiles, or from the host."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.spec import Array, Engine
from latentrt.engines.tensor_names import PIXELS, SQUARES
from latentrt.engines.workspace.contract import STATE, Event, Workspace
from latentrt.runtime.draw.finite import check_decoded, check_sums

Decode = Callable[[Array], Array]
"""latents (n, C, h, w), float32, as the denoiser sees them -> pixels (n, height, width, 3), uint8"""


def decode_in_place(
    workspace: Workspace, events: list[Event], *, decoder: str, slots: slice, one_by_one: bool = False
) -> Array:
    """Decode what was drawn in some slots, and note when that was done; return the pixels. Raises NotFiniteError.

    one_by_one: where the memory is this process's own, a picture at a time: those of a video are many
    """
    each = 1 if one_by_one and workspace.local else slots.stop - slots.start
    for first in range(slots.start, slots.stop, each):
        workspace.run(decoder, slice(first, first + each))
    events.append(workspace.event())
    events[-1].wait()  # the event is after the pixels, so reading them does not wait again
    return _checked_pixels(workspace, slots)


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
    """
    from latentrt.engines.verify.canonical_view import as_canonical  # for pictures in tiles

    canonical = as_canonical(engine, space)

    def decode(latents: Array) -> Array:
        filled = np.zeros((max(slots, len(latents)), *latents.shape[1:]), dtype=np.float32)
        filled[: len(latents)] = space.unscaled(latents)
        decoded = canonical({"latent_sample": filled})
        check_sums(decoded[SQUARES][: len(latents)])
        return decoded[PIXELS][: len(latents)].copy()

    return decode
