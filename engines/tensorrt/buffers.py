"""What a workspace on the device consists of: inputs that stay there, and executions that are bound to them."""

from __future__ import annotations

import math
from collections.abc import Mapping

import msgspec
import numpy as np

from latentrt.engines.cuda.stream import Allocations, StagingRing, align
from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Array, EngineSpec, TensorSpec
from latentrt.engines.tensor_names import PIXELS, SQUARES, is_residual, level_axes
from latentrt.engines.tensorrt.execution import Execution, Executor, Program
from latentrt.engines.tensorrt.profiles import REBUILD, Origin, Shape, input_shapes, nbytes, profiles_for
from latentrt.engines.workspace.contract import GUIDANCE, NOISE, OWNERS, PER_STAGE, STATE, WorkspaceShape, span

NEXT_STATE, ROWS = "next_state", "rows"


class WorkspaceContext(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """Where the parts of one workspace are made: where they run, what holds their memory, and the sizes of axes."""

    executor: Executor
    allocations: Allocations
    axes: Mapping[str, int]
    origin: Origin

    def profiles(self, spec: EngineSpec, *, free: str = "") -> dict[int, int]:
        """Return {size of the free axis: profile} of those that fit. Raises EngineError where there is none."""
        found = profiles_for(spec, self.axes, free=free)
        if not found:
            named = {name for sizes in spec.profiles for name in sizes} - {free}
            raise self.origin.refuse(spec, {name: self.axes[name] for name in self.axes if name in named})
        return found


def workspace_axes(shape: WorkspaceShape, factor: int) -> dict[str, int]:
    """Return the size of each axis that an engine's graph may name, but for the model rows."""
    return {
        "pictures": shape.pictures,
        "batch": shape.pictures,
        "tokens": shape.tokens,
        "height": shape.height,
        "width": shape.width,
        "latent_height": shape.height // factor,
        "latent_width": shape.width // factor,
        **level_axes(shape.height // factor, shape.width // factor),
    }


def view(array: Array, tensor: TensorSpec, shape: Shape) -> Array:
    """Return an array as contiguous values of the tensor's type. Raises EngineError where its shape is another."""
    if np.shape(array) != shape:
        raise EngineError(f"{tensor.name}: found shape {np.shape(array)}, expected {shape}")
    return np.ascontiguousarray(array, dtype=tensor.dtype)


class PersistentInput:
    """A buffer that stays on the device, with room for the largest number of model rows."""

    def __init__(self, context: WorkspaceContext, tensor: TensorSpec, shape: Shape) -> None:
        if ROWS in tensor.shape[1:]:
            raise EngineError(f"{tensor} has its model rows on another axis than the first; {REBUILD}")
        self.tensor, self.shape = tensor, shape
        self.by_rows = tensor.shape[0] == ROWS
        self.size = nbytes(tensor, shape)
        self.address = context.allocations.allocate(self.size)
        self._staging = StagingRing(context.executor.queue, context.allocations, self.size)

    @property
    def row_size(self) -> int:
        """Return the bytes of a row."""
        return self.size // self.shape[0]

    def write(self, array: Array, rows: slice, *, name: str = "") -> slice:
        """Set rows, to a number or to values for each; return which. Raises EngineError on another shape."""
        name = name or self.tensor.name
        rows = span(name, array, rows, self.shape[0])
        shape = (rows.stop - rows.start, *self.shape[1:])
        if array.ndim and array.shape != shape:
            raise EngineError(f"{name}: found shape {array.shape}, expected {shape}")
        values = np.ascontiguousarray(np.broadcast_to(array, shape), dtype=self.tensor.dtype)
        self._staging.send(self.address + rows.start * self.row_size, [(0, values)])
        return rows


class Stage:
    """The denoise stage for one number of model rows: what changes from stage to stage lies in one block."""

    def __init__(
        self,
        context: WorkspaceContext,
        program: Program,
        profile: int,
        persistent_inputs: Mapping[str, PersistentInput],
    ) -> None:
        self._queue = context.executor.queue
        self._run = Execution(context.executor, program, profile)
        self._persistent_inputs = persistent_inputs
        tensors = {tensor.name: tensor for tensor in program.spec.inputs}
        self._tensors = tuple(tensors[name] for name in PER_STAGE)
        self._offsets, self.block_size = lay_out(self._tensors, self._run.inputs)
        self._address = context.allocations.allocate(self.block_size)
        self._quiet = True  # fresh memory is zero
        self._pictures = self._run.inputs[GUIDANCE][0]

    @property
    def run(self) -> Execution:
        """Return the execution, for what binds and closes it."""
        return self._run

    @property
    def addresses(self) -> dict[str, int]:
        """Return where what changes from stage to stage lies."""
        return {name: self._address + offset for name, offset in self._offsets.items()}

    def bind(self, previous: int, residuals: Mapping[str, int]) -> None:
        """Set the addresses. The state is copied to `previous` first, where it is read, and written where it was."""
        state = self._persistent_inputs[STATE]
        addresses = {name: persistent.address for name, persistent in self._persistent_inputs.items()} | self.addresses
        addresses |= {STATE: previous, NEXT_STATE: state.address, **residuals}
        self._run.bind(addresses, before=[(previous, state.address, state.size)])

    def send(self, given: Mapping[str, Array], staging: StagingRing) -> None:
        """Put one copy of what a stage takes in the queue; the run itself comes behind it."""
        arrays = {
            tensor.name: view(given[tensor.name], tensor, self._run.inputs[tensor.name])
            for tensor in self._tensors
            if tensor.name in given
        }
        owners = arrays[OWNERS]
        if owners.min() < 0 or owners.max() >= self._pictures:  # the device would read past the end
            raise EngineError(f"{OWNERS}: found {owners.tolist()}, expected pictures below {self._pictures}")
        staging.send(self._address, [(self._offsets[name], array) for name, array in arrays.items()])
        self._silence(silent=NOISE not in arrays)

    def _silence(self, *, silent: bool) -> None:
        """Clear the noise of an earlier stage: it has no weight, unless it is not finite."""
        if silent and not self._quiet:
            size = self.block_size - self._offsets[NOISE]
            self._queue.device.zero(self._address + self._offsets[NOISE], size, self._queue.stream)
        self._quiet = silent


def lay_out(tensors: tuple[TensorSpec, ...], shapes: Mapping[str, Shape]) -> tuple[dict[str, int], int]:
    """Lay tensors one after another: {name: offset in bytes}, and the bytes of all."""
    offsets, end = {}, 0
    for tensor in tensors:
        offsets[tensor.name] = end
        end += align(nbytes(tensor, shapes[tensor.name]))
    return offsets, end


def make_persistent_inputs(context: WorkspaceContext, program: Program, profile: int) -> dict[str, PersistentInput]:
    """Make the inputs that stay, with the shapes of the profile with the most model rows."""
    names = {tensor.name for tensor in program.spec.inputs}
    if not {STATE, *PER_STAGE} <= names or {tensor.name for tensor in program.spec.outputs} != {NEXT_STATE}:
        raise EngineError(f"{program.spec.component} is no fused denoise stage: it takes {', '.join(names)}; {REBUILD}")
    shapes = input_shapes(program.spec, profile)
    stay = [tensor for tensor in program.spec.inputs if tensor.name not in PER_STAGE and not is_residual(tensor.name)]
    return {tensor.name: PersistentInput(context, tensor, shapes[tensor.name]) for tensor in stay}


class Decoded:
    """What a decoder gives, on the device in one block, so that one copy brings it to the host."""

    def __init__(self, allocations: Allocations, shape: WorkspaceShape) -> None:
        self.shapes: dict[str, Shape] = {
            PIXELS: (shape.pictures, shape.height, shape.width, 3),
            SQUARES: (shape.pictures, 2),
        }
        self._squares = align(math.prod(self.shapes[PIXELS]))
        size = self._squares + math.prod(self.shapes[SQUARES]) * np.dtype(np.float32).itemsize
        self.address, self.host = allocations.allocate(size), allocations.pinned(size)

    @property
    def addresses(self) -> dict[str, int]:
        """Return where on the device each lies."""
        return {PIXELS: self.address, SQUARES: self.address + self._squares}

    def pixels(self) -> Array:
        """Return the pixels as the last copy left them on the host, not to be kept."""
        shape = self.shapes[PIXELS]
        return self.host[: math.prod(shape)].reshape(shape)

    def squares(self) -> Array:
        """Return the sums of squares beside them, not to be kept."""
        return self.host[self._squares :].view(np.float32).reshape(self.shapes[SQUARES])


def make_decoder(context: WorkspaceContext, program: Program, state: PersistentInput, decoded: Decoded) -> Execution:
    """Make the VAE's execution: from the state to the pixels, (P, height, width, 3) uint8, and the sums of squares."""
    run = Execution(context.executor, program, next(iter(context.profiles(program.spec).values())))
    if run.inputs != {STATE: state.shape} or run.outputs != decoded.shapes:
        given = ", ".join(f"{name} {shape}" for name, shape in decoded.shapes.items())
        raise EngineError(
            f"{program.spec.component} takes {run.inputs} and gives {run.outputs}, expected {STATE} {state.shape} "
            f"and {given}; {REBUILD}"
        )
    run.bind({STATE: state.address, **decoded.addresses})
    return run
