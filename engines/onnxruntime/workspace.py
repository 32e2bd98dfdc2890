"""Drawing with ONNX Runtime where its memory is: the fused denoise stage on bound buffers, the state never copied."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.errors import EngineError
from latentrt.engines.onnxruntime.library import require
from latentrt.engines.onnxruntime.session import OnnxRuntimeEngine
from latentrt.engines.spec import Array, TensorSpec
from latentrt.engines.tensor_names import FRAMES, HINT, NEXT, PIXELS, PREVIOUS, SCALE, SQUARES, is_residual, level_axes
from latentrt.engines.workspace.contract import ALL, AT_FIRST, PER_STAGE, STATE, WorkspaceShape, buffer_of
from latentrt.engines.workspace.slot_workspace import HostBuffer, Rows, SlotWorkspace, at_once

NOBODY = "nobody"


class BoundBuffer:
    """An array on a device of ONNX Runtime, and what the host wrote to it: on the CPU they are one.

    computed: programs write to it, so that the host does not know what there is
    """

    def __init__(
        self, shape: tuple[int, ...], dtype: str, place: tuple[str, int], *, number: float, computed: bool
    ) -> None:
        self.dtype, self.shape = np.dtype(dtype), shape
        self._value = require().OrtValue.ortvalue_from_shape_and_type(shape, self.dtype.type, *place)
        self._host = np.full(shape, number, dtype=self.dtype)
        self._value.update_inplace(self._host)
        self._one, self._computed = place[0] == "cpu", computed
        if self._one:
            self._host = self._value.numpy()  # the same memory

    @property
    def address(self) -> int:
        """Return where it lies."""
        return int(self._value.data_ptr())

    def write(self, values: Array, rows: slice) -> None:
        """Set rows, where they are not so already."""
        if self._computed and not self._one:
            self._host = np.array(self._value.numpy())
        elif not self._computed and np.array_equal(self._host[rows], values):
            return
        self._host[rows] = values
        if not self._one:
            self._value.update_inplace(self._host)

    def read(self) -> Array:
        """Return what there is, not to be kept."""
        return np.asarray(self._value.numpy())


class OnnxRuntimeWorkspace(SlotWorkspace[BoundBuffer | HostBuffer]):
    """A workspace whose buffers lie on an ONNX Runtime device. It implements `Workspace`.

    The state lives in two buffers that take turns as the stage's input and output. A run of ONNX Runtime ends when
    its work is done, so nothing is queued.

    The residuals of ControlNets stay there too: each one's outputs are bound as the next one's inputs, and the last
    one's as the UNet's; where none runs, zeros are.

    engines: text encoders, the fused denoisers and ControlNets, and the decoders that take the state
    device, index: `cuda` or `cpu`, ONNX Runtime's own name, and which of the visible GPUs
    denoiser: the network that its stages run
    """

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
        self._specs = {spec.name: spec for spec in engines[denoiser].spec.inputs}
        for name, engine in engines.items():
            own = [spec for spec in engine.spec.inputs if spec.name in (HINT, SCALE)]
            self._specs |= {buffer_of(name, spec.name): spec for spec in own}
        super().__init__(shape, engines, state_rows=int(self._specs[STATE].shape[1]), denoiser=denoiser)
        self._engines, self._place = engines, (device, index)
        height, width = shape.height // space.factor, shape.width // space.factor
        self._axes = {
            "pictures": shape.pictures,
            "rows": self._groups * shape.rows,
            "frames": shape.frames,
            "tokens": shape.tokens,
            "latent_height": height,
            "latent_width": width,
            "height": shape.height,
            "width": shape.width,
            **level_axes(height, width),
        }
        self._bound: dict[tuple[str, int], BoundBuffer] = {}  # by name, and M where there is one for each
        for number, name in enumerate((STATE, PREVIOUS)):
            self._buffers[name] = self._bind_to(STATE, self._specs[STATE], number, computed=True)
        # (what runs, M, the states' turn, the last ControlNet before it) -> its binding, its recording's number
        self._bindings: dict[tuple[str, int, int, str], tuple[Any, int]] = {}
        self._before = NOBODY  # the last ControlNet since the last stage

    def _shape(self, spec: TensorSpec, rows: int) -> tuple[int, ...]:
        axes = {**self._axes, "rows": rows}
        return tuple(axis if isinstance(axis, int) else axes[axis] for axis in spec.shape)

    def _bind_to(self, name: str, spec: TensorSpec, number: int = 0, *, computed: bool = False) -> BoundBuffer:
        """Return a buffer, made when it is first needed. number: of its model rows where there are several, else any"""
        key = (name, number)
        if key not in self._bound:
            shape, first = self._shape(spec, number or self._groups * self.shape.rows), AT_FIRST.get(name, 0.0)
            self._bound[key] = BoundBuffer(shape, spec.dtype, self._place, number=first, computed=computed)
        return self._bound[key]

    def _taken(self, spec: TensorSpec, rows: int) -> BoundBuffer:
        """Return the buffer of what changes from stage to stage."""
        return self._bind_to(spec.name, spec, rows if "rows" in spec.shape else 0)

    def _buffer(self, name: str, values: Array) -> BoundBuffer | HostBuffer:
        if name in self._buffers:
            return self._buffers[name]
        if name in (PIXELS, SQUARES):
            self._buffers[name] = HostBuffer(np.zeros((self.shape.pictures, *values.shape[1:]), values.dtype))
        elif name in self._specs:
            self._buffers[name] = self._bind_to(name, self._specs[name])
        else:
            raise EngineError(f"nothing here takes a '{name}'; there are {', '.join(self._specs)}")
        return self._buffers[name]

    def _fetch(self, name: str) -> tuple[Array, Callable[[], None]]:
        return self._buffers[name].read(), at_once

    def reset(self, *, decoder: str | None = None) -> None:
        """Make the workspace blank, see `SlotWorkspace`."""
        super().reset(decoder=decoder)
        self._before = NOBODY

    def _advance(self, rows: Rows) -> None:
        self._run_bound(self._denoiser, rows)
        self._buffers[STATE], self._buffers[PREVIOUS] = self._buffers[PREVIOUS], self._buffers[STATE]
        self._before = NOBODY

    def _follow(self, program: str, rows: Rows) -> None:
        self._run_bound(program, rows)
        self._before = program

    def _run_bound(self, program: str, rows: Rows) -> None:
        """Run the stage or one of its ControlNets on the residuals of the ControlNet before it."""
        engine = self._engines[program]
        for spec in engine.spec.inputs:
            if spec.name in PER_STAGE:  # noise that is omitted weighs nothing, unless what there was is not finite
                buffer = self._taken(spec, rows.count)
                given = self._given.get(spec.name)
                values = np.zeros(buffer.shape, buffer.dtype) if given is None else given.astype(buffer.dtype)
                buffer.write(values, ALL)
        key = (program, rows.count, id(self._buffers[STATE]), self._before)
        if key not in self._bindings:
            self._bindings[key] = self._bind(engine, rows.count), engine.new_recording()
        binding, graph = self._bindings[key]
        engine.run_bound(binding, graph=graph)

    def _bind(self, engine: OnnxRuntimeEngine, rows: int) -> Any:
        """Return the inputs and outputs of what runs.

        Made once for each number of rows, turn of the states, and ControlNet before it.
        """
        binding, program = engine.new_binding(), engine.spec.component
        for spec in engine.spec.inputs:
            binding.bind_input(spec.name, *self._where(self._input(program, spec, rows), spec, rows))
        for spec in engine.spec.outputs:
            residual = is_residual(spec.name.removeprefix(NEXT))
            buffer = self._residual(program, spec) if residual else self._buffers[PREVIOUS]
            binding.bind_output(spec.name, *self._where(buffer, spec, rows))
        return binding

    def _input(self, program: str, spec: TensorSpec, rows: int) -> Any:
        if is_residual(spec.name):
            return self._residual(self._before, spec)
        if spec.name in PER_STAGE:
            return self._taken(spec, rows)
        return self._buffer(buffer_of(program, spec.name), NO_VALUES)

    def _residual(self, component: str, spec: TensorSpec) -> BoundBuffer:
        """Return the buffer of what ControlNets up to this one add up to, zeros for nobody's."""
        return self._bind_to(f"{component}.{spec.name.removeprefix(NEXT)}", spec, computed=True)

    def _where(self, buffer: Any, spec: TensorSpec, rows: int) -> tuple[str, int, Any, list[int], int]:
        """Return what ONNX Runtime binds a tensor by: device, type, shape, and address of the buffer's first rows."""
        return *self._place, buffer.dtype.type, list(self._shape(spec, rows)), buffer.address

    def _decode(self, program: str, rows: slice) -> None:
        """Run the decoder on the state, which it finds where the last stage left it."""
        engine, state = self._engines[program], self._buffers[STATE]
        binding = engine.new_binding()
        binding.bind_input(STATE, *self._where(state, self._specs[STATE], 0))
        for spec in engine.spec.inputs:
            if spec.name == FRAMES:
                binding.bind_input(FRAMES, *self._where(self._buffer(FRAMES, NO_VALUES), spec, 0))
        for output in (PIXELS, SQUARES):
            binding.bind_output(output, "cpu")
        engine.run_bound(binding)
        pixels, squares = (value.numpy()[rows] for value in binding.get_outputs())
        self._show_decoded(pixels, squares, rows)


NO_VALUES = np.zeros(0)
