"""Nothing that is not finite is delivered: where numbers are looked at on their way to a picture."""

from __future__ import annotations

import logging

import numpy as np

from latentrt.engines.errors import EngineError, NotFiniteError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import SQUARES
from latentrt.engines.workspace.contract import TEXT as TEXT_ROWS
from latentrt.engines.workspace.contract import Workspace, sums_of_squares

# Where numbers may have left the range of float32, as `NotFiniteError.place` says it.
TEXT, START, FOLLOWED = "the text", "what it starts from", "what a T2I-Adapter made of its image"
HINTED = "what the encoder made of an image to follow"
SHOWN = "what an IP-Adapter made of its image"
LATENTS, PIXELS = "the latents", "what the decoder made of the latents"
_log = logging.getLogger(__name__)


def finite(array: Array, place: str, *, pictures: int, stage: int | None = None, stages: int | None = None) -> Array:
    """Return an array as it is. Raises NotFiniteError if a number in it is not finite, or cannot be squared.

    array: (rows, …), of which row r belongs to picture r % pictures; fewer rows are for all of them
    """
    lost = np.flatnonzero(~np.isfinite(sums_of_squares(array)))
    if lost.size:
        owners = range(pictures) if len(array) < pictures else sorted({int(row) % pictures for row in lost})
        raise NotFiniteError(place, tuple(owners), stage=stage, stages=stages)
    return array


def check_decoded(workspace: Workspace, slots: slice) -> None:
    """Look at what a decoder was given and what it gave in some slots. Raises NotFiniteError.

    On a device nothing else is looked at, so that nothing waits. After a failure a wait costs nothing: then the text
    is, which was there before the first stage.
    """
    sums = workspace.read(SQUARES, slots)
    try:
        check_sums(sums)
    except NotFiniteError:
        _check_text(workspace)
        raise


def check_sums(sums: Array) -> None:
    """Look at a decoder's sums of squares, (n, 2), see `Workspace.read`. Raises NotFiniteError."""
    for column, place in enumerate((LATENTS, PIXELS)):
        if lost := np.flatnonzero(~np.isfinite(sums[:, column])).tolist():
            raise NotFiniteError(place, tuple(lost))


def _check_text(workspace: Workspace) -> None:
    try:
        text = workspace.read(TEXT_ROWS)
    except EngineError:  # a workspace that only decodes was given none
        return
    finite(text, TEXT, pictures=workspace.shape.pictures)


def one_coloured(pixels: Array) -> tuple[str, ...]:
    """Return a warning for each picture of a single colour, and log it: it may be meant, and is more often a fault.

    pixels: (n, height, width, 3), uint8
    """
    found = []
    for number, picture in enumerate(pixels, 1):
        colour = picture[0, 0]
        if (picture[0] == colour).all() and (picture == colour).all():
            found.append(
                f"every pixel of picture {number} is {tuple(colour.tolist())}; if that is not meant, try another seed, "
                "less guidance or smaller LoRA scales, and run `latentrt verify` on the bundle"
            )
    for sentence in found:
        _log.warning(sentence)
    return tuple(found)
