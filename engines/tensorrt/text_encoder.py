"""The text encoder on the device: any number of texts, by runs of the numbers that it was compiled for."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from latentrt.engines.cuda.stream import StagingRing
from latentrt.engines.errors import EngineError
from latentrt.engines.spec import Array, EngineSpec
from latentrt.engines.tensorrt.buffers import Block, DeviceBuffer, WorkspaceContext
from latentrt.engines.tensorrt.execution import Execution, Program
from latentrt.engines.tensorrt.profiles import input_shapes
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

    def __init__(self, context: WorkspaceContext, program: Program, text: DeviceBuffer) -> None:
        self._queue, self._text = context.executor.queue, text
        self._batch_axis = {tensor.name: tensor.shape[0] for tensor in program.spec.inputs}
        found = context.profiles(program.spec, free=str(self._batch_axis[IDS]))
        _, self._length = input_shapes(program.spec, next(iter(found.values())))[IDS]
        self._size = text.row_size * self._length // text.shape[1]  # of one text's encoding
        most = text.shape[0] * text.shape[1] // self._length
        slots = -(-most // min(found))
        batches = sorted(batch for batch in found if batch <= most) or [min(found)]  # or one that is filled up
        self._runs = {batch: _Run(context, program, found[batch], slots=slots) for batch in batches}

    @property
    def executions(self) -> list[Execution]:
        """Return its executions, for what warms up and closes them."""
        return [run.run for run in self._runs.values()]

    def put(self, inputs: Mapping[str, Array], rows: slice) -> slice:
        """Put the encoding of texts for some rows in the queue; return which.

        Raises EngineError on other shapes, or too many texts.
        """
        texts, first = len(inputs[IDS]), rows.start or 0
        count, rest = divmod(texts * self._length, self._text.shape[1])
        asked = count if rows.stop is None else rows.stop - first
        if rest or count < 1 or count != asked or first + count > self._text.shape[0]:
            raise EngineError(
                f"the text encoder: found {texts} texts of {self._length} tokens, expected {asked} rows of "
                f"{self._text.shape[1]} tokens, at most {self._text.shape[0]}"
            )
        for batch, start, taken in split_texts(texts, self._runs):
            output = self._runs[batch].put({name: self._part(name, inputs[name], batch, start) for name in inputs})
            target = self._text.address + first * self._text.row_size + start * self._size
            self._queue.device.copy(target, output, taken * self._size, self._queue.stream)
        return slice(first, first + count)

    def _part(self, name: str, array: Array, batch: int, start: int) -> Array:
        """Return the texts of one run, the last one again where there are too few."""
        if self._batch_axis[name] != self._batch_axis[IDS]:
            return array
        part = array[start : start + batch]
        return np.concatenate([part, np.repeat(part[-1:], batch - len(part), axis=0)])


class _Run:
    """A text encoder for one number of texts."""

    def __init__(self, context: WorkspaceContext, program: Program, profile: int, *, slots: int) -> None:
        self.run = Execution(context.executor, program, profile)
        self._inputs = Block(context.allocations, program.spec.inputs, self.run.inputs)
        outputs = Block(context.allocations, program.spec.outputs, self.run.outputs)
        self._output = outputs.addresses[STATES]
        self._staging = StagingRing(context.executor.queue, context.allocations, self._inputs.size, slots=slots)
        self.run.bind(self._inputs.addresses | outputs.addresses)

    def put(self, inputs: Mapping[str, Array]) -> int:
        """Put one run in the queue; return where what it gives will be."""
        self._inputs.send(inputs, self._staging)
        self.run.run()
        return self._output


def fills(spec: EngineSpec, text: DeviceBuffer) -> bool:
    """Tell whether what a text encoder gives is what the stage takes, as it is.

    It is not where the stage takes what several encoders give: side by side, as SDXL's does, or one after another, as
    that of SD 3, whose T5 reads rows that the text is no multiple of.
    """
    outputs = {tensor.name: tensor for tensor in spec.outputs}
    states, lengths = outputs.get(STATES), [tensor.shape[1] for tensor in spec.inputs if tensor.name == IDS]
    return (
        states is not None
        and states.dtype == text.dtype
        and states.shape[-1] == text.shape[-1]
        and all(isinstance(length, int) and text.shape[1] % length == 0 for length in lengths)
        and bool(lengths)
    )
