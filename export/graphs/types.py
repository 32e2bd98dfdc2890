"""The type of each value of an ONNX graph, from the standard's own rules for operators.

Our graphs carry types on their inputs and outputs only, and onnx's inference of shapes gives up on the type too where
it cannot follow a shape.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx_ir as ir
from onnx.defs import OpSchema, get_schema

from latentrt.engines.spec import Array

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
# Operators that compute nothing: what they give is part of what they take.
MOVES = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Identity", "Pad", "Reshape"}
    | {"Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)
# Of an operator that may name the type of what it gives, and does not: the type that it gives, by the standard's name.
GIVES: Mapping[str, str] = {"DequantizeLinear": "T2"}  # its scale's


def load_typed(path: Path) -> ir.Model:
    """Read a graph and give each value its type. Weights stay on the disk until they are used."""
    model = ir.load(path)
    infer_types(model)
    return model


def read_once(tensor: ir.TensorProtocol) -> Array:
    """Return a weight's numbers in memory of their own: a file that was mapped for them is not resident after."""
    numbers = np.array(tensor.numpy())
    if isinstance(tensor, ir.ExternalTensor):
        tensor.release()
    return numbers


def infer_types(model: ir.Model) -> None:
    """Give each value of a graph its type, from the inputs and the weights on."""
    for node in model.graph:
        rules = schema(node)
        bound = {
            formal(rules.inputs, place).type_str: value.dtype
            for place, value in enumerate(node.inputs)
            if value is not None
        }
        for place, value in enumerate(node.outputs):
            rule = formal(rules.outputs, place)
            own = bound.get(rule.type_str) or bound.get(GIVES.get(node.op_type, ""))
            value.type = ir.TensorType(_stated(node) or own or _only(rules, rule))


def schema(node: ir.Node) -> OpSchema:
    """Return the standard's rules for a node's operator."""
    assert node.graph is not None
    return get_schema(node.op_type, node.graph.opset_imports[node.domain], node.domain)


def formal(parameters: Sequence[OpSchema.FormalParameter], place: int) -> OpSchema.FormalParameter:
    """Return the rule for one input or output; the last rule stands for any number."""
    return parameters[min(place, len(parameters) - 1)]


def allows(rules: OpSchema, parameter: OpSchema.FormalParameter, dtype: ir.DataType) -> bool:
    """Tell whether an input or output may have a type."""
    return f"tensor({dtype.name.lower()})" in _choices(rules, parameter)


def _choices(rules: OpSchema, parameter: OpSchema.FormalParameter) -> list[str]:
    constraints = {each.type_param_str: each.allowed_type_strs for each in rules.type_constraints}
    return list(constraints.get(parameter.type_str, (parameter.type_str,)))


def _stated(node: ir.Node) -> ir.DataType | None:
    """Return the type that a node's attributes name for its output: of a Cast, of a filling."""
    if "to" in node.attributes:
        return ir.DataType(node.attributes["to"].as_int())
    return node.attributes["value"].as_tensor().dtype if "value" in node.attributes else None


def _only(rules: OpSchema, parameter: OpSchema.FormalParameter) -> ir.DataType:
    """Return the type that an output always has."""
    (choice,) = _choices(rules, parameter)
    return ir.DataType[choice.removeprefix("tensor(").removesuffix(")").upper()]
