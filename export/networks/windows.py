"""A network on windows of frames traced, and its graph made one of rows: a row for each frame of each window.

A trace on rows would have to know that their number is a multiple of the window's length, which it cannot say. So it
is made on (videos, frames, …), and Reshapes around it, sized by the length of FRAMES, give the graph rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
import torch

from latentrt.engines.spec import TensorSpec
from latentrt.engines.tensor_names import FRAMES
from latentrt.export.graphs.trace import LIMITS, trace_graph
from latentrt.export.networks.frames import Framed, spread

ROWS = "batch"  # the axis of the rows
END = np.iinfo(np.int64).max


def trace_windows(
    module: Framed,
    inputs: Mapping[str, torch.Tensor],
    takes: Sequence[TensorSpec],
    gives: Sequence[TensorSpec],
    *,
    axes: Mapping[str, tuple[int, int] | None],
) -> ir.Model:
    """Return the graph of a network on rows, see `trace_graph`."""
    frames = len(inputs[FRAMES])
    inner = [unfolded(spec) for spec in takes if spec.name != FRAMES]
    given = {spec.name: (inputs[spec.name], is_rows(spec)) for spec in takes if spec.name != FRAMES}
    tensors = {
        name: tensor.reshape(-1, frames, *tensor.shape[1:]) if rows else tensor
        for name, (tensor, rows) in given.items()
    }
    with spread():
        model = trace_graph(
            module.windows,
            tensors,
            inner,
            [unfolded(spec) for spec in gives],
            axes=axes,
            limits={**LIMITS, "frames": (1, module.most)},
        )
    fold(model, takes, gives)
    return model


def is_rows(spec: TensorSpec) -> bool:
    """Tell whether a tensor has a row for each frame."""
    return spec.shape[0] == ROWS


def unfolded(spec: TensorSpec) -> TensorSpec:
    """Return a tensor of rows as it is on windows; others as they are."""
    if not is_rows(spec):
        return spec
    return TensorSpec(name=spec.name, dtype=spec.dtype, shape=(ROWS, "frames", *spec.shape[1:]))


def fold(model: ir.Model, takes: Sequence[TensorSpec], gives: Sequence[TensorSpec]) -> None:
    """Give a graph on windows the inputs and outputs of one on rows. takes, gives: those, in order"""
    graph, nodes = model.graph, list[ir.Node]()
    constants = {"all": [-1], "first": [0], "end": [END]}
    held = {name: _constant(graph, f"windows.{name}", value) for name, value in constants.items()}
    inner = {str(value.name): value for value in graph.inputs}
    outer = {spec.name: _input(spec, inner.get(spec.name)) for spec in takes}
    frames = _node("Shape", [outer[FRAMES]], "windows.frames", nodes)
    for name, value in inner.items():
        if len(value.shape or ()) == len(outer[name].shape or ()):  # timestep: one for each row, or one for all
            first, end = held["first"], held["end"]
            inside = _node("Slice", [outer[name], first, end, first, frames], f"windows.{name}", nodes)
        else:
            rest = _node("Shape", [outer[name]], f"windows.{name}.rest", nodes, start=1)
            shape = _node("Concat", [held["all"], frames, rest], f"windows.{name}.shape", nodes, axis=0)
            inside = _node("Reshape", [outer[name], shape], f"windows.{name}", nodes)
        value.replace_all_uses_with(inside)
    graph.inputs.clear()
    graph.inputs.extend(outer[spec.name] for spec in takes)
    graph.insert_before(graph[0], nodes)
    for place, spec in enumerate(gives):
        graph.outputs[place] = _rows_again(graph, graph.outputs[place], spec, held["all"])


def _input(spec: TensorSpec, inner: ir.Value | None) -> ir.Value:
    dtype = ir.DataType.FLOAT if inner is None else inner.dtype
    if inner is not None:
        inner.name = f"{spec.name}.inner"
    return ir.Input(name=spec.name, shape=ir.Shape(spec.shape), type=ir.TensorType(dtype or ir.DataType.FLOAT))


def _rows_again(graph: ir.Graph, value: ir.Value, spec: TensorSpec, everything: ir.Value) -> ir.Value:
    """Return an output of rows made of one of windows."""
    nodes, dtype = list[ir.Node](), value.dtype
    value.name = f"{spec.name}.windows"
    rest = _node("Shape", [value], f"windows.{spec.name}.rest", nodes, start=2)
    shape = _node("Concat", [everything, rest], f"windows.{spec.name}.shape", nodes, axis=0)
    rows = _node("Reshape", [value, shape], spec.name, nodes)
    rows.shape, rows.type = ir.Shape(spec.shape), ir.TensorType(dtype or ir.DataType.FLOAT)
    graph.extend(nodes)
    value.shape, value.type = None, None
    return rows


def _constant(graph: ir.Graph, name: str, values: list[int]) -> ir.Value:
    tensor = ir.tensor(np.array(values, dtype=np.int64), name=name)
    value = ir.Value(name=name, shape=ir.Shape([1]), type=ir.TensorType(ir.DataType.INT64), const_value=tensor)
    graph.register_initializer(value)
    return value


def _node(kind: str, takes: Sequence[ir.Value], gives: str, nodes: list[ir.Node], **attributes: int) -> ir.Value:
    """Make a node and note it; return what it gives."""
    node = ir.node(kind, takes, attributes or None, name=gives)
    node.outputs[0].name = gives
    nodes.append(node)
    return node.outputs[0]
