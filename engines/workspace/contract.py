"""The contract of drawing where the engines run: text, state and pixels of a batch stay there from start to end."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Array


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkspaceShape:
    """What one workspace is for. width and height are in pixels; tokens is the length of the prompts' encoding."""

    pictures: int
    tokens: int
    width: int
    height: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StageInput:
    """What one stage takes besides what lies on the workspace: see `stage.fuse_stage` for each array's meaning.

    control: (P, control_width) float32; guidance: (P, M) float32; picture_of_row: (M,) int64
    noise: (P, C, h, w) float32, or None where it has no weight
    scales: the ControlNets that run at this stage, each with what multiplies its residuals: (M,) float32
    M may differ from stage to stage: a stage without guidance has a row for each picture, not two.
    """

    control: Array
    guidance: Array
    picture_of_row: Array
    noise: Array | None = None
    scales: Mapping[str, Array] = field(default_factory=dict)


def no_decoder(name: str | None, there: Iterable[str]) -> EngineError:
    """Return the error that a workspace cannot decode: it was asked for without one, or there is none so named."""
    if name is None:
        return EngineError("the workspace was asked for without a decoder, so it has none to decode with")
    return EngineError(f"decoding needs {name}, opened are {', '.join(there)}")


def sums_of_squares(array: Array) -> Array:
    """Return the sum of each row's squares, (rows,), float32: not finite where a number is not, or cannot be squared.

    Networks normalise by such sums: past them they give zeros, and a grey picture instead of an error.
    """
    flat = array.reshape(len(array), -1).astype(np.float32, copy=False)
    return np.asarray(np.einsum("rn,rn->r", flat, flat))


class Workspace(Protocol):
    """A batch of pictures where the engines run: on a device, or in this process's own memory.

    `encode`, `write`, `advance`, `decode` and `mark` put work in a queue, in the order of the calls, and return at
    once; the arrays they are given may be changed as soon as they return. Only `read`, `pixels`,
    `elapsed` and `settle` wait.
    Model rows are laid out with the prompts of all pictures first and then the negative prompts, so that a stage
    without guidance uses the first rows of the same buffers. One workspace serves one thread at a time.

    write and read name the inputs of the fused stage: state, encoder_hidden_states, keep_mask, …; and what a
    ControlNet follows, `residuals.hint_of` its component. `previous_state` can be read too, from the first `advance`
    on: what the state was before the last one.
    """

    shape: WorkspaceShape
    queued: bool
    """Whether work goes on behind the host's back: then encoding in place saves a wait."""

    @property
    def state_rows(self) -> int:
        """Return how many rows of state it carries."""
        ...

    def encode(self, inputs: Mapping[str, Array]) -> None:
        """Run the text encoder, rows of tokens in, and leave its output as the stage's `encoder_hidden_states`."""
        ...

    def write(self, name: str, array: Array) -> None:
        """Set an input of the stage that stays the same from stage to stage, or the state to begin with.

        Inputs with an axis of rows may be given more rows than a stage uses: it takes the first ones.
        What was written stays until it is written again, on the next picture too.
        """
        ...

    def advance(self, stage: StageInput) -> None:
        """Run one denoise stage: the state becomes the next state."""
        ...

    def decode(self) -> None:
        """Run the decoder that the workspace was asked for with on the first row of the state.

        Raises EngineError where it was asked for without one.
        """
        ...

    def read(self, name: str) -> Array:
        """Wait for the queue and return a copy of an input of the stage; `state` is (P, R, C, h, w) float32."""
        ...

    def pixels(self) -> Array:
        """Wait for the queue and return the pictures of the last `decode`: (P, height, width, 3), uint8, a copy."""
        ...

    def squares(self) -> Array:
        """Wait as `pixels` does and return sums of squares of the latents and of what became of them: (P, 2), float32.

        Where one is not finite, the numbers it is the sum of are not, and the pixels mean nothing.
        """
        ...

    def lost(self) -> tuple[int, ...]:
        """Return the pictures whose latents are known to be no longer finite. On a device only `squares` knows."""
        ...

    def mark(self) -> None:
        """Note the time at which the queue comes to this place."""
        ...

    def elapsed(self) -> tuple[float, ...]:
        """Wait for the queue and return the seconds between one mark and the next; forget the marks."""
        ...

    def settle(self, behind: int) -> None:
        """Wait until the queue is at most this many marks behind: what paces a caller who watches each stage."""
        ...


class ImmediateWorkspace:
    """What workspaces share on which every call is done when it returns: the host's clock, and the last pictures."""

    queued = False

    def __init__(self) -> None:
        self._marks: list[float] = []
        self._pixels: Array | None = None
        self._squares: Array | None = None

    def pixels(self) -> Array:
        """Return the pictures of the last `decode`."""
        if self._pixels is None:
            raise EngineError("the workspace has no pixels before `decode`")
        return self._pixels

    def squares(self) -> Array:
        """Return the sums of squares of the last `decode`."""
        if self._squares is None:
            raise EngineError("the workspace has no pixels before `decode`")
        return self._squares

    def lost(self) -> tuple[int, ...]:
        """Return nothing: the state may lie on a device."""
        return ()

    def mark(self) -> None:
        """Note the time."""
        self._marks.append(time.perf_counter())

    def elapsed(self) -> tuple[float, ...]:
        """Return the seconds between the marks and forget them."""
        seconds, self._marks = np.diff(self._marks), []
        return tuple(seconds.tolist())

    def settle(self, behind: int) -> None:
        """Return at once: nothing is behind."""
