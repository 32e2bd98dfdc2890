"""The text encoder on the device: any number of texts, by runs of the numbers that it was compiled for."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from latentrt.engines.cuda.stream import StagingRing
from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Array, EngineSpec, TensorSpec
from latentrt.engines.tensorrt.buffers import PersistentInput, WorkspaceContext, view
from latentrt.engines.tensorrt.execution import Execution, Program
from latentrt.engines.tensorrt.profiles import input_shapes, nbytes
from latentrt.engines.workspace.contract import IDS

STATES = "last_hidden_state"
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
    """A text encoder's executions, and where what they give is copied from: to the rows of the text that it is for."""

    def __init__(self, context: WorkspaceContext, program: Program, text: PersistentInput) -> None:
        self._queue, self.spec, self._text = context.executor.queue, program.spec, text
        self._origin = context.origin
        self._batch_axis = str(_tensor(program.spec, IDS).shape[0])
        found = context.profiles(program.spec, free=self._batch_axis)
        _, self._length = input_shapes(program.spec, next(iter(found.values())))[IDS]
        self._size = text.row_size * self._length // text.shape[1]  # of one text's encoding
        self._most = text.shape[0] * text.shape[1] // self._length
        slots = -(-self._most // min(found))
        batches = sorted(batch for batch in found if batch <= self._most) or [min(found)]  # or one that is filled up
        self._runs = {batch: _Run(context, program, found[batch], slots=slots) for batch in batches}

    @property
    def executions(self) -> list[Execution]:
        """Return its executions, for what warms up and closes them."""
        return [run.run for run in self._runs.values()]

    def put(self, inputs: Mapping[str, Array], rows: slice) -> slice:
        """Put the encoding of texts for some rows in the queue; return which.

        Raises EngineError on other names or shapes, or too many texts.
        """
        names = [tensor.name for tensor in self.spec.inputs]
        if set(inputs) != set(names):
            raise EngineError(f"the text encoder takes {', '.join(names)}, found {', '.join(sorted(inputs))}")
        texts, first = len(inputs[IDS]), rows.start or 0
        count, rest = divmod(texts * self._length, self._text.shape[1])
        asked = count if rows.stop is None else rows.stop - first
        if rest or count < 1 or count != asked or first + count > self._text.shape[0]:
            raise EngineError(
                f"the text encoder: found {texts} texts of {self._length} tokens, expected {asked} rows of "
                f"{self._text.shape[1]} tokens, at most {self._text.shape[0]}"
            )
        for batch, start, taken in split_texts(texts, self._runs):
            output = self._runs[batch].put({name: self._part(name, inputs[name], batch, start) for name in names})
            target = self._text.address + first * self._text.row_size + start * self._size
            self._queue.device.copy(target, output, taken * self._size, self._queue.stream)
        return slice(first, first + count)

    def _part(self, name: str, array: Array, batch: int, start: int) -> Array:
        """Return the texts of one run, the last one again where there are too few."""
        if _tensor(self.spec, name).shape[0] != self._batch_axis:
            return array
        part = array[start : start + batch]
        return np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])


class _Run:
    """A text encoder for one number of texts."""

    def __init__(self, context: WorkspaceContext, program: Program, profile: int, *, slots: int) -> None:
        self.run = Execution(context.executor, program, profile)
        self._tensors = program.spec.inputs
        allocate, queue = context.allocations.allocate, context.executor.queue
        sizes = {tensor.name: nbytes(tensor, self.run.inputs[tensor.name]) for tensor in self._tensors}
        self._addresses = {name: allocate(size) for name, size in sizes.items()}
        self._stagings = {
            name: StagingRing(queue, context.allocations, size, slots=slots) for name, size in sizes.items()
        }
        outputs = {t.name: allocate(nbytes(t, self.run.outputs[t.name])) for t in program.spec.outputs}
        self._output = outputs[STATES]
        self.run.bind(self._addresses | outputs)

    def put(self, inputs: Mapping[str, Array]) -> int:
        """Put one run in the queue; return where what it gives will be."""
        arrays = {t.name: view(inputs[t.name], t, self.run.inputs[t.name]) for t in self._tensors}
        for name, array in arrays.items():
            self._stagings[name].send(self._addresses[name], [(0, array)])
        self.run.run()
        return self._output


def fills(spec: EngineSpec, persistent: PersistentInput) -> bool:
    """Tell whether what a text encoder gives is what the stage takes, as it is.

    It is not where the stage takes what several encoders give side by side, as SDXL's does.
    """
    outputs = {tensor.name: tensor for tensor in spec.outputs}
    states = outputs.get(STATES)
    return (
        states is not None
        and states.dtype == persistent.tensor.dtype
        and states.shape[-1] == persistent.shape[-1]
        and any(tensor.name == IDS for tensor in spec.inputs)
    )


def _tensor(spec: EngineSpec, name: str) -> TensorSpec:
    return next(tensor for tensor in spec.inputs if tensor.name == name)
