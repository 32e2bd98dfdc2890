"""Drawing on the device: text, state and pixels stay there, and the host waits once for a finished picture."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from latentrt.engines.cuda.stream import Allocations, QueueEvent, StagingRing
from latentrt.engines.errors import ClosedError, DeviceLostError, EngineError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import PIXELS, PREVIOUS, SQUARES, is_residual
from latentrt.engines.tensorrt.buffers import (
    ROWS,
    Decoded,
    PersistentInput,
    Stage,
    WorkspaceContext,
    make_decoder,
    make_persistent_inputs,
    workspace_axes,
)
from latentrt.engines.tensorrt.controlnets import ControlNet, Controls, Residuals
from latentrt.engines.tensorrt.execution import Execution, Executor, Program
from latentrt.engines.tensorrt.profiles import Origin
from latentrt.engines.tensorrt.text_encoder import TextEncoder, fills
from latentrt.engines.workspace.contract import (
    ALL,
    AT_FIRST,
    GUIDANCE,
    OWNERS,
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

if TYPE_CHECKING:
    import numpy.typing as npt

# Stages whose numbers may be on their way to the device at once. Longer plans wait for the copy of a stage long past,
# not for the queue: the device never runs dry.
SLOTS = 64


class Programs(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """What a workspace runs.

    unet: any denoiser; decoders, text_encoders and controlnets: by component
    """

    unet: Program
    decoders: Mapping[str, Program]
    text_encoders: Mapping[str, Program] = msgspec.field(default_factory=dict)
    controlnets: Mapping[str, Program] = msgspec.field(default_factory=dict)


class Tick:
    """An event of a workspace on the device. Its queue event serves another one when it is no longer referenced."""

    def __init__(self, workspace: TensorRTWorkspace, event: QueueEvent, idle: list[QueueEvent]) -> None:
        self._workspace, self._mark, self._idle = workspace, event, idle

    def wait(self) -> None:
        """Wait until the queue comes to this point."""
        self._workspace.wait_until(self._mark)

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
    for and for each number of texts that the text encoder is; and one for a decoder when `reset` names it first.
    Before each stage the state is copied to where the stage reads it, on the device and inside the stage's graph: two
    buffers in turn would need every graph twice, to save the copy of a megabyte or two on a device that copies
    terabytes a second. That copy is the state before the last stage, which can be read too.
    Raises EngineError where the engines are not compiled for the shape, or the device has no room.
    """

    queued, local = True, False

    def __init__(
        self, executor: Executor, programs: Programs, shape: WorkspaceShape, origin: Origin, *, slots: int = SLOTS
    ) -> None:
        self.shape = shape
        self._queue, self._allocations = executor.queue, Allocations(executor.queue)
        self._executions: list[Execution] = []
        self._end = weakref.finalize(self, _free, executor, self._executions, self._allocations)
        self._closed = ""
        self._idle: list[QueueEvent] = []
        self._written = Written()
        self._next: dict[str, Array] = {}  # what the next stage takes, by name
        self._sent = False  # it is on the device
        self._weighted: Array | None = None  # guidance is not 0, (P, M)
        self._given: dict[str, Array] = {}  # what text encoders read
        self._texts: dict[str, TextEncoder] = {}
        self._decoder = ""
        self._decoders: dict[str, Execution] = {}
        self._programs = dict(programs.decoders)
        self._context = context = WorkspaceContext(
            executor=executor, allocations=self._allocations, axes=workspace_axes(shape, origin.factor), origin=origin
        )
        with self._queue.lock:
            try:
                self._set_up(context, programs, slots)
            except BaseException:
                self.close()
                raise

    def _set_up(self, context: WorkspaceContext, programs: Programs, slots: int) -> None:
        self._denoiser = programs.unet.spec.component
        rows = context.profiles(programs.unet.spec, free=ROWS)
        self._persistent_inputs = make_persistent_inputs(context, programs.unet, rows[max(rows)])
        self._make_stages(context, programs, rows, slots)
        self._buffers = {**self._persistent_inputs, **self._controls.persistent_inputs}
        for name in AT_FIRST.keys() & self._persistent_inputs.keys():
            self._write_first(name)
        text = self._persistent_inputs.get(TEXT)
        for component, program in programs.text_encoders.items():
            if text is not None and fills(program.spec, text):
                self._texts[component] = TextEncoder(context, program, text)
                self._executions += self._texts[component].executions
        self._output, self._finished = Decoded(self._allocations, self.shape), self._allocations.event()
        self._inbox = self._allocations.pinned(max(persistent.size for persistent in self._buffers.values()))
        self._received = self._allocations.event()

    def _make_stages(self, context: WorkspaceContext, programs: Programs, rows: Mapping[int, int], slots: int) -> None:
        self._previous = self._allocations.allocate(self._persistent_inputs[STATE].size)
        unet = programs.unet
        takes = any(is_residual(tensor.name) for tensor in unet.spec.inputs)
        residuals = Residuals(context, unet, rows[max(rows)]) if takes else None
        self._stages: dict[int, Stage] = {}
        for number, profile in rows.items():
            stage = self._stages[number] = Stage(context, unet, profile, self._persistent_inputs)
            self._executions.append(stage.run)
            stage.bind(self._previous, residuals.inputs if residuals else {})
        largest = max(stage.block_size for stage in self._stages.values())
        self._staging = StagingRing(self._queue, self._allocations, largest, slots=slots)
        networks = {
            component: ControlNet(context, program, self._persistent_inputs, residuals, self._stages)
            for component, program in programs.controlnets.items()
            if residuals is not None
        }
        self._controls = Controls(networks, residuals)
        self._executions += self._controls.executions

    def _decoder_execution(self, name: str) -> Execution:
        if name not in self._programs:
            raise no_decoder(name, self._programs)
        if name not in self._decoders:
            run = make_decoder(self._context, self._programs[name], self._persistent_inputs[STATE], self._output)
            self._decoders[name] = run
            self._executions.append(run)
        return self._decoders[name]

    @property
    def state_rows(self) -> int:
        """Return how many rows of state the engines carry."""
        return self._persistent_inputs[STATE].shape[1]

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the workspace for {self.shape} {self._closed}")

    def _persistent(self, name: str) -> PersistentInput:
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
                self._next[name], self._sent = np.array(values), False
                if name == GUIDANCE:
                    self._weighted = values != 0
            elif name.rpartition(".")[0] in self._texts:
                self._given[name] = np.array(values)
            else:
                persistent = self._persistent(name)
                self._written.note(name, persistent.write(values, rows, name=name), persistent.shape[0])
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
        number = self._prepare(rows, self._persistent_inputs.keys() - AT_FIRST.keys())
        self._controls.wait_idle()
        self._stages[number].run.run()
        self._controls.used_up()
        assert self._weighted is not None
        self._written.note(PREVIOUS, np.asarray(self._weighted.any(axis=1)), self.shape.pictures)
        self._sent = False

    def _prepare(self, rows: slice, needs: Iterable[str]) -> int:
        """Have what the next stage takes on the device; return its number of model rows. Raises EngineError."""
        if self._weighted is None:
            raise not_written(GUIDANCE)
        number = int(self._weighted.shape[-1])
        if number != self.fit(self._denoiser, number) or rows.stop not in (None, number):
            raise EngineError(f"guidance is for {number} model rows, expected {rows.stop}, one of {list(self._stages)}")
        for name in needs:
            used = np.asarray(self._weighted.any(axis=0 if self._persistent(name).by_rows else 1))
            self._written.require(name, used)
        if not self._sent:
            if missing := next((name for name in PER_STAGE[:-1] if name not in self._next), None):
                raise not_written(missing)
            given, self._next = self._next, {name: self._next[name] for name in (GUIDANCE, OWNERS)}
            self._stages[number].send(given, self._staging)
            self._sent = True
        return number

    def _encode(self, program: str, rows: slice) -> None:
        prefix = own_buffer(program, "")
        given = {name.removeprefix(prefix): array for name, array in self._given.items() if name.startswith(prefix)}
        self._given = {}
        rows = self._texts[program].put(given, rows)
        self._written.note(TEXT, rows, self._persistent_inputs[TEXT].shape[0])

    def _decode(self, program: str, rows: slice) -> None:
        """Run a decoder, and copy what it gives to where `read` finds it."""
        if program != self._decoder or not program:
            raise no_decoder(program, self._programs)
        self._written.require(STATE, rows)
        self._decoders[program].run()
        self._queue.device.copy_out(self._output.host, self._output.address, self._queue.stream)
        self._queue.record(self._finished)
        for name in (PIXELS, SQUARES):
            self._written.note(name, rows, self.shape.pictures)

    def read(self, name: str, rows: slice = ALL) -> Array:
        """Wait for what writes a buffer and return a copy of its rows."""
        if name in (PIXELS, SQUARES):
            return self._decoded(name, rows)
        with self._queue.lock:
            self._check_open()
            persistent = self._persistent(STATE if name == PREVIOUS else name)
            self._written.require(name, rows)
            block = self._inbox[: persistent.size]
            address = self._previous if name == PREVIOUS else persistent.address
            self._queue.device.copy_out(block, address, self._queue.stream)
            self._queue.record(self._received)
        self._queue.wait_until(self._received)
        with self._queue.lock:
            self._check_open()
            return self._part(name, block.view(persistent.tensor.dtype).reshape(persistent.shape), rows)

    def _decoded(self, name: str, rows: slice) -> Array:
        self._check_open()
        self._written.require(name, rows)
        self._queue.wait_until(self._finished)
        with self._queue.lock:
            self._check_open()
            return self._part(name, self._output.pixels() if name == PIXELS else self._output.squares(), rows)

    def _part(self, name: str, array: Array, rows: slice) -> Array:
        return array[slice(self._written.extent(name)) if rows == ALL else rows].copy()

    def event(self) -> Event:
        """Note the device's own time at which the queue comes to this point."""
        with self._queue.lock:
            self._check_open()
            event = self._idle.pop() if self._idle else self._allocations.event(timed=True)
            self._queue.record(event)
            return Tick(self, event, self._idle)

    def wait_until(self, event: QueueEvent) -> None:
        """Wait until the queue comes to an event."""
        self._check_open()
        self._queue.wait_until(event)

    def seconds(self, first: QueueEvent, second: QueueEvent) -> float:
        """Return the seconds between two events that the queue came to."""
        with self._queue.lock:
            self._check_open()
            return self._queue.device.elapsed_s(first.handle, second.handle)

    def reset(self, *, decoder: str | None = None) -> None:
        """Make the workspace as good as new: nothing is written.

        decoder: the one that may be run from now on. What it takes is allocated here, the first time.
        Raises EngineError where it was not opened or is not compiled for the shape, and where the device has no room.
        """
        with self._queue.lock:
            self._check_open()
            self._next, self._sent, self._weighted, self._given = {}, False, None, {}
            self._controls.reset()
            for name in AT_FIRST.keys() & self._persistent_inputs.keys():
                if self._written.extent(name):
                    self._write_first(name)
            self._written.forget()
            self._decoder = decoder or ""
            if decoder is not None:
                self._decoder_execution(decoder)

    def _write_first(self, name: str) -> None:
        self._persistent_inputs[name].write(np.asarray(AT_FIRST[name]), ALL)

    def close(self, reason: str = "is closed; open the bundle again") -> None:
        """Wait for the queue and free what the workspace holds, as when nobody has it any more.

        Closing twice is closing once.
        """
        self._closed = self._closed or reason
        self._programs.clear()
        self._end()


def _free(executor: Executor, executions: list[Execution], allocations: Allocations) -> None:
    with contextlib.suppress(DeviceLostError), executor.queue.lock:
        executor.queue.wait_idle()
        while executions:
            executions.pop().close()
        allocations.close()
