"""ControlNets on the device: each adds to the residuals that the stage's UNet then takes, which lie in one block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from latentrt.engines.errors import EngineError
from latentrt.engines.tensor_names import HINT, NEXT, SCALE, hint_of, is_residual
from latentrt.engines.tensorrt.buffers import ROWS, PersistentInput, Stage, WorkspaceContext, lay_out
from latentrt.engines.tensorrt.execution import Copy, Execution, Program
from latentrt.engines.tensorrt.profiles import input_shapes
from latentrt.engines.workspace.contract import own_buffer


class Residuals:
    """What is added to the UNet, in one block: zeros while nothing is followed. A ControlNet writes its sums beside
    it, from where they are copied over it on the device.
    """

    def __init__(self, context: WorkspaceContext, unet: Program, profile: int) -> None:
        tensors = tuple(tensor for tensor in unet.spec.inputs if is_residual(tensor.name))
        self._offsets, self._size = lay_out(tensors, input_shapes(unet.spec, profile))
        self._address, self._sums = (context.allocations.allocate(self._size) for _ in range(2))
        self._queue = context.executor.queue
        self._clean = True  # fresh memory is zero

    @property
    def inputs(self) -> dict[str, int]:
        """Return the address of each residual, as what takes them names them."""
        return {name: self._address + offset for name, offset in self._offsets.items()}

    @property
    def outputs(self) -> dict[str, int]:
        """Return the address of each sum, as a ControlNet names it."""
        return {NEXT + name: self._sums + offset for name, offset in self._offsets.items()}

    @property
    def copies(self) -> Sequence[Copy]:
        """Return the copy that makes the sums the residuals."""
        return [(self._address, self._sums, self._size)]

    def clear(self) -> None:
        """Have zeros."""
        if not self._clean:
            self._queue.device.zero(self._address, self._size, self._queue.stream)
        self._clean = True

    def spoil(self) -> None:
        """Note that something was added."""
        self._clean = False


class ControlNet:
    """One ControlNet on a workspace: what it follows, how strongly, and an execution for each number of model rows."""

    def __init__(
        self,
        context: WorkspaceContext,
        program: Program,
        persistent_inputs: Mapping[str, PersistentInput],
        residuals: Residuals,
        stages: Mapping[int, Stage],
    ) -> None:
        self._component = program.spec.component
        profiles = context.profiles(program.spec, free=ROWS)
        if missing := set(stages) - set(profiles):
            raise EngineError(f"{self._component} is not compiled for {sorted(missing)} model rows, as the UNet is")
        shapes = input_shapes(program.spec, profiles[max(profiles)])
        tensors = {tensor.name: tensor for tensor in program.spec.inputs}
        self.hint, self.scale = (PersistentInput(context, tensors[name], shapes[name]) for name in (HINT, SCALE))
        self.needs = {
            hint_of(self._component),
            own_buffer(self._component, SCALE),
            *(tensors.keys() & persistent_inputs.keys()),
        }
        addresses = {name: persistent.address for name, persistent in persistent_inputs.items()}
        addresses |= {HINT: self.hint.address, SCALE: self.scale.address, **residuals.inputs, **residuals.outputs}
        self.executions = {rows: Execution(context.executor, program, profiles[rows]) for rows in stages}
        for rows, run in self.executions.items():
            run.bind(addresses | stages[rows].addresses, after=residuals.copies)


class Controls:
    """The ControlNets of a workspace, by component. There may be none, for a UNet that takes residuals all the same."""

    def __init__(self, networks: Mapping[str, ControlNet], residuals: Residuals | None) -> None:
        self.networks, self._residuals = networks, residuals
        self.persistent_inputs = {hint_of(component): network.hint for component, network in networks.items()}
        self.persistent_inputs |= {
            own_buffer(component, SCALE): network.scale for component, network in networks.items()
        }
        self.executions = [run for network in networks.values() for run in network.executions.values()]
        self._added = False  # by a ControlNet since the last stage

    def run(self, component: str, rows: int) -> None:
        """Put one ControlNet in the queue, behind what the stage takes and before it. Raises EngineError."""
        assert self._residuals is not None
        self.wait_idle()
        self.networks[component].executions[rows].run()
        self._added = True
        self._residuals.spoil()

    def wait_idle(self) -> None:
        """Have no residuals but those of the ControlNets since the last stage."""
        if self._residuals is not None and not self._added:
            self._residuals.clear()

    def used_up(self) -> None:
        """Note that a stage took the residuals."""
        self._added = False

    def reset(self) -> None:
        """Forget what was added."""
        self._added = False
        if self._residuals is not None:
            self._residuals.spoil()
