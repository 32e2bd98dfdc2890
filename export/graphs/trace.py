"""torch to ONNX: one network, one graph, dynamic in batch and size, its weights beside it when they are large."""

from __future__ import annotations

import ast
import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from latentrt.engines.spec import TensorSpec

# 23 is the first opset with Attention; GroupNormalization (21) and Gelu (20) are single nodes too.
OPSET = 23
SCOPES = "pkg.torch.onnx.name_scopes"
# What a trace may assume of an axis. diffusers branches at 64 pictures only to make tensors contiguous: the limit
# settles that branch, and the graph has none.
LIMITS: Mapping[str, tuple[int, int]] = {"batch": (1, 63), "tokens": (1, 4096)}
LARGEST_SIDE = 8192


def trace_graph(
    module: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    takes: Sequence[TensorSpec],
    gives: Sequence[TensorSpec],
    *,
    axes: Mapping[str, tuple[int, int] | None],
    limits: Mapping[str, tuple[int, int]] = LIMITS,
) -> ir.Model:
    """Return a module's graph, whose weights are the module's own memory.

    inputs: tensors of the traced sizes, by the names of `takes`, at least 2 on every dynamic axis but `steps`
    axes: the smallest size of an axis that the trace holds for, and what its sizes are multiples of; None if its
        size follows from the others'
    limits: what a trace may assume of an axis besides
    """
    arguments = tuple(inputs[spec.name] for spec in takes)
    shapes: Any = _dynamic_shapes(takes, axes, limits)
    if any(taken.kind is taken.VAR_POSITIONAL for taken in inspect.signature(module.forward).parameters.values()):
        shapes = (shapes,)
    with torch.no_grad():
        # Not left to torch.onnx: its own attempt fails on sizes that are halved and rounded, and its fallback, the
        # strict trace, takes three times as long and holds a second copy of the weights.
        traced = torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)
        program = torch.onnx.export(
            traced,
            arguments,
            dynamo=True,
            opset_version=OPSET,
            input_names=[spec.name for spec in takes],
            output_names=[spec.name for spec in gives],
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None
    model = program.model
    _name_axes(model.graph.inputs, takes)
    _name_axes(model.graph.outputs, gives)
    _name_nodes(model)
    _strip(model)
    return model


def _dynamic_shapes(
    takes: Sequence[TensorSpec], axes: Mapping[str, tuple[int, int] | None], known: Mapping[str, tuple[int, int]]
) -> tuple[dict[int, Any], ...]:
    names = {axis for spec in takes for axis in spec.shape if isinstance(axis, str)} - {"steps"}
    limits = {name: axes.get(name, (2, 1)) for name in names}
    dims = {
        name: torch.export.Dim.AUTO
        if limit is None
        else _dim(name, *known.get(name, (limit[0], LARGEST_SIDE)), limit[1])
        for name, limit in limits.items()
    }
    return tuple({n: dims[axis] for n, axis in enumerate(spec.shape) if axis in dims} for spec in takes)


def _dim(name: str, low: int, high: int, multiple: int) -> Any:
    if multiple == 1:
        return torch.export.Dim(name, min=low, max=high)
    return multiple * torch.export.Dim(f"_{name}", min=low // multiple, max=high // multiple)


def _name_axes(values: Sequence[ir.Value], specs: Sequence[TensorSpec]) -> None:
    """Give inputs and outputs the axes of the table. `steps` was traced at 1, where Expand takes any number."""
    for value, spec in zip(values, specs, strict=True):
        assert value.name == spec.name, (value.name, spec.name)
        value.shape = ir.Shape(spec.shape)


def _name_nodes(model: ir.Model) -> None:
    """Name each node for its module and operator, as in `up_blocks.1.resnets.0.conv1/Conv`.

    Compilers and the list of what stays in float32 speak of nodes: these names are the checkpoint's own.
    """
    modules: dict[ir.Node | None, str] = {}
    seen: Counter[str] = Counter()
    for node in model.graph:
        # ['', 'model', 'model.conv_in', 'conv2d']: the wrapper, the modules inside one another, the operation
        scopes = ast.literal_eval(node.metadata_props.get(SCOPES, "[]"))
        before = next((value.producer() for value in node.inputs if value is not None), None)
        # what the exporter put together of several nodes has no scopes: it stands where its input was made
        module = scopes[-2].removeprefix("model").removeprefix(".") if scopes else modules.get(before, "")
        modules[node] = "" if module.startswith("_") else module
        name = f"{modules[node]}/{node.op_type}".removeprefix("/")
        seen[name] += 1
        node.name = name if seen[name] == 1 else f"{name}_{seen[name]}"


def _strip(model: ir.Model) -> None:
    """Drop what the trace noted of its own process: paths and lines of code, names of intermediate sizes."""
    outputs = set(model.graph.outputs)
    model.metadata_props.clear()
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in outputs:
                value.shape = None
                value.type = None
    for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
