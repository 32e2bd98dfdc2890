"""ControlNets on the device: each adds to the residuals that the stage's UNet then takes, which lie in one block."""

from __future__ import annotations

from collections.abc import Mapping

from latentrt.engines.errors import EngineError
from latentrt.engines.tensor_names import HINT, NEXT, SCALE, is_residual
from latentrt.engines.tensorrt.buffers import ROWS, Block, DeviceBuffer, Stage, WorkspaceContext
from latentrt.engines.tensorrt.execution import Execution, Program
from latentrt.engines.tensorrt.profiles import input_shapes
from latentrt.engines.workspace.contract import buffer_of


class Residuals:
    """What is added to the UNet, in one block: zeros while nothing is followed. A ControlNet writes its sums beside
    it, from where they are copied over it on the device.
    """

    def __init__(self, context: WorkspaceContext, unet: Program, profile: int) -> None:
        tensors = [tensor for tensor in unet.spec.inputs if is_residual(tensor.name)]
        shapes = input_shapes(unet.spec, profile)
        self.block, sums = (Block(context.allocations, tensors, shapes) for _ in range(2))
        self.outputs = {NEXT + name: address for name, address in sums.addresses.items()}
        self.copies = [(self.block.address, sums.address, sums.size)]  # it makes the sums the residuals
        self._queue = context.executor.queue
        self._clean = True  # fresh memory is zero
        self._added = False  # by a ControlNet since the last stage

    def prepare(self) -> None:
        """Have no residuals but those of the ControlNets since the last stage."""
        if not self._added and not self._clean:
            self._queue.device.zero(self.block.address, self.block.size, self._queue.stream)
            self._clean = True

    def forget(self) -> None:
        """Have zeros at the next stage: what was added belongs to pictures that were given up."""
        self._added = False

    def note(self, *, added: bool) -> None:
        """Note that a ControlNet adds to them, or that they are used up."""
        self._added, self._clean = added, self._clean and not added


def control_runs(
    context: WorkspaceContext,
    program: Program,
    buffers: Mapping[str, DeviceBuffer],
    residuals: Residuals,
    stages: Mapping[int, Stage],
) -> tuple[dict[str, DeviceBuffer], dict[int, Execution]]:
    """Return what one ControlNet follows and how strongly, by buffer, and an execution for each number of model rows.

    Raises EngineError where it is not compiled for one that the UNet is compiled for.
    """
    component, profiles = program.spec.component, context.profiles(program.spec, free=ROWS)
    if missing := set(stages) - set(profiles):
        raise EngineError(f"{component} is not compiled for {sorted(missing)} model rows, as the UNet is")
    shapes = input_shapes(program.spec, profiles[max(profiles)])
    own = {t.name: DeviceBuffer(context, t, shapes[t.name]) for t in program.spec.inputs if t.name in (HINT, SCALE)}
    addresses = {name: buffer.address for name, buffer in {**buffers, **own}.items()}
    addresses |= {**residuals.block.addresses, **residuals.outputs}
    runs = {rows: Execution(context.executor, program, profiles[rows]) for rows in stages}
    for rows, run in runs.items():
        run.bind(addresses | stages[rows].block.addresses, after=residuals.copies)
    return {buffer_of(component, name): buffer for name, buffer in own.items()}, runs
