"""Drawing with ONNX Runtime where its memory is: the fused denoise stage on bound buffers, the state never copied."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np

from latentrt.engines.bundle.manifest import LatentSpec
from latentrt.engines.errors import EngineError
from latentrt.engines.onnxruntime.session import OnnxRuntimeEngine, require
from latentrt.engines.spec import Array, EngineSpec, TensorSpec
from latentrt.engines.tensor_names import (
    DECODER,
    HINT,
    NEXT,
    PIXELS,
    PREFIX,
    PREVIOUS,
    SCALE,
    SQUARES,
    UNET,
    hint_of,
    is_residual,
    level_axes,
)
from latentrt.engines.workspace.contract import ImmediateWorkspace, StageInput, WorkspaceShape, no_decoder

# Inputs of the fused stage that every stage sets, and those that mean nothing until they are written.
PER_STAGE = ("control", "noise", "guidance", "picture_of_row")
RECORDINGS = itertools.count(1)  # of one session, which serves many workspaces; 0 is ONNX Runtime's default
NEUTRAL = {"keep_mask": 1.0, "known": 0.0}
NOBODY = "nobody"


class OnnxRuntimeWorkspace(ImmediateWorkspace):
    """A workspace whose buffers lie on an ONNX Runtime device. It implements `Workspace`.

    The state lives in two buffers that take turns as the stage's input and output. A run of ONNX Runtime ends when
    its work is done, so nothing is queued.

    The residuals of ControlNets stay there too: each one's outputs are bound as the next one's inputs, and the last
    one's as the UNet's; where none runs, zeros are.

    engines: text_encoder, the fused denoisers and ControlNets, and the decoders that take the state
    device: `cuda` or `cpu`, ONNX Runtime's own name
    denoiser: the network that its stages run
    """

    def __init__(
        self,
        engines: Mapping[str, OnnxRuntimeEngine],
        space: LatentSpec,
        shape: WorkspaceShape,
        *,
        device: str,
        denoiser: str = UNET,
    ) -> None:
        super().__init__()
        self.shape = shape
        self._engines, self._device, self._ort = engines, device, require()
        self._denoiser = denoiser
        self._specs = {spec.name: spec for spec in engines[denoiser].spec.inputs}
        self._hints = {
            hint_of(name): next(spec for spec in engine.spec.inputs if spec.name == HINT)
            for name, engine in engines.items()
            if name.startswith(PREFIX)
        }
        self.state_rows = int(self._specs["state"].shape[1])
        self._size = (space.channels, shape.height // space.factor, shape.width // space.factor)
        self._axes = {
            "pictures": shape.pictures,
            "tokens": shape.tokens,
            "latent_height": self._size[1],
            "latent_width": self._size[2],
            "height": shape.height,
            "width": shape.width,
            **level_axes(*self._size[1:]),
        }
        self._host: dict[str, Array] = {}  # what was written, for the inputs with an axis of rows
        self._written: set[str] = set()  # since the workspace was blank
        self._values: dict[tuple[str, int], Any] = {}  # (input, rows) -> its buffer; rows is 0 where it has none
        self._states = [self._filled("state", 0.0), self._filled("state", 0.0)]
        # (what runs, rows, which state is read, the last ControlNet before it) -> its binding, its number
        self._bindings: dict[tuple[str, int, int, str], tuple[Any, int]] = {}
        self._decoder: str | None = DECODER
        self._advanced = False  # since the state was written
        self._silent = True  # the noise buffer holds zeros

    def encode(self, inputs: Mapping[str, Array]) -> None:
        """Run the text encoder and keep its output as the stage's text."""
        output = self._engines["text_encoder"](inputs)["last_hidden_state"]
        self.write("encoder_hidden_states", output.reshape(-1, self.shape.tokens, output.shape[-1]))

    def write(self, name: str, array: Array) -> None:
        """Copy one of the stage's inputs to the device. Raises EngineError on a wrong name or shape."""
        spec = self._spec(name)
        array = np.ascontiguousarray(array, dtype=spec.dtype)
        sizes = self._axes | ({"rows": len(array)} if "rows" in spec.shape else {})
        expected = tuple(axis if isinstance(axis, int) else sizes.get(axis) for axis in spec.shape)
        if array.shape != expected:
            raise EngineError(f"{name}: found shape {array.shape}, expected {expected}")
        self._written.add(name)
        if name == "state":
            self._states[0].update_inplace(array)
            self._advanced = False
        elif "rows" in spec.shape:
            self._host[name] = array.copy()
            for known, rows in list(self._values):
                if known == name and rows <= len(array):
                    self._values[name, rows].update_inplace(np.ascontiguousarray(array[:rows]))
        else:
            self._put(name, 0, array)

    def wipe(self, *, decoder: str | None = DECODER) -> None:
        """Make the workspace blank for another batch: nothing is kept of the last one but the buffers themselves.

        decoder: what `decode` runs from now on, None for nothing. Raises EngineError where it was not opened.
        """
        if decoder is not None and decoder not in self._engines:
            raise no_decoder(decoder, self._engines)
        self._decoder, self._advanced = decoder, False
        for name in self._written & set(NEUTRAL):
            spec = self._specs[name]
            shape = tuple(axis if isinstance(axis, int) else self._axes[axis] for axis in spec.shape)
            self._put(name, 0, np.full(shape, NEUTRAL[name], dtype=spec.dtype))
        self._written.clear()
        self._marks.clear()
        self._pixels = self._squares = None

    def _spec(self, name: str) -> TensorSpec:
        try:
            return self._hints.get(name) or self._specs[name]
        except KeyError:
            raise EngineError(f"the denoise stage takes no '{name}'; it takes {', '.join(self._specs)}") from None

    def _put(self, name: str, rows: int, array: Array) -> None:
        value = self._values.get((name, rows))
        if value is None:
            self._values[name, rows] = self._on_device(array)
        else:
            value.update_inplace(array)

    def _on_device(self, array: Array) -> Any:
        """Return a buffer on the device that holds a copy: on the CPU ONNX Runtime would only refer to the array."""
        value = self._ort.OrtValue.ortvalue_from_shape_and_type(array.shape, array.dtype.type, self._device, 0)
        value.update_inplace(array)
        return value

    def _filled(self, name: str, number: float) -> Any:
        spec = self._specs[name]
        shape = tuple(axis if isinstance(axis, int) else self._axes[axis] for axis in spec.shape)
        return self._on_device(np.full(shape, number, dtype=spec.dtype))

    def advance(self, stage: StageInput) -> None:
        """Run one denoise stage."""
        rows = len(stage.picture_of_row)
        self._put("control", 0, np.ascontiguousarray(stage.control, dtype=np.float32))
        self._put("guidance", rows, np.ascontiguousarray(stage.guidance, dtype=np.float32))
        self._put("picture_of_row", rows, np.ascontiguousarray(stage.picture_of_row, dtype=np.int64))
        self._put_noise(stage.noise)
        before = NOBODY
        for component, scale in stage.scales.items():
            self._put(f"{component}.{SCALE}", rows, np.ascontiguousarray(scale, dtype=np.float32))
            self._run(component, rows, before)
            before = component
        self._run(self._denoiser, rows, before)
        self._states.reverse()
        self._advanced = True

    def _run(self, component: str, rows: int, before: str) -> None:
        """Run the stage or one of its ControlNets. before: the ControlNet whose residuals it takes"""
        binding, graph = self._binding(component, rows, before)
        self._engines[component].run_bound(binding, graph=graph)

    def _put_noise(self, noise: Array | None) -> None:
        if noise is not None:
            self._put("noise", 0, np.ascontiguousarray(noise, dtype=np.float32))
        elif ("noise", 0) not in self._values:
            self._values["noise", 0] = self._filled("noise", 0.0)
        elif not self._silent:
            self._put("noise", 0, np.zeros((self.shape.pictures, *self._size), dtype=np.float32))
        self._silent = noise is None

    def _binding(self, component: str, rows: int, before: str) -> tuple[Any, int]:
        """Return the inputs and outputs of what runs bound, and a number for the recording of their kernels.

        Made once for each number of rows, turn of the states, and ControlNet before it.
        """
        reads, writes = self._states
        engine = self._engines[component]
        self._check_written(component, engine.spec)
        key = (component, rows, id(reads), before)
        if key not in self._bindings:
            binding = engine.new_binding()
            for spec in engine.spec.inputs:
                binding.bind_ortvalue_input(spec.name, self._bound(component, spec, rows, before))
            for spec in engine.spec.outputs:
                value = writes if spec.name == "next_state" else self._residual(component, spec, rows)
                binding.bind_ortvalue_output(spec.name, value)
            self._bindings[key] = binding, next(RECORDINGS)
        return self._bindings[key]

    def _check_written(self, component: str, spec: EngineSpec) -> None:
        set_here = (*PER_STAGE, *NEUTRAL, SCALE)
        needed = [hint_of(component) if s.name == HINT else s.name for s in spec.inputs if not is_residual(s.name)]
        missing = [name for name in needed if name not in set_here and name not in self._written]
        if missing:
            raise EngineError(f"{missing[0]} was not written to the workspace before it was needed")

    def _bound(self, component: str, spec: TensorSpec, rows: int, before: str) -> Any:
        """Return the buffer that an input is read from."""
        if spec.name == "state":
            return self._states[0]
        if is_residual(spec.name):
            return self._residual(before, spec, rows)
        own = {HINT: hint_of(component), SCALE: f"{component}.{SCALE}"}
        return self._input(own.get(spec.name, spec.name), rows if "rows" in spec.shape else 0)

    def _residual(self, component: str, spec: TensorSpec, rows: int) -> Any:
        """Return the buffer of what a ControlNet adds up to, zeros for nobody's."""
        key = (f"{component}.{spec.name.removeprefix(NEXT)}", rows)
        if key not in self._values:
            shape = [axis if isinstance(axis, int) else {**self._axes, "rows": rows}[axis] for axis in spec.shape]
            self._values[key] = self._on_device(np.zeros(shape, dtype=spec.dtype))
        return self._values[key]

    def _input(self, name: str, rows: int) -> Any:
        if (name, rows) not in self._values:
            if name in NEUTRAL:
                self._values[name, rows] = self._filled(name, NEUTRAL[name])
            elif rows and len(self._host.get(name, ())) >= rows:
                self._values[name, rows] = self._on_device(np.ascontiguousarray(self._host[name][:rows]))
            else:
                raise EngineError(f"{name} was not written to the workspace before it was needed")
        return self._values[name, rows]

    def decode(self) -> None:
        """Run the decoder on the state, which it finds where the last stage left it."""
        if self._decoder is None:
            raise no_decoder(None, self._engines)
        engine = self._engines[self._decoder]
        binding = engine.new_binding()
        binding.bind_ortvalue_input("state", self._states[0])
        for output in (PIXELS, SQUARES):
            binding.bind_output(output, "cpu")
        engine.run_bound(binding)
        self._pixels, self._squares = (value.numpy().copy() for value in binding.get_outputs())

    def read(self, name: str) -> Array:
        """Return a copy of one of the stage's inputs, or of the state before the last stage."""
        if name == PREVIOUS and self._advanced:
            return np.array(self._states[1].numpy())
        self._spec(name)
        if name == "state":
            return np.array(self._states[0].numpy())
        if name in self._host:
            return self._host[name].copy()
        return np.array(self._input(name, 0).numpy())
