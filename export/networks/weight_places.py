"""Which weight of a network each initializer of its graph holds, and how: told apart by what stood in for the weights.

A graph is traced with stand-ins, so that it depends on no weight. Small weights, with which the tracer may compute, are
signalling NaNs that count: what moves them keeps their bits, and arithmetic makes quiet ones of them (IEEE 754, 6.2).
Large ones are memory that nobody has written to, known by its addresses.
"""

from __future__ import annotations

import math
from bisect import bisect_right, insort
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import itemgetter

import numpy as np
import onnx_ir as ir

from latentrt.engines.bundle.weight_map import AS_NAMED, TRANSPOSED
from latentrt.engines.spec import Array

SIGNALLING = 0x7F800001  # the first of float32's signalling NaNs
COUNT = 0x7FC00000 - SIGNALLING  # from there on they are quiet


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """The part of a weight that an initializer holds.

    weight: its name
    shape: the initializer's
    offset, strides: in numbers of the weight as it is stored, 0 for an axis of one
    """

    weight: str
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0

    def of(self, weight: Array) -> Array:
        """Return what the initializer holds of a weight."""
        strides = [stride * weight.itemsize for stride in self.strides]
        flat = weight.reshape(-1)[self.offset :]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, self.shape, strides, writeable=False))

    def layout(self, shape: Sequence[int]) -> str | None:
        """Return the layout in which it holds the whole of a weight of a shape; None for any other than these two."""
        if self.shape == (*shape,) and self.strides == row_major(shape):
            return AS_NAMED
        turned = (*shape[::-1],)
        return (
            TRANSPOSED if len(shape) == 2 and (self.shape, self.strides[::-1]) == (turned, row_major(shape)) else None
        )


Places = Mapping[str, Place]
"""By the initializers' names."""


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of an array whose numbers are one after the other."""
    return tuple(math.prod(shape[axis + 1 :]) if side > 1 else 0 for axis, side in enumerate(shape))


class StandIns:
    """What stands in for the weights of one trace."""

    def __init__(self) -> None:
        self._names: list[str] = []
        self._starts: list[int] = []
        self._end = 0
        self._memories: list[tuple[int, int, str]] = []

    def numbers(self, name: str, shape: Sequence[int]) -> Array | None:
        """Return float32 numbers that are none and tell which weight they stand for; None where all are taken."""
        size = math.prod(shape)
        if self._end + size > COUNT:
            return None
        self._names.append(name)
        self._starts.append(self._end)
        self._end += size
        bits = np.arange(SIGNALLING + self._end - size, SIGNALLING + self._end, dtype=np.uint32)
        return bits.view(np.float32).reshape(shape)

    def memory(self, name: str, address: int, size: int) -> None:
        """Note where the memory lies that stands for a large weight, of so many numbers."""
        insort(self._memories, (address, size, name))

    def places(self, model: ir.Model) -> dict[str, Place]:
        """Return what each initializer of a graph holds of a weight.

        Raises RuntimeError where the tracer has computed one from weights: it would depend on them.
        """
        found = {}
        for name, value in model.graph.initializers.items():
            if value.const_value is None or value.dtype is None or not value.dtype.is_floating_point():
                continue
            array = value.const_value.numpy()
            place = self.find(array) if value.dtype == ir.DataType.FLOAT else None
            if place is not None:
                found[name] = place
            elif np.isnan(array).any():
                raise RuntimeError(f"the tracer has computed {name} from the network's weights; please report it")
        return found

    def find(self, array: Array) -> Place | None:
        """Return which weight float32 numbers of a graph stand for, None for numbers of its own."""
        return self._in_memory(array) or self._counted(array)

    def _in_memory(self, array: Array) -> Place | None:
        address = array.__array_interface__["data"][0]
        before = bisect_right(self._memories, address, key=itemgetter(0))
        if not before:
            return None
        start, size, name = self._memories[before - 1]
        offset = (address - start) // array.itemsize
        if offset >= size:
            return None
        axes = zip(array.shape, array.strides, strict=True)
        apart = tuple(stride // array.itemsize if side > 1 else 0 for side, stride in axes)
        return Place(weight=name, shape=array.shape, strides=apart, offset=offset)

    def _counted(self, array: Array) -> Place | None:
        counted = array.view(np.uint32).astype(np.int64) - SIGNALLING
        if not array.size or counted.min() < 0 or counted.max() >= self._end:
            return None
        first = int(counted.flat[0])
        which = bisect_right(self._starts, first) - 1
        strides = tuple(_step(counted, axis) for axis in range(counted.ndim))
        grid = np.asarray(first)
        for side, stride in zip(counted.shape, strides, strict=True):
            grid = grid[..., None] + stride * np.arange(side)
        start, end = self._starts[which], [*self._starts, self._end][which + 1]
        if counted.min() < start or counted.max() >= end or not np.array_equal(counted, grid):
            return None  # numbers of several weights, or in an order that strides cannot say
        return Place(weight=self._names[which], shape=array.shape, strides=strides, offset=first - start)


def _step(counted: Array, axis: int) -> int:
    return int(counted.take(1, axis).flat[0] - counted.flat[0]) if counted.shape[axis] > 1 else 0
