"""Drawing on the device: text, state and pixels stay there, and the host waits once for a finished picture."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from latentrt.engines.cuda.stream import Holding, Mark, Outbox
from latentrt.engines.errors import ClosedError, DeviceLostError, EngineError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import PIXELS, PREVIOUS, SQUARES, is_residual
from latentrt.engines.tensorrt.buffers import (
    ROWS,
    Bench,
    Decoded,
    Resident,
    Stage,
    make_decoder,
    make_residents,
    workspace_axes,
)
from latentrt.engines.tensorrt.controlnets import ControlNet, Controls, Residuals
from latentrt.engines.tensorrt.execution import Pass, Place, Program
from latentrt.engines.tensorrt.profiles import Origin
from latentrt.engines.tensorrt.text_encoder import TextEncoder, fills
from latentrt.engines.workspace.contract import (
    ALL,
    AT_FIRST,
    GUIDANCE,
    PER_STAGE,
    STATE,
    TEXT,
    Event,
    WorkspaceShape,
    Written,
    no_decoder,
    not_written,
    own_buffer,
)

# Stages whose numbers may be on their way to the device at once. Longer plans wait for the copy of a stage long past,
# not for the queue: the device never runs dry.
SLOTS = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Programs:
    """What a workspace runs.

    unet: any denoiser; decoders, text_encoders and controlnets: by component
    """

    unet: Program
    decoders: Mapping[str, Program]
    text_encoders: Mapping[str, Program] = field(default_factory=dict)
    controlnets: Mapping[str, Program] = field(default_factory=dict)


class Tick:
    """An event of a workspace on the device. Its mark serves another one when nobody holds it any more."""

    def __init__(self, workspace: TensorRTWorkspace, mark: Mark, idle: list[Mark]) -> None:
        self._workspace, self._mark, self._idle = workspace, mark, idle

    def wait(self) -> None:
        """Wait until the queue comes to this place."""
        self._workspace.reach(self._mark)

    def since(self, earlier: Event) -> float:
        """Wait and return the device's own seconds since an earlier event."""
        assert isinstance(earlier, Tick)
        self.wait()
        return self._workspace.seconds(earlier._mark, self._mark)

    def __del__(self) -> None:
        self._idle.append(self._mark)


class TensorRTWorkspace:
    """A workspace on the device; it implements `Workspace`.

    Everything is allocated when it is constructed: a context for each number of model rows that the UNet is compiled
    for and for each number of texts that the text encoder is; and one for a decoder when `wipe` names it first.
    Before each stage the state is copied to where the stage reads it, on the device and inside the stage's graph: two
    buffers in turn would need every graph twice, to save the copy of a megabyte or two on a device that copies
    terabytes a second. That copy is the state before the last stage, which can be read too.
    Raises EngineError where the engines are not compiled for the shape, or the device has no room.
    """

    queued, local = True, False

    def __init__(
        self, place: Place, programs: Programs, shape: WorkspaceShape, origin: Origin, *, slots: int = SLOTS
    ) -> None:
        self.shape = shape
        self._queue, self._holding = place.queue, Holding(place.queue)
        self._passes: list[Pass] = []
        self._end = weakref.finalize(self, _free, place, self._passes, self._holding)
        self._closed = ""
        self._idle: list[Mark] = []
        self._written = Written()
        self._next: dict[str, Array] = {}  # what the next stage takes, and is not on the device yet
        self._weighted: Array | None = None  # the last guidance is not 0, (P, M)
        self._given: dict[str, Array] = {}  # what text encoders read
        self._texts: dict[str, TextEncoder] = {}
        self._decoder = ""
        self._decoders: dict[str, Pass] = {}
        self._programs = dict(programs.decoders)
        self._bench = bench = Bench(
            place=place, holding=self._holding, axes=workspace_axes(shape, origin.factor), origin=origin
        )
        with self._queue.lock:
            try:
                self._set_up(bench, programs, slots)
            except BaseException:
                self.close()
                raise

    def _set_up(self, bench: Bench, programs: Programs, slots: int) -> None:
        self._denoiser = programs.unet.spec.component
        rows = bench.profiles(programs.unet.spec, free=ROWS)
        self._residents = make_residents(bench, programs.unet, rows[max(rows)])
        self._make_stages(bench, programs, rows, slots)
        self._buffers = {**self._residents, **self._controls.residents}
        for name in AT_FIRST.keys() & self._residents.keys():
            self._write_first(name)
        text = self._residents.get(TEXT)
        for component, program in programs.text_encoders.items():
            if text is not None and fills(program.spec, text):
                self._texts[component] = TextEncoder(bench, program, text)
                self._passes += self._texts[component].passes
        self._output, self._finished = Decoded(self._holding, self.shape), self._holding.mark()
        self._inbox = self._holding.pinned(max(resident.size for resident in self._buffers.values()))
        self._received = self._holding.mark()

    def _make_stages(self, bench: Bench, programs: Programs, rows: Mapping[int, int], slots: int) -> None:
        self._previous = self._holding.allocate(self._residents[STATE].size)
        unet = programs.unet
        takes = any(is_residual(tensor.name) for tensor in unet.spec.inputs)
        residuals = Residuals(bench, unet, rows[max(rows)]) if takes else None
        self._stages: dict[int, Stage] = {}
        for number, profile in rows.items():
            stage = self._stages[number] = Stage(bench, unet, profile, self._residents)
            self._passes.append(stage.run)
            stage.bind(self._previous, residuals.inputs if residuals else {})
        largest = max(stage.block_size for stage in self._stages.values())
        self._outbox = Outbox(self._queue, self._holding, largest, slots=slots)
        networks = {
            component: ControlNet(bench, program, self._residents, residuals, self._stages)
            for component, program in programs.controlnets.items()
            if residuals is not None
        }
        self._controls = Controls(networks, residuals)
        self._passes += self._controls.passes

    def _decoder_pass(self, name: str) -> Pass:
        if name not in self._programs:
            raise no_decoder(name, self._programs)
        if name not in self._decoders:
            run = make_decoder(self._bench, self._programs[name], self._residents[STATE], self._output)
            self._decoders[name] = run
            self._passes.append(run)
        return self._decoders[name]

    @property
    def state_rows(self) -> int:
        """Return how many rows of state the engines carry."""
        return self._residents[STATE].shape[1]

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the workspace for {self.shape} {self._closed}")

    def _resident(self, name: str) -> Resident:
        if name not in self._buffers:
            raise EngineError(f"there is no {name} on this workspace, expected one of {', '.join(self._buffers)}")
        return self._buffers[name]

    def fit(self, program: str, rows: int) -> int:
        """Return the least number of model rows, from `rows` up, that the stage is compiled for. Raises EngineError."""
        fitting = [number for number in self._stages if number >= rows]
        if not fitting:
            raise EngineError(
                f"the denoise stage is compiled for {sorted(self._stages)} model rows at {self.shape.pictures} "
                f"pictures, found {rows}"
            )
        return min(fitting)

    def write(self, name: str, array: npt.ArrayLike, rows: slice = ALL) -> None:
        """Set rows of a buffer, converted to its type. Raises EngineError on another name or shape."""
        values = np.asarray(array)
        with self._queue.lock:
            self._check_open()
            if name in PER_STAGE:
                self._next[name] = np.array(values)
                if name == GUIDANCE:
                    self._weighted = values != 0
            elif name.rpartition(".")[0] in self._texts:
                self._given[name] = np.array(values)
            else:
                resident = self._resident(name)
                self._written.note(name, resident.write(values, rows, name=name), resident.shape[0])
            if name == STATE:
                self._written.forget(PREVIOUS, rows=rows)

    def run(self, program: str, rows: slice = ALL) -> None:
        """Put one run of a program in the queue. Raises EngineError."""
        with self._queue.lock:
            self._check_open()
            if program == self._denoiser:
                self._advance(rows)
            elif program in self._controls.networks:
                self._controls.run(program, self._prepare(rows, self._controls.networks[program].needs))
            elif program in self._texts:
                self._encode(program, rows)
            else:
                self._decode(program, rows)

    def _advance(self, rows: slice) -> None:
        number = self._prepare(rows, self._residents.keys() - AT_FIRST.keys())
        self._controls.settle()
        self._stages[number].run.run()
        self._controls.used_up()
        assert self._weighted is not None
        self._written.note(PREVIOUS, np.asarray(self._weighted.any(axis=1)), self.shape.pictures)
        self._weighted = None

    def _prepare(self, rows: slice, needs: Iterable[str]) -> int:
        """Have what the next stage takes on the device; return its number of model rows. Raises EngineError."""
        if self._weighted is None:
            raise not_written(GUIDANCE)
        number = int(self._weighted.shape[-1])
        if number != self.fit(self._denoiser, number) or rows.stop not in (None, number):
            raise EngineError(f"guidance is for {number} model rows, expected {rows.stop}, one of {list(self._stages)}")
        for name in needs:
            used = np.asarray(self._weighted.any(axis=0 if self._resident(name).by_rows else 1))
            self._written.require(name, used)
        if self._next:
            given, self._next = self._next, {}
            if missing := next((name for name in PER_STAGE[:-1] if name not in given), None):
                raise not_written(missing)
            self._stages[number].send(given, self._outbox)
        return number

    def _encode(self, program: str, rows: slice) -> None:
        prefix = own_buffer(program, "")
        given = {name.removeprefix(prefix): array for name, array in self._given.items() if name.startswith(prefix)}
        self._given = {}
        rows = self._texts[program].put(given, rows)
        self._written.note(TEXT, rows, self._residents[TEXT].shape[0])

    def _decode(self, program: str, rows: slice) -> None:
        """Run a decoder, and copy what it gives to where `read` finds it."""
        if program != self._decoder or not program:
            raise no_decoder(program, self._programs)
        self._written.require(STATE, rows)
        self._decoders[program].run()
        self._queue.device.copy_out(self._output.host, self._output.address, self._queue.stream)
        self._queue.set(self._finished)
        for name in (PIXELS, SQUARES):
            self._written.note(name, rows, self.shape.pictures)

    def read(self, name: str, rows: slice = ALL) -> Array:
        """Wait for what writes a buffer and return a copy of its rows."""
        if name in (PIXELS, SQUARES):
            return self._decoded(name, rows)
        with self._queue.lock:
            self._check_open()
            resident = self._resident(STATE if name == PREVIOUS else name)
            self._written.require(name, rows)
            block = self._inbox[: resident.size]
            address = self._previous if name == PREVIOUS else resident.address
            self._queue.device.copy_out(block, address, self._queue.stream)
            self._queue.set(self._received)
        self._queue.reach(self._received)
        with self._queue.lock:
            self._check_open()
            return self._part(name, block.view(resident.tensor.dtype).reshape(resident.shape), rows)

    def _decoded(self, name: str, rows: slice) -> Array:
        self._check_open()
        self._written.require(name, rows)
        self._queue.reach(self._finished)
        with self._queue.lock:
            self._check_open()
            return self._part(name, self._output.pixels() if name == PIXELS else self._output.squares(), rows)

    def _part(self, name: str, array: Array, rows: slice) -> Array:
        return array[slice(self._written.extent(name)) if rows == ALL else rows].copy()

    def event(self) -> Event:
        """Note the device's own time at which the queue comes to this place."""
        with self._queue.lock:
            self._check_open()
            mark = self._idle.pop() if self._idle else self._holding.mark(timed=True)
            self._queue.set(mark)
            return Tick(self, mark, self._idle)

    def reach(self, mark: Mark) -> None:
        """Wait until the queue comes to a mark."""
        self._check_open()
        self._queue.reach(mark)

    def seconds(self, first: Mark, second: Mark) -> float:
        """Return the seconds between two marks that the queue came to."""
        with self._queue.lock:
            self._check_open()
            return self._queue.device.elapsed_s(first.event, second.event)

    def wipe(self, *, decoder: str | None = None) -> None:
        """Make the workspace as good as new: nothing is written.

        decoder: the one that may be run from now on. What it takes is allocated here, the first time.
        Raises EngineError where it was not opened or is not compiled for the shape, and where the device has no room.
        """
        with self._queue.lock:
            self._check_open()
            self._next, self._weighted, self._given = {}, None, {}
            self._controls.wipe()
            for name in AT_FIRST.keys() & self._residents.keys():
                if self._written.extent(name):
                    self._write_first(name)
            self._written.forget()
            self._decoder = decoder or ""
            if decoder is not None:
                self._decoder_pass(decoder)

    def _write_first(self, name: str) -> None:
        self._residents[name].write(np.asarray(AT_FIRST[name]), ALL)

    def close(self, reason: str = "is closed; open the bundle again") -> None:
        """Wait for the queue and free what the workspace holds, as when nobody has it any more.

        Closing twice is closing once.
        """
        self._closed = self._closed or reason
        self._programs.clear()
        self._end()


def _free(place: Place, passes: list[Pass], holding: Holding) -> None:
    with contextlib.suppress(DeviceLostError), place.queue.lock:
        place.queue.settle()
        while passes:
            passes.pop().close()
        holding.close()
