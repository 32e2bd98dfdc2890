"""The contract of drawing where the engines run: named buffers, and programs bound to them by tensor name.

A workspace has P slots, one for a picture. What belongs to a picture lies in the row of its slot; what a denoiser
takes by model rows has 2 P rows at most: row r belongs to the picture in slot r % P, the first P rows are the
pictures' own prompts and the next P their negative prompts. Where the denoiser can skip layers, which its input
`skip_layers` says for a row, there are 3 P: the last are the prompts again, for skip-layer guidance.

Where a denoiser's rows are frames, a slot holds a frame, and a group of rows is the windows of the workspace's shape
one behind another: a frame that is in two windows has two rows in it.

Programs are the components of a bundle, by name. Each reads the buffers that are called as its inputs and writes those
that are called as its outputs; `next_` before a name says what becomes of the buffer of that name once the program ran.
`buffer_of` and `own_buffer` give the exceptions.

    text encoder    uses up `own_buffer` of its inputs, writes `encoder_hidden_states` in the rows that it is run for
    ControlNet      reads the state, what it follows and its scales, and adds to the residuals
    denoiser        reads the state, `control` and all that its graph takes, writes the state; uses up the residuals
    decoder         reads the state, writes `pixels` and `squares`
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

import msgspec
import numpy as np

from latentrt.engines.bundle.windows import Windows
from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import COND, HINT, SCALE, hint_of

if TYPE_CHECKING:
    import numpy.typing as npt

ALL = slice(None)
TEXT = "encoder_hidden_states"
IDS = "input_ids"  # marks the inputs of a text encoder
STATE, CONTROL, NOISE, GUIDANCE, OWNERS = "state", "control", "noise", "guidance", "picture_of_row"
# What a stage takes beside what stays, in the order of a device's memory. Control and noise are used up by it. Noise
# may be omitted where it has no weight, so it comes last.
PER_STAGE = (CONTROL, GUIDANCE, OWNERS, NOISE)
# What a buffer holds before it is written, where that means something: no part of a picture is kept.
AT_FIRST = {"keep_mask": 1.0, "known": 0.0}
# The buffers with a row for each slot; the others have one for each model row.
BY_SLOT = frozenset({STATE, CONTROL, NOISE, "keep_mask", "known", "condition", "pixels", "squares"})


class WorkspaceShape(msgspec.Struct, frozen=True, kw_only=True):
    """What one workspace is for. pictures: its slots; width and height are in pixels; tokens: the text's length.

    windows: of a video's frames, see `windows.py`; where there are none, each slot is seen alone
    """

    pictures: int
    tokens: int
    width: int
    height: int
    windows: Windows = ()

    @property
    def frames(self) -> int:
        """Return how many rows a denoiser sees at once, where its rows are frames."""
        return len(self.windows[0]) if self.windows else 1

    @property
    def rows(self) -> int:
        """Return how many model rows a group of them has."""
        return sum(map(len, self.windows)) or self.pictures

    @property
    def slot_of_row(self) -> Array:
        """Return the slot that each row of a group belongs to: (rows,) int64."""
        own = self.windows or (range(self.pictures),)
        return np.array([slot for window in own for slot in window], dtype=np.int64)


def own_buffer(component: str, tensor: str) -> str:
    """Return the buffer of a tensor that other programs have too: a text encoder's inputs, a ControlNet's scale."""
    return f"{component}.{tensor}"


def buffer_of(component: str, tensor: str) -> str:
    """Return the buffer that a tensor of a denoiser or a ControlNet is bound to."""
    if tensor in (HINT, COND):
        return hint_of(component)
    return own_buffer(component, tensor) if tensor == SCALE else tensor


def no_decoder(name: str, there: Iterable[str]) -> EngineError:
    """Return the error that a workspace cannot decode: it was asked for without this one, or there is none."""
    return EngineError(
        f"this workspace does not run {name}: ask for one with that decoder; opened are {', '.join(there)}"
    )


def not_written(name: str) -> EngineError:
    """Return the error that something is needed and was not written."""
    return EngineError(f"{name} was not written to the workspace; write it first")


def sums_of_squares(array: Array) -> Array:
    """Return the sum of each row's squares, (rows,), float32: not finite where a number is not, or cannot be squared.

    Networks normalise by such sums: past them they give zeros, and a grey picture instead of an error.
    """
    flat = array.reshape(len(array), -1).astype(np.float32, copy=False)
    return np.asarray(np.einsum("rn,rn->r", flat, flat))


class Event(Protocol):
    """A place in the queue of a workspace."""

    def wait(self) -> None:
        """Wait until the queue comes to this place."""
        ...

    def since(self, earlier: Event) -> float:
        """Wait as `wait` does and return the seconds between an earlier place of the same workspace and this one."""
        ...


class Workspace(Protocol):
    """Where pictures are drawn: on a device, or in this process's own memory. It serves one thread at a time.

    `write`, `run` and `event` put work in a queue, in the order of the calls, and return at once; the arrays they are
    given may be changed as soon as they return. Only `read` and an event's methods wait. Each raises EngineError on a
    name that is not there, on another shape, and where something is needed and was not written.
    """

    shape: WorkspaceShape
    queued: bool
    """Whether work is queued on a device: then encoding in place saves a wait."""
    local: bool
    """Whether the buffers are this process's own memory: then a look at them costs nothing."""

    @property
    def state_rows(self) -> int:
        """Return how many rows of state a picture has."""
        ...

    def fit(self, program: str, rows: int) -> int:
        """Return the least number of model rows, from `rows` up, that a program can run on."""
        ...

    def write(self, name: str, array: npt.ArrayLike, rows: slice = ALL) -> None:
        """Set rows of a buffer; a number sets all of theirs. They stay so until they are written again.

        `guidance`, (P, M), and `picture_of_row`, (M,), are written whole, for the M rows of the stages to come;
        `control`, (P, …), and `noise`, where it has a weight, are for the next stage alone, and what a text encoder
        takes for its next run.
        """
        ...

    def run(self, program: str, rows: slice = ALL) -> None:
        """Run a program on rows: the first M model rows, or the slots, or the model rows that a text is for.

        A program may compute more than was asked for, in slots that are not read.
        """
        ...

    def read(self, name: str, rows: slice = ALL) -> Array:
        """Wait for the queue and return a copy of what was written or computed.

        `state`: (P, R, C, h, w); `previous_state`: what it was before the last stage; `pixels`: (P, height, width, 3),
        uint8, of the last decoder; `squares`: (P, 2), float32, sums of squares of its latents and of what became of
        them: where one is not finite, the numbers it is the sum of are not, and the pixels mean nothing.
        """
        ...

    def event(self) -> Event:
        """Note where the queue is now."""
        ...


class Instant:
    """An event where every call is done when it returns."""

    def __init__(self) -> None:
        self._at = time.perf_counter()

    def wait(self) -> None:
        """Return at once."""

    def since(self, earlier: Event) -> float:
        """Return the seconds between two of them."""
        assert isinstance(earlier, Instant)
        return self._at - earlier._at


def rows_in(name: str, shape: WorkspaceShape, *, groups: int) -> int | None:
    """Return how many rows a buffer has; None for one that is written whole. groups: of model rows"""
    tensor = name.rpartition(".")[2]
    if name in BY_SLOT or tensor == COND:
        return shape.pictures
    if name in (GUIDANCE, OWNERS) or ("." in name and tensor != SCALE):
        return None
    return groups * shape.rows


def span(name: str, array: Array, rows: slice, size: int) -> slice:
    """Return the rows of a buffer that an array is for: as many as it has, or for a number as many as were named.

    size: of the buffer. Raises EngineError if they are not as many as named, or not there.
    """
    start = rows.start or 0
    stop = (size if rows.stop is None else rows.stop) if array.ndim == 0 else start + len(array)
    if stop > size or start >= stop or (rows.stop is not None and stop != rows.stop):
        raise EngineError(f"{name}: found {stop - start} rows from {start} on, expected some of {size}")
    return slice(start, stop)
