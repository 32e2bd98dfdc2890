"""torch to ONNX: one module in, one checked graph file out."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentrt.engines.errors import CheckpointError

# From 21 GroupNormalization is one node, from 23 attention is: both reach TensorRT's parser whole.
OPSET = 23
# Weights above this go to a file of their own, which runtimes map into memory; protobuf ends at 2 GiB anyway.
EXTERNAL_BYTES = 64 << 20
DATA_SUFFIX = "_data"  # the ecosystem's: model.onnx_data


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphPlan:
    """How one component becomes a graph.

    outputs: the shape of each, dynamic axes by name
    axes: {input: {axis: (name, multiple)}}: dynamic axes; sizes are multiples of `multiple`
    """

    inputs: tuple[str, ...]
    outputs: Mapping[str, tuple[int | str, ...]]
    axes: Mapping[str, Mapping[int, tuple[str, int]]]
    spread: tuple[str, str] | None = None  # (small, large): `small` may have one entry or one for each of large's rows


def export_graph(module: Any, inputs: Mapping[str, Any], plan: GraphPlan, path: Path) -> None:
    """Write a torch module as ONNX with dynamic axes. `inputs` are torch tensors by name, in forward's order."""
    import torch

    path.parent.mkdir(parents=True, exist_ok=True)
    with quiet_exporter(), torch.no_grad():
        program = torch.onnx.export(
            module,
            tuple(inputs[name] for name in plan.inputs),
            dynamo=True,
            opset_version=OPSET,
            input_names=list(plan.inputs),
            output_names=list(plan.outputs),
            dynamic_shapes=_dynamic_shapes(plan),
            verbose=False,
        )
        if program is None:
            raise CheckpointError(f"torch exported nothing for {path.parent.name}")
        weights = sum(p.numel() * p.element_size() for p in module.parameters())
        _name_axes(program.model, plan)
        if plan.spread is not None:
            _spread(program.model, *plan.spread)
        _save(program, path, external=weights > EXTERNAL_BYTES)


def _save(program: Any, path: Path, *, external: bool) -> None:
    import onnx_ir

    onnx_ir.save(program.model, path, external_data=f"{path.name}{DATA_SUFFIX}" if external else None)


def _dynamic_shapes(plan: GraphPlan) -> tuple[dict[int, Any], ...]:
    from torch.export import Dim

    roots: dict[str, Any] = {}

    def dim(name: str, multiple: int) -> Any:
        if multiple == 1:
            return roots.setdefault(name, Dim(name, min=1, max=1 << 16))
        return multiple * roots.setdefault(name, Dim(f"{name}_", min=1, max=1 << 13))

    return tuple({i: dim(*axis) for i, axis in plan.axes.get(name, {}).items()} for name in plan.inputs)


def _name_axes(model: Any, plan: GraphPlan) -> None:
    """Call the inputs' dynamic axes by their plain names, where the exporter writes `8*height_`."""
    import onnx_ir

    values = {value.name: value for value in model.graph.inputs}
    for name, axes in plan.axes.items():
        shape = list(values[name].shape)
        for i, (axis, _) in axes.items():
            shape[i] = axis
        values[name].shape = onnx_ir.Shape(shape)
    for value in model.graph.outputs:
        value.shape = onnx_ir.Shape(plan.outputs[value.name])


def _spread(model: Any, small: str, large: str) -> None:
    """Let an input have one entry for all rows of another, or one for each: optimum gives one, batching many."""
    import onnx_ir

    values = {value.name: value for value in model.graph.inputs}
    count = onnx_ir.node("Shape", [values[large]], {"start": 0, "end": 1})
    each = onnx_ir.node("Expand", [values[small], count.outputs[0]])
    for usage in list(values[small].uses()):
        usage.node.replace_input_with(usage.idx, each.outputs[0])
    each.replace_input_with(0, values[small])
    values[small].shape = onnx_ir.Shape(["steps"])
    each.outputs[0].dtype = values[small].dtype
    model.graph.insert_before(model.graph[0], [count, each])


@contextlib.contextmanager
def quiet_exporter() -> Iterator[None]:
    """Keep the exporter's warnings and prints, which speak to its own developers, off the terminal."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch._dynamo", "torch.export", "onnxscript", "torch")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
