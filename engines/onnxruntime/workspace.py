"""Drawing with ONNX Runtime where its memory is: the fused denoise stage on bound buffers, the state never copied."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.errors import EngineError
from latentrt.engines.onnxruntime.library import require
from latentrt.engines.onnxruntime.session import OnnxRuntimeEngine
from latentrt.engines.spec import Array, TensorSpec
from latentrt.engines.tensor_names import (
    HINT,
    NEXT,
    PIXELS,
    PREVIOUS,
    SCALE,
    SQUARES,
    is_residual,
    level_axes,
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
    Written,
    buffer_of,
    no_decoder,
    own_buffer,
    rows_in,
    span,
)

if TYPE_CHECKING:
    import numpy.typing as npt

NOBODY = "nobody"


class Buffer:
    """An array on a device of ONNX Runtime, and what the host wrote to it: on the CPU they are one."""

    def __init__(self, shape: tuple[int, ...], dtype: str, device: str, index: int, *, number: float = 0.0) -> None:
        self.dtype, self.shape = np.dtype(dtype), shape
        self._value = require().OrtValue.ortvalue_from_shape_and_type(shape, self.dtype.type, device, index)
        self._host = np.full(shape, number, dtype=self.dtype)
        self._value.update_inplace(self._host)
        self._one = device == "cpu"
        if self._one:
            self._host = self._value.numpy()  # the same memory

    @property
    def address(self) -> int:
        """Return where it lies."""
        return int(self._value.data_ptr())

    def write(self, values: Array, rows: slice, *, computed: bool = False) -> None:
        """Set rows. computed: a program wrote to it, so that the host does not know what there is"""
        if computed and not self._one:
            self._host = np.array(self._value.numpy())
        if not computed and np.array_equal(self._host[rows], np.broadcast_to(values, self._host[rows].shape)):
            return
        self._host[rows] = values
        if not self._one:
            self._value.update_inplace(self._host)

    def read(self) -> Array:
        """Return what there is, not to be kept."""
        return np.asarray(self._value.numpy())


class OnnxRuntimeWorkspace:
    """A workspace whose buffers lie on an ONNX Runtime device. It implements `Workspace`.

    The state lives in two buffers that take turns as the stage's input and output. A run of ONNX Runtime ends when
    its work is done, so nothing is queued.

    The residuals of ControlNets stay there too: each one's outputs are bound as the next one's inputs, and the last
    one's as the UNet's; where none runs, zeros are.

    engines: text encoders, the fused denoisers and ControlNets, and the decoders that take the state
    device, index: `cuda` or `cpu`, ONNX Runtime's own name, and which of the visible GPUs
    denoiser: the network that its stages run
    """

    queued, local = False, False

    def __init__(
        self,
        engines: Mapping[str, OnnxRuntimeEngine],
        space: LatentSpec,
        shape: WorkspaceShape,
        *,
        device: str,
        index: int = 0,
        denoiser: str,
    ) -> None:
        self.shape = shape
        self._engines, self._device, self._index, self._denoiser = engines, device, index, denoiser
        self._specs = {spec.name: spec for spec in engines[denoiser].spec.inputs}
        for name, engine in engines.items():
            own = [spec for spec in engine.spec.inputs if spec.name in (HINT, SCALE)]
            self._specs |= {buffer_of(name, spec.name): spec for spec in own}
        self.state_rows = int(self._specs[STATE].shape[1])
        height, width = shape.height // space.factor, shape.width // space.factor
        self._axes = {
            "pictures": shape.pictures,
            "rows": 2 * shape.pictures,
            "tokens": shape.tokens,
            "latent_height": height,
            "latent_width": width,
            "height": shape.height,
            "width": shape.width,
            **level_axes(height, width),
        }
        self._buffers: dict[tuple[str, int], Buffer] = {}  # by name, and M where it is written whole
        self._states = [self._new(self._specs[STATE]) for _ in range(2)]
        self._given: dict[str, Array] = {}  # what text encoders read, and the last guidance and pixels
        self._written = Written()
        # (what runs, M, which state is read, the last ControlNet before it) -> its binding, its recording's number
        self._bindings: dict[tuple[str, int, int, str], tuple[Any, int]] = {}
        self._decoder: str | None = None
        self._before = NOBODY  # the last ControlNet since the last stage
        self._quiet = True  # the noise is zero

    def fit(self, program: str, rows: int) -> int:
        """Return the number itself: any will do."""
        return rows

    def _new(self, spec: TensorSpec, *, rows: int | None = None) -> Buffer:
        axes = self._axes if rows is None else {**self._axes, "rows": rows}
        shape = tuple(axis if isinstance(axis, int) else axes[axis] for axis in spec.shape)
        return Buffer(shape, spec.dtype, self._device, self._index, number=AT_FIRST.get(spec.name, 0.0))

    def _buffer(self, name: str, rows: int) -> Buffer:
        """Return the buffer of a name, made when it is first needed. rows: M, for what is written whole for each M"""
        if name == STATE:
            return self._states[0]
        key = (name, rows if name in (GUIDANCE, OWNERS) else 0)
        if key not in self._buffers:
            self._buffers[key] = self._new(self._specs[name], rows=key[1] or None)
        return self._buffers[key]

    def write(self, name: str, array: npt.ArrayLike, rows: slice = ALL) -> None:
        """Copy rows to the device. Raises EngineError on a wrong name or shape."""
        values, size = np.asarray(array), rows_in(name, self.shape.pictures)
        if name not in self._specs and size is None:
            self._given[name] = np.array(values)
        elif name not in self._specs:
            raise EngineError(f"nothing here takes a '{name}'; there are {', '.join(self._specs)}")
        elif size is None:
            self._given[name] = np.array(values)
            self._put(name, values, ALL)
        else:
            rows = span(name, values, rows, size)
            self._put(name, values, rows)
        self._written.note(name, rows if size else ALL, size or 1)
        if name == STATE:
            self._written.forget(PREVIOUS, rows=rows)
        self._quiet = self._quiet and name != NOISE

    def _put(self, name: str, values: Array, rows: slice) -> None:
        buffer = self._buffer(name, values.shape[-1] if values.ndim else 0)
        expected = (rows.stop - rows.start, *buffer.shape[1:]) if rows != ALL else buffer.shape
        if values.ndim and values.shape != expected:
            raise EngineError(f"{name}: found shape {values.shape}, expected {expected}")
        buffer.write(values.astype(buffer.dtype, copy=False), rows, computed=name == STATE)

    def read(self, name: str, rows: slice = ALL) -> Array:
        """Return a copy of rows of a buffer."""
        self._written.require(name, rows)
        where = slice(self._written.extent(name)) if rows == ALL else rows
        if name in (PIXELS, SQUARES):
            return self._given[name][where].copy()
        buffer = self._states[1] if name == PREVIOUS else self._buffer(name, 0)
        return buffer.read()[where].copy()

    def event(self) -> Event:
        """Note the time."""
        return Instant()

    def reset(self, *, decoder: str | None = None) -> None:
        """Make the workspace blank for other pictures: nothing is kept of the last ones but the buffers themselves.

        decoder: the one that may be run from now on, None for none. Raises EngineError where it was not opened.
        """
        if decoder is not None and decoder not in self._engines:
            raise no_decoder(decoder, self._engines)
        self._decoder, self._before = decoder, NOBODY
        for name, number in AT_FIRST.items():
            if self._written.extent(name):
                self.write(name, number)
        self._written.forget()
        self._given.clear()

    def run(self, program: str, rows: slice = ALL) -> None:
        """Run a program; it is done when this returns."""
        if program == self._denoiser:
            self._advance(self._stage_rows(rows))
        elif program == self._decoder:
            self._decode(program, rows)
        elif own_buffer(program, SCALE) in self._specs:
            self._run_bound(program, self._stage_rows(rows))
            self._before = program
        elif program in self._engines and IDS in {spec.name for spec in self._engines[program].spec.inputs}:
            self._encode(program, rows)
        else:
            raise no_decoder(program, self._engines)

    def _stage_rows(self, rows: slice) -> int:
        for name in PER_STAGE[:-1]:
            self._written.require(name, ALL)
        return int(self._given[OWNERS].size if rows.stop is None else rows.stop)

    def _encode(self, program: str, rows: slice) -> None:
        engine = self._engines[program]
        output = engine({spec.name: self._given[own_buffer(program, spec.name)] for spec in engine.spec.inputs})
        states = output["last_hidden_state"]
        self.write(TEXT, states.reshape(-1, self.shape.tokens, states.shape[-1]), rows)

    def _advance(self, rows: int) -> None:
        if not self._written.extent(NOISE) and not self._quiet:
            self.write(NOISE, 0.0)
            self._quiet = True
        self._run_bound(self._denoiser, rows)
        self._states.reverse()
        self._before = NOBODY
        self._written.note(PREVIOUS, (self._given[GUIDANCE] != 0).any(axis=1), self.shape.pictures)
        self._written.forget(CONTROL, NOISE)

    def _run_bound(self, program: str, rows: int) -> None:
        """Run the stage or one of its ControlNets on the residuals of the ControlNet before it."""
        self._check_written(program)
        key = (program, rows, id(self._states[0]), self._before)
        if key not in self._bindings:
            self._bindings[key] = self._bind(program, rows), self._engines[program].new_recording()
        binding, graph = self._bindings[key]
        self._engines[program].run_bound(binding, graph=graph)

    def _check_written(self, program: str) -> None:
        weighted = self._given[GUIDANCE] != 0
        for spec in self._engines[program].spec.inputs:
            if spec.name not in (*PER_STAGE, *AT_FIRST) and not is_residual(spec.name):
                used = weighted.any(axis=0 if "rows" in spec.shape else 1)
                self._written.require(buffer_of(program, spec.name), used)

    def _bind(self, program: str, rows: int) -> Any:
        """Return the inputs and outputs of what runs.

        Made once for each number of rows, turn of the states, and ControlNet before it.
        """
        engine = self._engines[program]
        binding = engine.new_binding()
        for spec in engine.spec.inputs:
            binding.bind_input(spec.name, *self._bound(self._input(program, spec, rows), spec, rows))
        for spec in engine.spec.outputs:
            buffer = self._states[1] if program == self._denoiser else self._residual(program, spec)
            binding.bind_output(spec.name, *self._bound(buffer, spec, rows))
        return binding

    def _input(self, program: str, spec: TensorSpec, rows: int) -> Buffer:
        if is_residual(spec.name):
            return self._residual(self._before, spec)
        return self._buffer(buffer_of(program, spec.name), rows)

    def _bound(self, buffer: Buffer, spec: TensorSpec, rows: int) -> tuple[str, int, Any, list[int], int]:
        """Return what ONNX Runtime binds a tensor by: device, type, shape, and address of the buffer's first rows."""
        axes = {**self._axes, "rows": rows}
        shape = [axis if isinstance(axis, int) else axes[axis] for axis in spec.shape]
        return self._device, self._index, buffer.dtype.type, shape, buffer.address

    def _residual(self, component: str, spec: TensorSpec) -> Buffer:
        """Return the buffer of what ControlNets up to this one add up to, zeros for nobody's."""
        key = (f"{component}.{spec.name.removeprefix(NEXT)}", 0)
        if key not in self._buffers:
            self._buffers[key] = self._new(spec)
        return self._buffers[key]

    def _decode(self, program: str, rows: slice) -> None:
        """Run the decoder on the state, which it finds where the last stage left it."""
        self._written.require(STATE, rows)
        engine, state = self._engines[program], self._states[0]
        binding = engine.new_binding()
        binding.bind_input(STATE, self._device, self._index, state.dtype.type, list(state.shape), state.address)
        for output in (PIXELS, SQUARES):
            binding.bind_output(output, "cpu")
        engine.run_bound(binding)
        for name, value in zip((PIXELS, SQUARES), binding.get_outputs(), strict=True):
            self._given[name] = value.numpy().copy()
            self._written.note(name, rows, self.shape.pictures)
