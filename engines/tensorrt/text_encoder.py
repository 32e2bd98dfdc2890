"""The text encoder on the device: any number of texts, by runs of the numbers that it was compiled for."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from latentrt.engines.cuda.stream import Outbox
from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Array, EngineSpec, TensorSpec
from latentrt.engines.tensorrt.buffers import Bench, Resident, view
from latentrt.engines.tensorrt.execution import Pass, Program
from latentrt.engines.tensorrt.profiles import input_shapes, nbytes

IDS, STATES = "input_ids", "last_hidden_state"
Part = tuple[int, int, int]
"""One run: the number of texts it is compiled for, the first text that it takes, and how many."""


def split_texts(texts: int, compiled: Collection[int]) -> list[Part]:
    """Return the runs that encode a number of texts: as few as there can be with the largest, the last one padded."""
    parts, start = [], 0
    while start < texts:
        left = texts - start
        batch = min((size for size in compiled if size >= left), default=max(compiled))
        parts.append((batch, start, min(batch, left)))
        start += batch
    return parts


class TextEncoder:
    """The text encoder's passes, bound to where the stage reads the text.

    Every run leaves what it gives at the beginning of the stage's input. So the runs of later texts come first, and
    what they gave is copied to its place; one run, the usual case, copies nothing.
    """

    def __init__(self, bench: Bench, program: Program, resident: Resident) -> None:
        self._queue, self._spec, self._resident = bench.place.queue, program.spec, resident
        self._origin = bench.origin
        self._batch_axis = str(_tensor(program.spec, IDS).shape[0])
        found = bench.profiles(program.spec, free=self._batch_axis)
        _, self._length = input_shapes(program.spec, next(iter(found.values())))[IDS]
        self._most = resident.shape[0] * resident.shape[1] // self._length
        self._runs = {
            batch: _Run(bench, program, profile, resident, slots=-(-self._most // batch))
            for batch, profile in sorted(found.items())
            if batch <= self._most  # more would write past the end of the stage's input
        }

    @property
    def passes(self) -> list[Pass]:
        """Return its passes, for what warms up and closes them."""
        return [run.run for run in self._runs.values()]

    def put(self, inputs: Mapping[str, Array]) -> None:
        """Put the encoding of a batch in the queue. Raises EngineError on other names or shapes, or too many texts."""
        names = [tensor.name for tensor in self._spec.inputs]
        if set(inputs) != set(names):
            raise EngineError(f"the text encoder takes {', '.join(names)}, found {', '.join(sorted(inputs))}")
        texts = len(inputs[IDS])
        rows, rest = divmod(texts * self._length, self._resident.shape[1])
        if rest or not 0 < texts <= self._most:
            raise EngineError(
                f"the text encoder: found {texts} texts of {self._length} tokens, expected rows of "
                f"{self._resident.shape[1]} tokens, at most {self._resident.shape[0]}"
            )
        if not self._runs:
            raise self._origin.refuse(self._spec, {self._batch_axis: texts})
        for batch, start, count in reversed(split_texts(texts, self._runs)):
            self._runs[batch].put({name: self._part(name, inputs[name], batch, start) for name in names})
            self._move(start, count)
        self._resident.held, self._resident.written = rows, True

    def _part(self, name: str, array: Array, batch: int, start: int) -> Array:
        """Return the texts of one run, the last one again where there are too few."""
        if _tensor(self._spec, name).shape[0] != self._batch_axis:
            return array
        part = array[start : start + batch]
        return np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])

    def _move(self, start: int, count: int) -> None:
        if start:
            size = self._length * self._resident.size // (self._resident.shape[0] * self._resident.shape[1])
            address = self._resident.address
            self._queue.device.copy(address + start * size, address, count * size, self._queue.stream)


class _Run:
    """The text encoder for one number of texts."""

    def __init__(self, bench: Bench, program: Program, profile: int, resident: Resident, *, slots: int) -> None:
        self.run = Pass(bench.place, program, profile)
        self._tensors = program.spec.inputs
        allocate, queue = bench.holding.allocate, bench.place.queue
        sizes = {tensor.name: nbytes(tensor, self.run.inputs[tensor.name]) for tensor in self._tensors}
        self._addresses = {name: allocate(size) for name, size in sizes.items()}
        self._outboxes = {name: Outbox(queue, bench.holding, size, slots=slots) for name, size in sizes.items()}
        # What else it gives, such as CLIP's pooled output, is of no use here.
        outputs = {t.name: nbytes(t, self.run.outputs[t.name]) for t in program.spec.outputs if t.name != STATES}
        self.run.bind(
            self._addresses | {STATES: resident.address} | {name: allocate(size) for name, size in outputs.items()}
        )

    def put(self, inputs: Mapping[str, Array]) -> None:
        arrays = {t.name: view(inputs[t.name], t, self.run.inputs[t.name]) for t in self._tensors}
        for name, array in arrays.items():
            self._outboxes[name].send(self._addresses[name], [(0, array)])
        self.run.run()


def fills(spec: EngineSpec, resident: Resident) -> bool:
    """Tell whether what a text encoder gives is what the stage takes, as it is.

    It is not where the stage takes what several encoders give side by side, as SDXL's does.
    """
    outputs = {tensor.name: tensor for tensor in spec.outputs}
    states = outputs.get(STATES)
    return (
        states is not None
        and states.dtype == resident.tensor.dtype
        and states.shape[-1] == resident.shape[-1]
        and any(tensor.name == IDS for tensor in spec.inputs)
    )


def _tensor(spec: EngineSpec, name: str) -> TensorSpec:
    return next(tensor for tensor in spec.inputs if tensor.name == name)
