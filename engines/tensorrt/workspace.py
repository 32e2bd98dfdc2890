"""Drawing on the device: text, state and pixels stay there, and the host waits once for a finished picture."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

from latentrt.engines.cuda.stream import Holding, Mark, Outbox
from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import PREVIOUS, is_residual
from latentrt.engines.tensorrt.buffers import (
    ROWS,
    STATE,
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
from latentrt.engines.workspace.contract import StageInput, WorkspaceShape, no_decoder

TEXT = "encoder_hidden_states"
# What an input holds before it is written: no part of a picture is kept.
AT_FIRST = {"keep_mask": 1.0, "known": 0.0}
# Stages whose numbers may be on their way to the device at once. Longer plans wait for the copy of a stage long past,
# not for the queue: the device never runs dry.
SLOTS = 64


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Programs:
    """What a workspace runs.

    unet: any denoiser; decoders and controlnets: by component; text_encoder: None where the text is always written
    """

    unet: Program
    decoders: Mapping[str, Program]
    text_encoder: Program | None = None
    controlnets: Mapping[str, Program] = field(default_factory=dict)


class TensorRTWorkspace:
    """A workspace on the device; see `Workspace` for the methods of that name.

    Everything is allocated when it is constructed: a context for each number of model rows that the UNet is compiled
    for and for each number of texts that the text encoder is; and one for a decoder when `decode_with` names it first.
    Before each stage the state is copied to where the stage reads it, on the device and inside the stage's graph: two
    buffers in turn would need every graph twice, to save the copy of a megabyte or two on a device that copies
    terabytes a second. That copy is the state before the last stage, which can be read too.
    Raises EngineError where the engines are not compiled for the shape, or the device has no room.
    """

    queued = True

    def __init__(
        self, place: Place, programs: Programs, shape: WorkspaceShape, origin: Origin, *, slots: int = SLOTS
    ) -> None:
        self.shape = shape
        self._queue, self._holding = place.queue, Holding(place.queue)
        self._passes: list[Pass] = []
        self._closed = ""
        self._ticks: list[Mark] = []
        self._idle_ticks: list[Mark] = []
        self._decoded = self._advanced = False
        self._text: TextEncoder | None = None
        self._decoder: Pass | None = None
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
        rows = bench.profiles(programs.unet.spec, free=ROWS)
        self._residents = make_residents(bench, programs.unet, rows[max(rows)])
        for name in AT_FIRST.keys() & self._residents.keys():
            self._write_first(name)
        self._make_stages(bench, programs, rows, slots)
        text = self._residents.get(TEXT)
        if programs.text_encoder is not None and text is not None and fills(programs.text_encoder.spec, text):
            self._text = TextEncoder(bench, programs.text_encoder, text)
            self._passes += self._text.passes
        self._output, self._finished = Decoded(self._holding, self.shape), self._holding.mark()
        largest = max(resident.size for resident in (*self._residents.values(), *self._controls.hints.values()))
        self._inbox, self._received = self._holding.pinned(largest), self._holding.mark()

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

    def decode_with(self, decoder: str | None) -> None:
        """Choose what `decode` runs, None for nothing. What it takes is allocated here, the first time.

        Raises EngineError where it was not opened or is not compiled for the shape, and where the device has no room.
        """
        with self._queue.lock:
            self._check_open()
            self._decoder = self._decoder_pass(decoder) if decoder else None

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
            raise EngineError(f"the workspace for {self.shape} {self._closed}")

    def _resident(self, name: str) -> Resident:
        known = {**self._residents, **self._controls.hints}
        if name not in known:
            raise EngineError(f"there is no {name} on this workspace, expected one of {', '.join(known)}")
        return known[name]

    def encode(self, inputs: Mapping[str, Array]) -> None:
        """Run the text encoder, as often as its compiled numbers of texts need.

        Raises EngineError where there are more texts than model rows, and where the stage does not take what one
        encoder gives: then the text is to be written.
        """
        with self._queue.lock:
            self._check_open()
            if self._text is None:
                raise EngineError(f"no text encoder gives what the stage takes on this workspace: write {TEXT}")
            self._text.put(inputs)

    def write(self, name: str, array: Array) -> None:
        """Set an input of the stage, converted to its type. Raises EngineError on another name or shape."""
        with self._queue.lock:
            self._check_open()
            self._resident(name).write(array)
            self._advanced = self._advanced and name != STATE

    def advance(self, stage: StageInput) -> None:
        """Run one denoise stage. Raises EngineError where it has another number of model rows than compiled for."""
        with self._queue.lock:
            self._check_open()
            rows = len(stage.picture_of_row)
            if rows not in self._stages:
                raise EngineError(
                    f"the denoise stage is compiled for {sorted(self._stages)} model rows at "
                    f"{self.shape.pictures} pictures, found {rows}: every picture with guidance, or none"
                )
            self._stages[rows].send(stage, self._outbox)
            self._controls.run(stage)
            self._stages[rows].run.run()
            self._advanced = True

    def decode(self) -> None:
        """Run the decoder on the first row of the state, and copy what it gives to where `pixels` finds it."""
        with self._queue.lock:
            self._check_open()
            if self._decoder is None:
                raise no_decoder(None, self._programs)
            if not self._residents[STATE].held:
                raise EngineError("the workspace has no state to decode; write it first")
            self._decoder.run()
            self._queue.device.copy_out(self._output.host, self._output.address, self._queue.stream)
            self._queue.set(self._finished)
            self._decoded = True

    def pixels(self) -> Array:
        """Wait for the last `decode` and return a copy of its pictures."""
        return self._decoded_by_now(self._output.pixels)

    def squares(self) -> Array:
        """Wait for the last `decode` and return the sums of squares that came with its pictures."""
        return self._decoded_by_now(self._output.squares)

    def lost(self) -> tuple[int, ...]:
        """Return nothing: only a wait would tell."""
        return ()

    def _decoded_by_now(self, look: Callable[[], Array]) -> Array:
        self._check_open()
        if not self._decoded:
            raise EngineError("the workspace has no pixels before `decode`")
        self._queue.reach(self._end_of_picture())
        with self._queue.lock:
            self._check_open()
            return look()

    def _end_of_picture(self) -> Mark:
        """Return where the pixels are on the host, or the mark right behind: then `elapsed` waits no second time."""
        behind = self._ticks[-1] if self._ticks else self._finished
        return behind if behind.place == self._finished.place + 1 else self._finished

    def read(self, name: str) -> Array:
        """Wait for the queue and return a copy of what was written, or of the state as it is now or was before."""
        with self._queue.lock:
            self._check_open()
            resident = self._resident(STATE if name == PREVIOUS else name)
            if not resident.held or (name == PREVIOUS and not self._advanced):
                raise EngineError(f"{name} was not written to the workspace")
            shape, dtype = resident.held_shape, np.dtype(resident.tensor.dtype)
            block = self._inbox[: int(np.prod(shape)) * dtype.itemsize]
            address = self._previous if name == PREVIOUS else resident.address
            self._queue.device.copy_out(block, address, self._queue.stream)
            self._queue.set(self._received)
        self._queue.reach(self._received)
        with self._queue.lock:
            self._check_open()
            return block.view(dtype).reshape(shape).copy()

    def mark(self) -> None:
        """Note the device's own time at which the queue comes to this place."""
        with self._queue.lock:
            self._check_open()
            mark = self._idle_ticks.pop() if self._idle_ticks else self._holding.mark(timed=True)
            self._queue.set(mark)
            self._ticks.append(mark)

    def elapsed(self) -> tuple[float, ...]:
        """Wait for the last mark and return the seconds between the marks; forget them."""
        self._check_open()
        marks, self._ticks = self._ticks, []
        if marks:
            self._queue.reach(marks[-1])
        with self._queue.lock:
            self._check_open()
            self._idle_ticks += marks
            device = self._queue.device
            return tuple(device.elapsed_s(a.event, b.event) for a, b in itertools.pairwise(marks))

    def settle(self, behind: int) -> None:
        """Wait until the queue is at most this many marks behind."""
        self._check_open()
        if len(self._ticks) > behind:
            self._queue.reach(self._ticks[-1 - behind])

    def wipe(self) -> None:
        """Make the workspace as good as new: nothing written, no marks."""
        with self._queue.lock:
            self._check_open()
            self._idle_ticks += self._ticks
            self._ticks, self._decoded, self._advanced = [], False, False
            self._controls.wipe()
            for name, resident in self._residents.items():
                if name in AT_FIRST and resident.written:
                    self._write_first(name)
                elif name not in AT_FIRST:
                    resident.held = 0

    def _write_first(self, name: str) -> None:
        resident = self._residents[name]
        resident.write(np.full(resident.shape, AT_FIRST[name], dtype=np.float32))
        resident.written = False

    def warm_up(self) -> dict[str, float]:
        """Run everything once, so that graphs are recorded, then once more; return the device's seconds by pass.

        It leaves the workspace as good as new.
        """
        with self._queue.lock:
            for run in self._passes:
                run.run()
            self.wipe()
            for run in self._passes:
                self.mark()
                run.run()
            self.mark()
            return dict(zip((run.name for run in self._passes), self.elapsed(), strict=True))

    def close(self, reason: str = "is closed; open the bundle again") -> None:
        """Wait for the queue and free what the workspace holds. Closing twice is closing once."""
        with self._queue.lock:
            if self._closed:
                return
            self._closed = reason
            self._queue.drain()
            for run in self._passes:
                run.close()
            self._programs.clear()
            self._holding.close()
