"""Drawing on the device: text, state and pixels stay there, and the host waits once for a finished picture."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator, Mapping
from functools import partial

import msgspec

from latentrt.engines.cuda.stream import Allocations, QueueEvent, StagingRing
from latentrt.engines.errors import ClosedError, DeviceLostError, EngineError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import PIXELS, PREVIOUS, SQUARES, is_residual
from latentrt.engines.tensorrt.buffers import (
    NEXT_STATE,
    ROWS,
    Decoded,
    DeviceBuffer,
    Stage,
    WorkspaceContext,
    workspace_axes,
)
from latentrt.engines.tensorrt.controlnets import Residuals, control_runs
from latentrt.engines.tensorrt.execution import Execution, Executor, Program
from latentrt.engines.tensorrt.profiles import REBUILD, Origin, input_shapes
from latentrt.engines.tensorrt.text_encoder import TextEncoder, fills
from latentrt.engines.workspace.contract import AT_FIRST, PER_STAGE, STATE, TEXT, Event, WorkspaceShape
from latentrt.engines.workspace.slot_workspace import Rows, SlotWorkspace

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


class TensorRTWorkspace(SlotWorkspace[DeviceBuffer]):
    """A workspace on the device; it implements `Workspace`.

    Everything is allocated when it is constructed: a context for each number of model rows that the UNet is compiled
    for and for each number of texts that the text encoder is; and one for a decoder when `reset` names it first.
    Before each stage the state is copied to where the stage reads it, on the device and inside the stage's graph: two
    buffers in turn would need every graph twice, to save the copy of a megabyte or two on a device that copies
    terabytes a second. That copy is the state before the last stage, which can be read too.
    Raises EngineError where the engines are not compiled for the shape, or the device has no room.
    """

    queued = True

    def __init__(
        self, executor: Executor, programs: Programs, shape: WorkspaceShape, origin: Origin, *, slots: int = SLOTS
    ) -> None:
        unet = programs.unet
        mine = {unet.spec.component: unet, **programs.decoders}
        super().__init__(shape, mine, state_rows=_state_rows(unet), denoiser=unet.spec.component)
        self._queue, self._allocations = executor.queue, Allocations(executor.queue)
        self._executions: list[Execution] = []
        self._end = weakref.finalize(self, _free, executor, self._executions, self._allocations)
        self._closed = ""
        self._idle: list[QueueEvent] = []
        self._sent = False  # what the next stage takes is on the device
        self._texts: dict[str, TextEncoder] = {}
        self._controls: dict[str, dict[int, Execution]] = {}
        self._residuals: Residuals | None = None
        self._decoders: dict[str, Execution] = {}
        self._mine = mine
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
        unet = programs.unet
        rows = context.profiles(unet.spec, free=ROWS)
        shapes = input_shapes(unet.spec, rows[max(rows)])
        stays = [t for t in unet.spec.inputs if t.name not in PER_STAGE and not is_residual(t.name)]
        self._buffers = {tensor.name: DeviceBuffer(context, tensor, shapes[tensor.name]) for tensor in stays}
        self._make_stages(context, programs, rows, slots)
        for name in AT_FIRST.keys() & self._buffers.keys():
            self.write(name, AT_FIRST[name])
        self._written.forget()
        text = self._buffers.get(TEXT)
        for component, program in programs.text_encoders.items():
            if text is not None and fills(program.spec, text):
                self._texts[component] = TextEncoder(context, program, text)
                self._mine[component] = program
                self._executions += self._texts[component].executions
        self._decoded, self._finished = Decoded(self._allocations, self.shape), self._allocations.event()
        self._inbox = self._allocations.pinned(max(buffer.size for buffer in self._buffers.values()))
        self._received = self._allocations.event()

    def _make_stages(self, context: WorkspaceContext, programs: Programs, rows: Mapping[int, int], slots: int) -> None:
        unet, stay = programs.unet, dict(self._buffers)
        self._previous = self._allocations.allocate(stay[STATE].size)
        if any(is_residual(tensor.name) for tensor in unet.spec.inputs):
            self._residuals = Residuals(context, unet, rows[max(rows)])
        residuals = self._residuals.block.addresses if self._residuals else {}
        self._stages: dict[int, Stage] = {}
        for number, profile in rows.items():
            self._stages[number] = Stage(context, unet, profile, stay, self._previous, residuals)
            self._executions.append(self._stages[number].run)
        largest = max(stage.block.size for stage in self._stages.values())
        self._staging = StagingRing(self._queue, self._allocations, largest, slots=slots)
        for component, program in programs.controlnets.items() if self._residuals else ():
            assert self._residuals is not None
            own, runs = control_runs(context, program, stay, self._residuals, self._stages)
            self._buffers |= own
            self._controls[component], self._mine[component] = runs, program
            self._executions += runs.values()

    @contextlib.contextmanager
    def _turn(self) -> Iterator[None]:
        """Hold the queue. Raises ClosedError."""
        with self._queue.lock:
            self._check_open()
            yield

    def _check_open(self) -> None:
        if self._closed:
            raise ClosedError(f"the workspace for {self.shape} {self._closed}")

    def _buffer(self, name: str, values: Array) -> DeviceBuffer:
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

    def _give(self, name: str, values: Array) -> None:
        super()._give(name, values)
        self._sent = False

    def _prepare(self, rows: Rows) -> None:
        """Put what the next stage takes in the queue, unless a ControlNet before it took it already."""
        if not self._sent:
            self._stages[rows.count].send(self._given, self._staging)
            self._sent = True
        if self._residuals:
            self._residuals.prepare()

    def _advance(self, rows: Rows) -> None:
        self._prepare(rows)
        self._stages[rows.count].run.run()
        if self._residuals:
            self._residuals.note(added=False)
        self._sent = False

    def _follow(self, program: str, rows: Rows) -> None:
        assert self._residuals is not None
        self._prepare(rows)
        self._controls[program][rows.count].run()
        self._residuals.note(added=True)

    def _encode(self, program: str, given: Mapping[str, Array], rows: slice) -> None:
        self._written.note(TEXT, self._texts[program].put(given, rows), self._buffers[TEXT].shape[0])

    def _decoder_run(self, name: str) -> Execution:
        if name not in self._decoders:
            run = self._decoded.run_of(self._context, self._mine[name], self._buffers)
            self._decoders[name] = run
            self._executions.append(run)
        return self._decoders[name]

    def _decode(self, program: str, rows: slice) -> None:
        """Run a decoder, and copy what it gives to where `read` finds it."""
        self._decoder_run(program).run()
        self._queue.device.copy_out(self._decoded.host, self._decoded.block.address, self._queue.stream)
        self._queue.record(self._finished)
        for name in (PIXELS, SQUARES):
            self._written.note(name, rows, self.shape.pictures)

    def _fetch(self, name: str) -> tuple[Array, Callable[[], None]]:
        """Return what the last decoder gave, or have a buffer copied to the host."""
        if name in (PIXELS, SQUARES):
            return self._decoded.arrays[name], partial(self.wait_until, self._finished)
        buffer = self._buffers[STATE if name == PREVIOUS else name]
        block = self._inbox[: buffer.size]
        address = self._previous if name == PREVIOUS else buffer.address
        self._queue.device.copy_out(block, address, self._queue.stream)
        self._queue.record(self._received)
        return block.view(buffer.dtype).reshape(buffer.shape), partial(self.wait_until, self._received)

    def event(self) -> Event:
        """Note the device's own time at which the queue comes to this point."""
        with self._turn():
            event = self._idle.pop() if self._idle else self._allocations.event(timed=True)
            self._queue.record(event)
            return Tick(self, event, self._idle)

    def wait_until(self, event: QueueEvent) -> None:
        """Wait until the queue comes to an event."""
        self._check_open()
        self._queue.wait_until(event)

    def seconds(self, first: QueueEvent, second: QueueEvent) -> float:
        """Return the seconds between two events that the queue came to."""
        with self._turn():
            return self._queue.device.elapsed_s(first.handle, second.handle)

    def reset(self, *, decoder: str | None = None) -> None:
        """Make the workspace as good as new: nothing is written.

        decoder: the one that may be run from now on. What it takes is allocated here, the first time.
        Raises EngineError where it was not opened or is not compiled for the shape, and where the device has no room.
        """
        with self._turn():
            super().reset(decoder=decoder)
            self._sent = False
            if self._residuals:
                self._residuals.forget()
            if decoder is not None:
                self._decoder_run(decoder)

    def close(self, reason: str = "is closed; open the bundle again") -> None:
        """Wait for the queue and free what the workspace holds, as when nobody has it any more.

        Closing twice is closing once.
        """
        self._closed = self._closed or reason
        self._mine.clear()
        self._end()


def _state_rows(unet: Program) -> int:
    """Return how many rows of state a fused denoise stage carries. Raises EngineError where it is none."""
    shapes = {tensor.name: tensor.shape for tensor in unet.spec.inputs}
    if not {STATE, *PER_STAGE} <= shapes.keys() or [tensor.name for tensor in unet.spec.outputs] != [NEXT_STATE]:
        name, takes = unet.spec.component, ", ".join(shapes)
        raise EngineError(f"{name} is no fused denoise stage: it takes {takes}; {REBUILD}")
    return int(shapes[STATE][1])


def _free(executor: Executor, executions: list[Execution], allocations: Allocations) -> None:
    with contextlib.suppress(DeviceLostError), executor.queue.lock:
        executor.queue.wait_idle()
        while executions:
            executions.pop().close()
        allocations.close()
