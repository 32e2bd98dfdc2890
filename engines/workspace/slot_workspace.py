"""What every workspace does alike: named buffers with rows for slots, and what must be there before a program runs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeVar

import numpy as np

from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import (
    COND,
    FRAMES,
    HINT,
    PIXELS,
    PREVIOUS,
    SQUARES,
    control_width,
    is_residual,
    row_groups,
)
from latentrt.engines.workspace.contract import (
    ALL,
    AT_FIRST,
    CONTROL,
    GUIDANCE,
    IDS,
    NOISE,
    OWNERS,
    PER_STAGE,
    STATE,
    TEXT,
    Event,
    Instant,
    WorkspaceShape,
    buffer_of,
    no_decoder,
    not_written,
    own_buffer,
    rows_in,
    span,
)

if TYPE_CHECKING:
    import numpy.typing as npt

# What a network of a stage takes that nobody has to write.
MADE = frozenset({*PER_STAGE, *AT_FIRST, "sample", "timestep", FRAMES})
NO_ROWS = np.zeros(0, dtype=bool)
AT_ONCE = contextlib.nullcontext()


class Buffer(Protocol):
    """Numbers that stay where the engines run, by rows."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of all rows."""
        ...

    @property
    def dtype(self) -> Any:
        """Return the type of the numbers."""
        ...

    def write(self, values: Array, rows: slice) -> None:
        """Set rows. values: contiguous, of the buffer's type, with a row for each"""
        ...


class HostBuffer:
    """A buffer in this process's own memory."""

    def __init__(self, array: Array) -> None:
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def write(self, values: Array, rows: slice) -> None:
        """Set rows."""
        self.array[rows] = values

    def read(self) -> Array:
        """Return the array itself, not to be kept."""
        return self.array


class Written:
    """Which rows of which buffers hold what somebody wrote or a program computed."""

    def __init__(self) -> None:
        self._rows: dict[str, Array] = {}

    def note(self, name: str, rows: slice | Array, size: int) -> None:
        """Note rows of a buffer that has `size` of them. rows: a slice, or a bool for each"""
        self._rows.setdefault(name, np.zeros(size, dtype=bool))[rows] = True

    def require(self, name: str, rows: slice | Array) -> None:
        """Raise EngineError if one of the rows is not there. rows: a slice, or a bool for each of the first"""
        known = self._rows.get(name, NO_ROWS)
        if isinstance(rows, slice):
            there = known[rows].any() if rows == ALL else known[rows].all() and len(known) >= (rows.stop or 0)
        else:
            there = not (rows[: len(known)] & ~known[: len(rows)]).any() and not rows[len(known) :].any()
        if not there:
            raise not_written(name)

    def extent(self, name: str) -> int:
        """Return how many rows there are up to the last one that is there."""
        return int(np.flatnonzero(self._rows.get(name, NO_ROWS)).max(initial=-1)) + 1

    def forget(self, *names: str, rows: slice = ALL) -> None:
        """Forget rows of these buffers, or of all."""
        for name in names or tuple(self._rows):
            self._rows.get(name, NO_ROWS)[rows] = False


class Rows:
    """Which of the M model rows have a weight in the stages to come, and which of the P slots' pictures take part."""

    def __init__(self, guidance: Array, owners: Array, *, slots: int, frames: int = 1) -> None:
        """Take what was written. Raises EngineError if it is not (P, M) and (M,), or owners are no slots.

        frames: of a window: a row without a weight of its own is computed with those that are seen with it
        """
        if guidance.shape != (slots, owners.size) or owners.ndim != 1:
            raise EngineError(f"{GUIDANCE}: found shape {guidance.shape}, expected {(slots, owners.size)}")
        if owners.min() < 0 or owners.max() >= slots:  # a device would read past the end
            raise EngineError(f"{OWNERS}: found {owners.tolist()}, expected pictures below {slots}")
        if owners.size % frames:
            raise EngineError(f"{OWNERS}: found {owners.size} rows, expected whole windows of {frames}")
        self.guidance, self.owners = guidance, owners
        self.weighted = (guidance != 0).any(axis=0).reshape(-1, frames).any(axis=1).repeat(frames)  # (M,) bool
        self.pictures = (guidance != 0).any(axis=1)  # (P,) bool
        self.met: set[str] = set()  # the programs that are known to have what they need for these rows

    @property
    def count(self) -> int:
        """Return M."""
        return len(self.owners)


B = TypeVar("B", bound=Buffer)


class SlotWorkspace(Generic[B]):
    """A workspace but for what a backend does: it makes buffers, and runs programs on them. See `Workspace`.

    programs: what has the spec of each component that may be run, by name
    state_rows: R, the rows of a picture's state
    denoiser: the network that the stages run
    """

    queued, local = False, False

    def __init__(self, shape: WorkspaceShape, programs: Mapping[str, Any], *, state_rows: int, denoiser: str) -> None:
        self.shape, self.state_rows = shape, state_rows
        self._programs, self._denoiser = programs, denoiser
        self._groups = row_groups(self._inputs(denoiser))
        self._decoder: str | None = None
        self._buffers: dict[str, B] = {}  # the state is one of them from the beginning on
        self._given: dict[str, Array] = {}  # what is handed over when a program runs, as it was written
        self._written = Written()
        self._rows: Rows | None = None  # of the stages to come, once they are known

    def _turn(self) -> AbstractContextManager[None]:
        """Return what is held during a call."""
        return AT_ONCE

    def _buffer(self, name: str, values: Array) -> B | None:
        """Return a buffer to write values to; None if they mean nothing here. Raises EngineError on a wrong name."""
        raise NotImplementedError

    def _advance(self, rows: Rows) -> None:
        """Run the denoiser on what is there. What it computes is then the state, and what was that is PREVIOUS."""
        raise NotImplementedError

    def _follow(self, program: str, rows: Rows) -> None:
        """Run a ControlNet on the residuals of those before it since the last stage."""
        raise NotImplementedError

    def _decode(self, program: str, rows: slice) -> None:
        """Run a decoder: PIXELS and SQUARES are then buffers that have the rows of these slots."""
        raise NotImplementedError

    def _encode(self, program: str, given: Mapping[str, Array], rows: slice) -> None:
        """Run a text encoder on what was written for it, and have what it gives in rows of the text."""
        states = self._programs[program](given)["last_hidden_state"]
        self.write(TEXT, states.reshape(-1, self.shape.tokens, states.shape[-1]), rows)

    def fit(self, program: str, rows: int) -> int:
        """Return the number itself: any will do."""
        return rows

    def write(self, name: str, array: npt.ArrayLike, rows: slice = ALL) -> None:
        """Set rows of a buffer, converted to its type. Raises EngineError on another name or shape."""
        values, size = np.asarray(array), self._rows_in(name)
        with self._turn():
            if size is None or name in PER_STAGE:
                self._give(name, values)
            elif (buffer := self._buffer(name, values)) is not None:
                rows = span(name, values, rows, buffer.shape[0])
                shape = (rows.stop - rows.start, *buffer.shape[1:])
                check_shape(name, values, shape, number=True)
                buffer.write(np.ascontiguousarray(np.broadcast_to(values, shape), dtype=buffer.dtype), rows)
                self._written.note(name, rows, size)
                if name == STATE:
                    self._written.forget(PREVIOUS, rows=rows)

    def _give(self, name: str, values: Array) -> None:
        """Keep a copy of what is handed over when a program runs."""
        state = self._buffers[STATE].shape
        if name == CONTROL:
            check_shape(name, values, (state[0], control_width(self.state_rows)))
        elif name == NOISE:
            check_shape(name, values, (state[0], *state[2:]))
        self._given[name] = np.array(values)
        if name in (GUIDANCE, OWNERS):
            self._rows = None

    def run(self, program: str, rows: slice = ALL) -> None:
        """Run a program, or put that in the queue. Raises EngineError."""
        with self._turn():
            takes = () if program == self._decoder else self._inputs(program)
            if program == self._decoder:
                self._written.require(STATE, rows)
                self._decode(program, rows)
            elif program == self._denoiser:
                stage = self._stage(program, rows)
                self._advance(stage)
                self._written.note(PREVIOUS, stage.pictures, self.shape.pictures)
                self._given = {name: array for name, array in self._given.items() if name not in (CONTROL, NOISE)}
            elif COND in takes or HINT in takes:
                self._follow(program, self._stage(program, rows))
            elif IDS in takes:
                given = {name: self._handed(own_buffer(program, name)) for name in takes}
                self._given = {name: array for name, array in self._given.items() if not name.startswith(f"{program}.")}
                self._encode(program, given, rows)
            else:
                raise no_decoder(program, self._programs)

    def _rows_in(self, name: str) -> int | None:
        return rows_in(name, self.shape, groups=self._groups)

    def _inputs(self, program: str) -> tuple[str, ...]:
        known = self._programs.get(program)
        return tuple(tensor.name for tensor in known.spec.inputs) if known else ()

    def _handed(self, name: str) -> Array:
        if name not in self._given:
            raise not_written(name)
        return self._given[name]

    def _stage(self, program: str, rows: slice) -> Rows:
        """Return the rows that the next stage runs on. Raises EngineError if a program of it misses anything."""
        if self._rows is None:
            given, shape = (self._handed(GUIDANCE), self._handed(OWNERS)), self.shape
            self._rows = Rows(*given, slots=shape.pictures, frames=shape.frames)
        stage = self._rows
        if rows.stop not in (None, stage.count) or stage.count != self.fit(self._denoiser, stage.count):
            raise EngineError(f"{GUIDANCE} is for {stage.count} model rows, expected {rows.stop}")
        self._handed(CONTROL)
        if program not in stage.met:
            self._require(program, stage)
            stage.met.add(program)
        return stage

    def _require(self, program: str, stage: Rows) -> None:
        takes = (tensor for tensor in self._inputs(program) if tensor not in MADE and not is_residual(tensor))
        for name in (STATE, *(buffer_of(program, tensor) for tensor in takes)):
            by_slot = self._rows_in(name) == self.shape.pictures
            self._written.require(name, stage.pictures if by_slot else stage.weighted)

    def read(self, name: str, rows: slice = ALL) -> Array:
        """Wait for what writes a buffer and return a copy of its rows."""
        with self._turn():
            self._written.require(name, rows)
            array, wait = self._fetch(name)
        wait()
        with self._turn():
            return array[slice(self._written.extent(name)) if rows == ALL else rows].copy()

    def _fetch(self, name: str) -> tuple[Array, Callable[[], None]]:
        """Return where a buffer's rows will be on the host, not to be kept, and what waits until they are there."""
        raise NotImplementedError

    def event(self) -> Event:
        """Note where the queue is now."""
        return Instant()

    def reset(self, *, decoder: str | None = None) -> None:
        """Make the workspace blank for other pictures: nothing is kept of the last ones but the buffers themselves.

        decoder: the one that may be run from now on, None for none. Raises EngineError where it was not opened.
        """
        with self._turn():
            if decoder is not None and decoder not in self._programs:
                raise no_decoder(decoder, self._programs)
            self._decoder, self._rows = decoder, None
            self._given.clear()
            for name, number in AT_FIRST.items():
                if self._written.extent(name):
                    self.write(name, number)
            self._written.forget()

    def _show_decoded(self, pixels: Array, squares: Array, rows: slice) -> None:
        """Have what a decoder gave to the host in the buffers that are read."""
        first = rows.start or 0
        for name, array in ((PIXELS, pixels), (SQUARES, squares)):
            self.write(name, array, slice(first, first + len(array)))


def at_once() -> None:
    """Wait for what is there already."""


def check_shape(name: str, values: Array, expected: tuple[int, ...], *, number: bool = False) -> None:
    """Raise EngineError if an array is of another shape. number: one that is for all will do too"""
    if values.shape != expected and not (number and not values.ndim):
        raise EngineError(f"{name}: found shape {values.shape}, expected {expected}")
