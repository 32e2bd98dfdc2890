"""Memory of a device in pieces: blocks of tensors, buffers that stay, and what a stage takes and a decoder gives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import msgspec
import numpy as np

from latentrt.engines.cuda.stream import Allocations, StagingRing, align
from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Array, EngineSpec, TensorSpec
from latentrt.engines.tensor_names import FRAMES, PIXELS, SQUARES, level_axes
from latentrt.engines.tensorrt.execution import Execution, Executor, Program
from latentrt.engines.tensorrt.profiles import REBUILD, Origin, Shape, nbytes, profiles_for
from latentrt.engines.workspace.contract import NOISE, PER_STAGE, STATE, WorkspaceShape
from latentrt.engines.workspace.slot_workspace import check_shape

ROWS = "rows"


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
        "frames": shape.frames,
        "tokens": shape.tokens,
        "height": shape.height,
        "width": shape.width,
        "latent_height": shape.height // factor,
        "latent_width": shape.width // factor,
        **level_axes(shape.height // factor, shape.width // factor),
    }


class Block:
    """Tensors one behind another in one piece of device memory, so that one copy brings them in or out."""

    def __init__(self, allocations: Allocations, tensors: Iterable[TensorSpec], shapes: Mapping[str, Shape]) -> None:
        self._tensors = {tensor.name: tensor for tensor in tensors}
        self.shapes = {name: shapes[name] for name in self._tensors}
        self.offsets: dict[str, int] = {}
        self.size = 0
        for name, tensor in self._tensors.items():
            self.offsets[name] = self.size
            self.size += align(nbytes(tensor, self.shapes[name]))
        self.address = allocations.allocate(self.size)

    @property
    def addresses(self) -> dict[str, int]:
        """Return where each tensor lies."""
        return {name: self.address + offset for name, offset in self.offsets.items()}

    def send(self, given: Mapping[str, Array], staging: StagingRing) -> None:
        """Put one copy in the queue: of all tensors, or of the first ones. Raises EngineError on another shape."""
        pieces = []
        for name in (name for name in self._tensors if name in given):
            check_shape(name, given[name], self.shapes[name])
            pieces.append((self.offsets[name], np.ascontiguousarray(given[name], dtype=self._tensors[name].dtype)))
        staging.send(self.address, pieces)

    def views(self, host: Array) -> dict[str, Array]:
        """Return the tensors in a copy of the block on the host: (size,), uint8."""
        return {
            name: host[self.offsets[name] :][: nbytes(tensor, self.shapes[name])]
            .view(tensor.dtype)
            .reshape(self.shapes[name])
            for name, tensor in self._tensors.items()
        }


class DeviceBuffer:
    """A buffer that stays on the device, with room for the largest number of model rows. It implements `Buffer`."""

    def __init__(self, context: WorkspaceContext, tensor: TensorSpec, shape: Shape) -> None:
        if ROWS in tensor.shape[1:]:
            raise EngineError(f"{tensor} has its model rows on another axis than the first; {REBUILD}")
        self.shape, self.dtype = shape, np.dtype(tensor.dtype)
        self.size = nbytes(tensor, shape)
        self.address = context.allocations.allocate(self.size)
        self._staging = StagingRing(context.executor.queue, context.allocations, self.size)

    @property
    def row_size(self) -> int:
        """Return the bytes of a row."""
        return self.size // self.shape[0]

    def write(self, values: Array, rows: slice) -> None:
        """Put a copy of rows in the queue."""
        self._staging.send(self.address + rows.start * self.row_size, [(0, values)])


class Stage:
    """The denoise stage for one number of model rows: what changes from stage to stage lies in one block.

    buffers: what stays, by input; addresses: of the other inputs. The state is copied to `previous` first, where it is
    read, and written where it was.
    """

    def __init__(
        self,
        context: WorkspaceContext,
        program: Program,
        profile: int,
        buffers: Mapping[str, DeviceBuffer],
        previous: int,
        addresses: Mapping[str, int],
    ) -> None:
        self._queue = context.executor.queue
        self.run = Execution(context.executor, program, profile)
        tensors = {tensor.name: tensor for tensor in program.spec.inputs}
        self.block = Block(context.allocations, (tensors[name] for name in PER_STAGE), self.run.inputs)
        self._quiet = True  # fresh memory is zero
        state = buffers[STATE]
        bound = {name: buffer.address for name, buffer in buffers.items()} | self.block.addresses | dict(addresses)
        bound |= {STATE: previous, NEXT_STATE: state.address}
        self.run.bind(bound, before=[(previous, state.address, state.size)])

    def send(self, given: Mapping[str, Array], staging: StagingRing) -> None:
        """Put one copy of what a stage takes in the queue; the run itself comes behind it."""
        self.block.send({name: given[name] for name in PER_STAGE if name in given}, staging)
        silent = NOISE not in given
        if silent and not self._quiet:  # noise of an earlier stage has no weight, unless it is not finite
            offset = self.block.offsets[NOISE]
            self._queue.device.zero(self.block.address + offset, self.block.size - offset, self._queue.stream)
        self._quiet = silent


NEXT_STATE = "next_state"


class Decoded:
    """What a decoder gives, on the device in one block, so that one copy brings it to the host."""

    def __init__(self, allocations: Allocations, shape: WorkspaceShape) -> None:
        pixels = TensorSpec(name=PIXELS, dtype="uint8", shape=(shape.pictures, shape.height, shape.width, 3))
        squares = TensorSpec(name=SQUARES, dtype="float32", shape=(shape.pictures, 2))
        shapes: dict[str, Any] = {tensor.name: tensor.shape for tensor in (pixels, squares)}
        self.block = Block(allocations, (pixels, squares), shapes)
        self.host = allocations.pinned(self.block.size)
        self.arrays = self.block.views(self.host)  # as the last copy left them, not to be kept

    def run_of(self, context: WorkspaceContext, program: Program, buffers: Mapping[str, DeviceBuffer]) -> Execution:
        """Return a decoder's execution, from the state to this. Raises EngineError where it is no such decoder."""
        run = Execution(context.executor, program, next(iter(context.profiles(program.spec).values())))
        state = buffers[STATE]
        taken = {name: buffers[name] for name in (STATE, FRAMES) if name in run.inputs and name in buffers}
        if run.inputs != {name: buffer.shape for name, buffer in taken.items()} or run.outputs != self.block.shapes:
            given = ", ".join(f"{name} {shape}" for name, shape in self.block.shapes.items())
            raise EngineError(
                f"{program.spec.component} takes {run.inputs} and gives {run.outputs}, expected {STATE} {state.shape} "
                f"and {given}; {REBUILD}"
            )
        run.bind({**{name: buffer.address for name, buffer in taken.items()}, **self.block.addresses})
        return run
