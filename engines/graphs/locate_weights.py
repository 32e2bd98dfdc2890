"""Where the weights of a canonical graph came to lie in a built one: found by comparing values, when it is built.

A compiler renames what it lays out again, so a name says nothing. What is not found, or is found twice, is left out,
and cannot be changed later.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import numpy as np

from latentrt.engines.bundle.weight_map import (
    AS_NAMED,
    LAYOUTS,
    TRANSPOSED,
    BuiltWeight,
    BuiltWeights,
    GraphWeight,
    GraphWeights,
    arrange,
    fits,
)
from latentrt.engines.spec import Array

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

DTYPES = {1: "float32", 10: "float16"}  # of TensorProto's types, those that weights have
GLANCE = 64  # elements: most arrays differ in the first


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """An initializer's values, mapped from the file that holds them. The file is None if they are in memory."""

    values: Array
    file: Path | None
    offset: int


class GraphValues:
    """The initializers of a graph on the disk, mapped and not read."""

    def __init__(self, model: ModelProto, path: Path) -> None:
        """Take a graph's initializers; their data lies in the file at `path`, or in those that they name beside it."""
        self._path = path
        self.tensors = {t.name: t for t in model.graph.initializer if t.data_type in DTYPES and len(t.dims) > 0}
        self._text = b""
        self._seen = 0

    def get(self, name: str) -> Stored | None:
        """Return an initializer's values; None if there is no such weight, or its bytes are not in the file."""
        tensor = self.tensors.get(name)
        if tensor is None:
            return None
        external = {entry.key: entry.value for entry in tensor.external_data}
        if external:
            return self._mapped(tensor, self._path.with_name(external["location"]), int(external.get("offset", 0)))
        offset = self._find(tensor.raw_data)
        if offset >= 0:
            return self._mapped(tensor, self._path, offset)
        values = np.frombuffer(tensor.raw_data, dtype=DTYPES[tensor.data_type])
        fitting = values.size == math.prod(tensor.dims)
        return Stored(values=values.reshape(tensor.dims), file=None, offset=0) if fitting else None

    def _find(self, raw: bytes) -> int:
        """Return where bytes begin in the graph's file, after what was found last by preference."""
        if not self._text and self._path.is_file():
            self._text = self._path.read_bytes()
        found = self._text.find(raw, self._seen)
        found = self._text.find(raw) if found < 0 else found
        self._seen = max(found, 0)
        return found if raw else -1

    @staticmethod
    def _mapped(tensor: TensorProto, file: Path, offset: int) -> Stored:
        values = np.memmap(file, dtype=DTYPES[tensor.data_type], mode="r", offset=offset, shape=tuple(tensor.dims))
        return Stored(values=values, file=file, offset=offset)


def places(record: GraphWeights, canonical: GraphValues, built: GraphValues) -> BuiltWeights:
    """Find each weight of a canonical graph among the initializers of the graph that was built of it."""
    by_shape: dict[tuple[int, ...], list[str]] = {}
    for name, tensor in built.tensors.items():
        by_shape.setdefault(tuple(tensor.dims), []).append(name)
    found: dict[str, BuiltWeight] = {}
    for name, graph_weight in record.weights.items():
        source = canonical.get(graph_weight.initializer)
        if source is None:
            continue
        weight = source.values.T if graph_weight.layout == TRANSPOSED else source.values
        first = [graph_weight.initializer] if graph_weight.initializer in built.tensors else []
        spots = list(_spots(weight, graph_weight.layout, first, by_shape, built))
        if len(spots) == 1:
            found[name] = _built_weight(graph_weight, *spots[0])
    taken = Counter(weight.initializer for weight in found.values())
    return BuiltWeights(weights={name: weight for name, weight in found.items() if taken[weight.initializer] == 1})


def _spots(
    weight: Array, layout: str, named: list[str], by_shape: Mapping[tuple[int, ...], list[str]], built: GraphValues
) -> Iterator[tuple[str, str, Stored]]:
    """Give each (initializer, layout, values) that is the weight, all in one layout.

    That of its own name and layout alone, where it is there.
    """
    for other, names in ((layout, named), *((other, None) for other in LAYOUTS)):
        if names is None:
            names = [name for shape, some in by_shape.items() if fits(other, weight.shape, shape) for name in some]
        found = list(_equal(weight, other, names, built))
        if found:
            yield from found
            return


def _equal(weight: Array, layout: str, names: Iterable[str], built: GraphValues) -> Iterator[tuple[str, str, Stored]]:
    arranged = arrange(weight, layout) if names else weight
    for name in names:
        stored = built.get(name)
        if stored is None or stored.file is None or stored.values.shape != arranged.shape:
            continue
        glance = np.array_equal(stored.values.reshape(-1)[:GLANCE], arranged.reshape(-1)[:GLANCE])
        if glance and np.array_equal(stored.values, arranged):
            yield name, layout, stored


def _built_weight(weight: GraphWeight, name: str, layout: str, stored: Stored) -> BuiltWeight:
    assert stored.file is not None
    return BuiltWeight(
        initializer=name,
        layout=layout,
        shape=weight.shape,
        exponent=weight.exponent,
        stored=stored.values.shape,
        dtype="float16" if stored.values.dtype == np.float16 else "float32",
        file=stored.file.name,
        offset=stored.offset,
    )


def own_places(record: GraphWeights, canonical: GraphValues, folder: str) -> BuiltWeights:
    """Find each weight, and all else that a graph holds, in the canonical graph itself.

    For what compiles that graph and keeps its names. folder: of the graph, below the bundle
    """
    weights = {name: _in_folder(folder, weight, canonical) for name, weight in record.weights.items()}
    others = {
        name: _in_folder(folder, GraphWeight(initializer=name, layout=AS_NAMED, shape=tuple(tensor.dims)), canonical)
        for name, tensor in canonical.tensors.items()
        if name not in {weight.initializer for weight in record.weights.values()}
    }
    return BuiltWeights(
        weights={name: weight for name, weight in weights.items() if weight},
        others={name: weight for name, weight in others.items() if weight},
    )


def _in_folder(folder: str, weight: GraphWeight, canonical: GraphValues) -> BuiltWeight | None:
    stored = canonical.get(weight.initializer)
    if stored is None or stored.file is None:
        return None
    built = _built_weight(weight, weight.initializer, weight.layout, stored)
    return msgspec.structs.replace(built, file=f"{folder}/{built.file}")
