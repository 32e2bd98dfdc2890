"""ControlNets on the device: each adds to the residuals that the stage's UNet then takes, which lie in one block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from latentrt.engines.errors import EngineError
from latentrt.engines.tensor_names import HINT, NEXT, SCALE, hint_of, is_residual
from latentrt.engines.tensorrt.buffers import ROWS, Bench, Resident, Stage, lay_out
from latentrt.engines.tensorrt.execution import Copy, Pass, Program
from latentrt.engines.tensorrt.profiles import input_shapes
from latentrt.engines.workspace.contract import own_buffer


class Residuals:
    """What is added to the UNet, in one block: zeros while nothing is followed. A ControlNet writes its sums beside
    it, from where they are copied over it on the device.
    """

    def __init__(self, bench: Bench, unet: Program, profile: int) -> None:
        tensors = tuple(tensor for tensor in unet.spec.inputs if is_residual(tensor.name))
        self._offsets, self._size = lay_out(tensors, input_shapes(unet.spec, profile))
        self._address, self._sums = (bench.holding.allocate(self._size) for _ in range(2))
        self._queue = bench.place.queue
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
    """One ControlNet on a workspace: what it follows, how strongly, and a pass for each number of model rows."""

    def __init__(
        self,
        bench: Bench,
        program: Program,
        residents: Mapping[str, Resident],
        residuals: Residuals,
        stages: Mapping[int, Stage],
    ) -> None:
        self._component = program.spec.component
        profiles = bench.profiles(program.spec, free=ROWS)
        if missing := set(stages) - set(profiles):
            raise EngineError(f"{self._component} is not compiled for {sorted(missing)} model rows, as the UNet is")
        shapes = input_shapes(program.spec, profiles[max(profiles)])
        tensors = {tensor.name: tensor for tensor in program.spec.inputs}
        self.hint, self.scale = (Resident(bench, tensors[name], shapes[name]) for name in (HINT, SCALE))
        self.needs = {
            hint_of(self._component),
            own_buffer(self._component, SCALE),
            *(tensors.keys() & residents.keys()),
        }
        addresses = {name: resident.address for name, resident in residents.items()}
        addresses |= {HINT: self.hint.address, SCALE: self.scale.address, **residuals.inputs, **residuals.outputs}
        self.passes = {rows: Pass(bench.place, program, profiles[rows]) for rows in stages}
        for rows, run in self.passes.items():
            run.bind(addresses | stages[rows].addresses, after=residuals.copies)


class Controls:
    """The ControlNets of a workspace, by component. There may be none, for a UNet that takes residuals all the same."""

    def __init__(self, networks: Mapping[str, ControlNet], residuals: Residuals | None) -> None:
        self.networks, self._residuals = networks, residuals
        self.residents = {hint_of(component): network.hint for component, network in networks.items()}
        self.residents |= {own_buffer(component, SCALE): network.scale for component, network in networks.items()}
        self.passes = [run for network in networks.values() for run in network.passes.values()]
        self._added = False  # by a ControlNet since the last stage

    def run(self, component: str, rows: int) -> None:
        """Put one ControlNet in the queue, behind what the stage takes and before it. Raises EngineError."""
        assert self._residuals is not None
        self.settle()
        self.networks[component].passes[rows].run()
        self._added = True
        self._residuals.spoil()

    def settle(self) -> None:
        """Have no residuals but those of the ControlNets since the last stage."""
        if self._residuals is not None and not self._added:
            self._residuals.clear()

    def used_up(self) -> None:
        """Note that a stage took the residuals."""
        self._added = False

    def wipe(self) -> None:
        """Forget what was added."""
        self._added = False
        if self._residuals is not None:
            self._residuals.spoil()
