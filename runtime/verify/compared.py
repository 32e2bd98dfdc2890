"""A workspace on which each program runs twice: by a backend, and by the float32 graphs in NumPy.

After each program the two are compared, and the backend goes on from the reference's numbers: errors do not add up, so
that a stage that computes something else is the one that is named.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec
import numpy as np
import numpy.typing as npt

from latentrt.engines.compare import relative_error
from latentrt.engines.spec import Array
from latentrt.engines.tensor_names import PIXELS, SQUARES
from latentrt.engines.workspace.contract import ALL, CONTROL, NOISE, STATE, Event, Workspace, WorkspaceShape
from latentrt.engines.workspace.numpy_workspace import NumpyWorkspace, split_control, transit


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """How far one run of a program was from the reference.

    output: the buffer that was compared
    error: of text and pixels, over the largest expected magnitude; of a state, over that of what the network added
    """

    program: str
    output: str
    error: float


class ComparedWorkspace:
    """A backend's workspace and the reference's. It implements `Workspace`; what is read is the reference's.

    outputs: the buffer to compare after a program; a ControlNet has none, and shows in the stage that uses up its own
    tell: is given each difference
    """

    def __init__(
        self,
        found: Workspace,
        reference: NumpyWorkspace,
        outputs: Mapping[str, str],
        tell: Callable[[Difference], None],
    ) -> None:
        self.shape: WorkspaceShape = found.shape
        self.queued, self.local = found.queued, False
        self._found, self._reference, self._outputs, self._tell = found, reference, outputs, tell
        self._given = dict[str, Array]()  # what controls the next stage, and its noise

    @property
    def state_rows(self) -> int:
        """Return how many rows of state a picture has."""
        return self._found.state_rows

    def fit(self, program: str, rows: int) -> int:
        """Return the least number of model rows that the backend's program can run on."""
        return self._found.fit(program, rows)

    def write(self, name: str, array: npt.ArrayLike, rows: slice = ALL) -> None:
        """Write to both."""
        if name in (CONTROL, NOISE):
            self._given[name] = np.array(array)
        self._found.write(name, array, rows)
        self._reference.write(name, array, rows)

    def read(self, name: str, rows: slice = ALL) -> Array:
        """Return what the reference holds."""
        return self._reference.read(name, rows)

    def event(self) -> Event:
        """Note where the backend's queue is now."""
        return self._found.event()

    def run(self, program: str, rows: slice = ALL) -> None:
        """Run a program on both, compare what it wrote, and let the backend go on from the reference's."""
        output = self._outputs.get(program)
        rest = self._without_network() if output == STATE else None
        self._reference.run(program, rows)
        self._found.run(program, rows)
        if output is None:
            return
        place = ALL if output == STATE else rows
        expected, found = self._reference.read(output, place), self._found.read(output, place)
        error = relative_error(found, expected) if rest is None else error_beside(found, expected, rest)
        if output == PIXELS:
            error = error if np.isfinite(self._found.read(SQUARES, rows)).all() else float("inf")
        else:
            self._found.write(output, expected.astype(found.dtype), place)
        self._tell(Difference(program=program, output=output, error=error))

    def _without_network(self) -> Array:
        """Return what the next state would be if the network gave zeros."""
        state = self._reference.read(STATE)
        control = split_control(self._given[CONTROL], self.state_rows)
        return transit(control.transition, state, np.zeros_like(state[:, 0]), self._given.pop(NOISE, None))


def error_beside(found: Array, expected: Array, rest: Array) -> float:
    """Return the largest difference of a sum over the largest magnitude of its part that is not `rest`."""
    return relative_error(found.astype(np.float64) - rest, expected.astype(np.float64) - rest)
