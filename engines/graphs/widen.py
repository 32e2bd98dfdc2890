"""float16 graphs in float32, for machines whose kernels compute in nothing else. Imports onnx inside its functions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from latentrt.engines.errors import BundleError
from latentrt.engines.spec import Array

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

ALIGNMENT = 64  # bytes of a cache line
LEAST_EXTERNAL = 1024  # bytes; smaller weights stay in the graph


def widen(model: ModelProto, base: Path, data: Path | None) -> bool:
    """Turn a float16 graph into a float32 one that holds the same weights; tell whether there was anything to do.

    ONNX Runtime has next to no float16 kernels on the CPU and would cast every weight at every run.

    base: the directory of the graph's external data
    data: where large weights go, one at a time; the graph is to be saved beside it. None keeps them in the graph

    Raises BundleError if the graph names data outside its directory.
    """
    from onnx import TensorProto

    half = TensorProto.FLOAT16
    if not any(t.data_type == half for t in model.graph.initializer) and not _has_half_io(model):
        return False
    with data.open("wb") if data else nullcontext() as file:
        for graph in _graphs(model.graph):
            for tensor in graph.initializer:
                _widen_tensor(tensor, base, file)
            for info in (*graph.input, *graph.output, *graph.value_info):
                if info.type.tensor_type.elem_type == half:
                    info.type.tensor_type.elem_type = TensorProto.FLOAT
            for node in graph.node:
                _widen_node(node, base)
        for function in model.functions:
            for node in function.node:
                _widen_node(node, base)
    return True


def _has_half_io(model: ModelProto) -> bool:
    from onnx import TensorProto

    infos = (*model.graph.input, *model.graph.output)
    return any(info.type.tensor_type.elem_type == TensorProto.FLOAT16 for info in infos)


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _widen_node(node: NodeProto, base: Path) -> None:
    from onnx import TensorProto

    for attribute in node.attribute:
        if attribute.HasField("t"):
            _widen_tensor(attribute.t, base)
        # `to` of Cast, `dtype` of RandomNormal and EyeLike, `softmax_precision` of Attention: element types
        if attribute.name in ("to", "dtype", "softmax_precision", "stash_type") and attribute.i == TensorProto.FLOAT16:
            attribute.i = TensorProto.FLOAT


def _widen_tensor(tensor: TensorProto, base: Path, file: BinaryIO | None = None) -> None:
    """Make a float16 tensor a float32 one; put it at the end of a file if it is large or was in one."""
    from onnx import TensorProto, numpy_helper

    half, external = tensor.data_type == TensorProto.FLOAT16, tensor.data_location == TensorProto.EXTERNAL
    if not (half or external):
        return
    values = _read_external(tensor, base) if external else numpy_helper.to_array(tensor)
    values = values.astype(np.float32) if half else values
    if file and (external or values.nbytes >= LEAST_EXTERNAL):
        _append(tensor, values, file)
    else:
        tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))


def _read_external(tensor: TensorProto, base: Path) -> Array:
    from onnx import helper

    stored = {entry.key: entry.value for entry in tensor.external_data}
    if Path(stored["location"]).name != stored["location"]:
        raise BundleError(f"a graph in {base} names the data '{stored['location']}', which is not beside it")
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    offset, count = int(stored.get("offset", 0)), math.prod(tensor.dims)
    return np.fromfile(base / stored["location"], dtype, count=count, offset=offset).reshape(tensor.dims)


def _append(tensor: TensorProto, values: Array, file: BinaryIO) -> None:
    """Have a tensor name numbers that are written to the end of a file, where a cache line begins."""
    from onnx import TensorProto, helper

    file.write(bytes(-file.tell() % ALIGNMENT))
    place = {"location": Path(file.name).name, "offset": file.tell(), "length": values.nbytes}
    np.ascontiguousarray(values).tofile(file)
    dtype, dims, name = helper.np_dtype_to_tensor_dtype(values.dtype), list(tensor.dims), tensor.name
    tensor.Clear()
    tensor.data_type, tensor.name, tensor.data_location = dtype, name, TensorProto.EXTERNAL
    tensor.dims.extend(dims)
    for key, value in place.items():
        tensor.external_data.add(key=key, value=str(value))
