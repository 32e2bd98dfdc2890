"""The files that hold the weights of an ONNX graph: the graph names them, and each exporter names them differently."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from latentrt.engines.errors import CheckpointError, NotInstalledError
from latentrt.export import INSTALL

if TYPE_CHECKING:
    import onnx_ir as ir
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

DATA_SUFFIX = "_data"  # of the file with a graph's weights, after the graph's own name, in what is written here
# Weights above this go to a file beside the graph: backends map it into memory, and protobuf ends at 2 GiB.
EXTERNAL_BYTES = 64 << 20


def save_graph(model: ir.Model, path: Path) -> list[Path]:
    """Write a graph, with its weights in a file of their own when they are large. Returns the files."""
    import onnx_ir as ir

    path.parent.mkdir(parents=True, exist_ok=True)
    data = path.with_name(path.name + DATA_SUFFIX)
    large = weights_bytes(model) > EXTERNAL_BYTES
    ir.save(model, path, external_data=data.name if large else None)
    return [path, data] if large else [path]


def weights_bytes(model: ir.Model) -> int:
    """Return the size of a graph's weights."""
    values = (value.const_value for value in model.graph.initializers.values())
    return sum(value.nbytes for value in values if value is not None)


def read_graph(path: Path) -> ModelProto:
    """Read a graph without the weights in other files. Raises CheckpointError if it is not one; NotInstalledError."""
    try:
        import onnx
    except ImportError:
        raise NotInstalledError(f"reading {path} needs onnx", install=INSTALL) from None
    from google.protobuf.message import DecodeError

    try:
        model = onnx.load(str(path), load_external_data=False)
    except DecodeError:
        model = onnx.ModelProto()
    if not model.graph.node:
        raise CheckpointError(f"{path} is not an ONNX graph: it is truncated or damaged; download it again")
    return model


def data_files(graph: Path) -> dict[str, Path]:
    """Return the files that a graph's weights lie in beside it, by the location that the graph names.

    Raises CheckpointError if one leads outside the graph's folder, is missing or too short.
    """
    return {location: _file(graph, location, end) for location, end in locations(graph).items()}


def locations(graph: Path) -> dict[str, int]:
    """Return the names of the files that a graph's weights lie in, and how many bytes of each it reads.

    Raises CheckpointError if one leads outside the graph's folder.
    """
    ends: dict[str, int] = {}
    for tensor in external_tensors(read_graph(graph)):
        location, end = _place(graph, tensor)
        ends[location] = max(ends.get(location, 0), end)
    return dict(sorted(ends.items()))


def rename_data(model: ModelProto, names: Mapping[str, str]) -> None:
    """Have a graph's weights lie in files of other names. names: the new one of each location"""
    for tensor in external_tensors(model):
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = names[entry.value]


def external_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Yield every tensor of a graph, and of the graphs and constants inside it, that lies in another file."""
    from onnx import TensorProto

    inner = (tensor for function in model.functions for node in function.node for tensor in _of_node(node))
    for tensor in (*_of_graph(model.graph), *inner):
        if tensor.data_location == TensorProto.EXTERNAL:
            yield tensor


def _of_graph(graph: GraphProto) -> Iterator[TensorProto]:
    yield from graph.initializer
    for sparse in graph.sparse_initializer:
        yield from (sparse.values, sparse.indices)
    for node in graph.node:
        yield from _of_node(node)


def _of_node(node: NodeProto) -> Iterator[TensorProto]:
    for attribute in node.attribute:
        yield from (attribute.t, *attribute.tensors)
        for graph in (attribute.g, *attribute.graphs):
            yield from _of_graph(graph)


def _place(graph: Path, tensor: TensorProto) -> tuple[str, int]:
    """Return the location of a tensor and where its bytes end there."""
    from onnx import helper

    said = {entry.key: entry.value for entry in tensor.external_data}
    location = said.get("location", "")
    try:
        size = math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        offset, length = int(said.get("offset", 0)), int(said.get("length", size))
        if min(offset, length) < 0:
            raise ValueError("bytes are counted from 0 up")
    except (KeyError, ValueError):
        raise CheckpointError(
            f"{graph} does not say where '{tensor.name}' lies in '{location}'; download it again"
        ) from None
    pure = PurePosixPath(location)
    if pure.is_absolute() or not pure.parts or ".." in pure.parts or set("\\\0") & set(location):
        raise CheckpointError(
            f"{graph} names the data {location!r}, which is not in its folder; do not use this checkpoint"
        )
    return location, offset + length


def _file(graph: Path, location: str, end: int) -> Path:
    path = graph.parent / location
    if not path.is_file():
        raise CheckpointError(f"{path} is missing, and {graph} has its weights there; download the whole checkpoint")
    if path.stat().st_size < end:
        raise CheckpointError(
            f"{path} holds {path.stat().st_size} bytes where {graph.name} reads {end}; download it again"
        )
    return path
