"""A compiled engine as a function of host arrays: copied in, run, copied out, with one wait."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from latentrt.engines.cuda.stream import Allocations, StagingRing
from latentrt.engines.errors import ClosedError, EngineError
from latentrt.engines.spec import Array, Closing, Engine, EngineView, Inputs
from latentrt.engines.tensorrt.buffers import Block
from latentrt.engines.tensorrt.execution import Execution, Executor, Program
from latentrt.engines.tensorrt.profiles import Origin, Shape, input_shapes


class TensorRTEngine(Closing):
    """One component for callers with NumPy arrays. The arrays it returns hold until its next call.

    Each profile that was used keeps its context and buffers until `close`. It serves one thread at a time, together
    with what else runs on the same executor.
    """

    def __init__(self, executor: Executor, program: Program, origin: Origin) -> None:
        self.spec = program.spec
        self._executor, self._origin = executor, origin
        self._program: Program | None = program  # None once closed
        self._host_io: dict[int, _HostIO] = {}

    @property
    def closed(self) -> bool:
        """Tell whether it was closed."""
        return self._program is None

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        """Run the engine. Inputs are converted to the spec's dtypes.

        Raises EngineError on wrong names, and on shapes that it is not compiled for, with the command that fixes it.
        """
        if self._program is None:
            raise ClosedError(f"the engine of {self.spec.component} is closed; open the bundle again")
        arrays = self.spec.arrays(inputs)
        profile = self._profile(arrays)
        with self._executor.queue.lock:
            if profile not in self._host_io:
                self._host_io[profile] = _HostIO(self._executor, self._program, profile)
            self._host_io[profile].put(arrays)
        return self._host_io[profile].outputs()

    def _profile(self, arrays: Mapping[str, Array]) -> int:
        asked = {name: array.shape for name, array in arrays.items()}
        for number in range(len(self.spec.profiles)):
            if input_shapes(self.spec, number) == asked:
                return number
        raise self._origin.refuse(self.spec, self._axes(asked))

    def _axes(self, asked: Mapping[str, Shape]) -> dict[str, int]:
        """Return the size that the asked shapes give each named axis."""
        axes: dict[str, int] = {}
        for tensor in self.spec.inputs:
            for axis, size in zip(tensor.shape, asked[tensor.name], strict=True):
                if isinstance(axis, str) and axes.setdefault(axis, size) != size:
                    raise EngineError(
                        f"{self.spec.component}: {tensor.name} has {axis} {size}, another input has {axes[axis]}"
                    )
        return axes

    def close(self) -> None:
        """Free the contexts and buffers. Closing twice is closing once."""
        if self._program is None:
            return
        self._program = None
        self.forget()

    def forget(self) -> None:
        """Free the contexts and buffers; they are made again for the next call."""
        with self._executor.queue.lock:
            while self._host_io:
                self._host_io.popitem()[1].close()


class _HostIO:
    """One profile with its own buffers, on the device and pinned on the host."""

    def __init__(self, executor: Executor, program: Program, profile: int) -> None:
        self._queue, self._allocations = executor.queue, Allocations(executor.queue)
        self._execution: Execution | None = None
        try:
            self._execution = Execution(executor, program, profile)
            self._set_up(self._execution, program)
        except EngineError:
            self.close()
            raise

    def _set_up(self, run: Execution, program: Program) -> None:
        allocations = self._allocations
        self._inputs = Block(allocations, program.spec.inputs, run.inputs)
        self._outputs = Block(allocations, program.spec.outputs, run.outputs)
        self._staging = StagingRing(self._queue, allocations, self._inputs.size)
        self._host = allocations.pinned(self._outputs.size)
        self._done = allocations.event()
        run.bind(self._inputs.addresses | self._outputs.addresses)

    def put(self, arrays: Mapping[str, Array]) -> None:
        """Put a run in the queue, with the copies around it."""
        assert self._execution is not None
        self._inputs.send(arrays, self._staging)
        self._execution.run()
        self._queue.device.copy_out(self._host, self._outputs.address, self._queue.stream)
        self._queue.record(self._done)

    def outputs(self) -> dict[str, Array]:
        """Wait for the last run and return what it gave."""
        self._queue.wait_until(self._done)
        return self._outputs.views(self._host)

    def close(self) -> None:
        self._queue.wait_idle()
        if self._execution is not None:
            self._execution.close()
        self._allocations.close()


BATCH = "batch"


def in_micro_batches(engine: Engine) -> Engine:
    """Return an engine that takes any number of rows, where `engine` is compiled for some numbers of them alone.

    Engines without a batch of independent rows (the fused stage, the decoder from the state) are returned as they
    are, as are those that take any shape.
    """
    return _MicroBatches(engine) if any(BATCH in profile for profile in engine.spec.profiles) else engine


class _MicroBatches(EngineView):
    """Largest micro-batches first; the last one is filled up with copies of the last row, whose outputs are dropped."""

    def __init__(self, engine: Engine) -> None:
        super().__init__(engine)
        self._batches = sorted({profile[BATCH] for profile in engine.spec.profiles}, reverse=True)
        # Not a row each: the text encoder's second table
        self._shared = {tensor.name for tensor in engine.spec.inputs if tensor.shape[0] != BATCH}

    def __call__(self, inputs: Inputs) -> dict[str, Array]:
        """Run the engine as often as it takes. The arrays that are returned hold until the next call."""
        rows = {name: np.asarray(array) for name, array in inputs.items() if name not in self._shared}
        shared = {name: array for name, array in inputs.items() if name in self._shared}
        count = len(next(iter(rows.values())))
        if count in self._batches:
            return self._engine(inputs)
        found: list[dict[str, Array]] = []
        start = 0
        while start < count:
            size = next((batch for batch in self._batches if batch <= count - start), self._batches[-1])
            micro_batch = {name: _take(array, start, size) for name, array in rows.items()}
            found.append({name: array.copy() for name, array in self._engine({**micro_batch, **shared}).items()})
            start += size
        return {name: np.concatenate([part[name] for part in found])[:count] for name in found[0]}


def _take(array: Array, start: int, size: int) -> Array:
    part = array[start : start + size]
    return np.concatenate([part, np.repeat(part[-1:], size - len(part), axis=0)])
