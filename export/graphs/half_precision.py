"""float32 graphs into float16 ones: fp16 weights and arithmetic, fp32 where values would leave fp16's range.

Most values that would are brought in by factors first, see `rescale.py`. For what is left, compilers take precision
from the graph alone, so every tensor gets its type here. The decision is made for each node of the graph, from the
ranges that `ranges.py` recorded. Nothing is decided by names of layers or models.

The ranges, and the error that is recorded, are those of the golden inputs: random tokens, latents and pictures of the
spread that the network meets, at two sizes. They show where the weights leave float16 on such inputs. They are no
proof for every prompt and picture, which is why a quarter of the range is the limit.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from latentrt.engines.spec import TensorSpec
from latentrt.export.graphs.external_data import save_graph
from latentrt.export.graphs.golden import TOLERANCES, Pair, require_close
from latentrt.export.graphs.ranges import LARGEST, LIMIT, Ranges, record_ranges, rounding_error, waves
from latentrt.export.graphs.rescale import rescale
from latentrt.export.graphs.types import FLOAT, HALF, MOVES, allows, formal, load_typed, read_once, schema

MATRIX_WORK = frozenset({"Attention", "Conv", "ConvTranspose", "Gemm", "MatMul"})

Recipe = Callable[[ir.Model, Ranges], list[ir.Node]]
"""Chooses the nodes that stay in float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Narrowed:
    """What became of a graph.

    files: the written graph and its weights
    float32_layers: the modules of which something stays in float32
    exponents: of the initializers that hold their weights / 2^exponent, see `rescale.py`
    largest: the largest magnitude that was recorded
    error: the largest difference from the recorded float32 outputs over their range, every node rounded
    """

    files: list[Path]
    float32_layers: tuple[str, ...]
    exponents: Mapping[str, int]
    largest: float
    error: float


def narrow_graph(
    wide: Path,
    target: Path,
    pairs: Sequence[Pair],
    *,
    component: str,
    takes: Sequence[TensorSpec],
    gives: Sequence[TensorSpec],
) -> Narrowed:
    """Write a float32 graph as a float16 one that still computes the recorded outputs.

    wide: the float32 graph; other graphs are written beside it
    takes, gives: the inputs and outputs in their new types
    Raises CheckpointError if even the most exact recipe is above the tolerance.
    """
    ranges, error = record_ranges(wide, pairs, component=component)
    require_close(component, error, precision="fp32")
    for recipe in RECIPES:
        model = load_typed(wide)
        rescaled = rescale(model, ranges)
        kept = recipe(model, rescaled.ranges)
        narrow(model, kept, takes=takes, gives=gives)
        files = save_graph(model, target)
        error = rounding_error(target, pairs, component=component)
        if error <= TOLERANCES["fp16"]:
            break
    require_close(component, error, precision="fp16")
    return Narrowed(
        files=files, float32_layers=layers(kept), exponents=rescaled.weights, largest=ranges.largest, error=error
    )


def out_of_range(model: ir.Model, ranges: Ranges) -> list[ir.Node]:
    """Return the nodes that float16 cannot compute.

    They take or give values beyond the limit, take weights that float16 cannot hold, or are attentions whose logits
    are beyond the limit.
    """
    wide = {name for name, largest in ranges.values.items() if not largest <= LIMIT}  # not a number is wide too
    wide |= {name for name, weight in model.graph.initializers.items() if not _fits(weight)}
    loud = {name for name, largest in ranges.logits.items() if not largest <= LIMIT}
    return [
        node
        for node in model.graph
        if _computes(node) and (any(value.name in wide for value in _values(node)) or node.outputs[0].name in loud)
    ]


def all_but_matrix_work(model: ir.Model, ranges: Ranges) -> list[ir.Node]:
    """Return every node but matrix products and what moves values, and those too where they are out of range.

    Sums along the network then lose nothing, as in torch's autocast; each product is still float16's.
    """
    wide = set(out_of_range(model, ranges))
    quick = MATRIX_WORK | MOVES
    return [
        node
        for node in model.graph
        if node in wide or (_computes(node) and node.op_type not in quick and not _adds_bias(node))
    ]


# From the fastest to the most exact: the first whose error is within the tolerance is taken.
RECIPES: tuple[Recipe, ...] = (out_of_range, all_but_matrix_work)


def layers(nodes: Sequence[ir.Node]) -> tuple[str, ...]:
    """Return the modules that nodes belong to, in the graph's order: nodes are named `module/operator`."""
    return tuple(dict.fromkeys((node.name or "").rpartition("/")[0] or node.op_type for node in nodes))


def _values(node: ir.Node) -> list[ir.Value]:
    return [value for value in (*node.inputs, *node.outputs) if value is not None]


def _computes(node: ir.Node) -> bool:
    """Tell whether a node gives float values: shapes and comparisons give none."""
    return any(value.dtype == FLOAT for value in node.outputs)


def _adds_bias(node: ir.Node) -> bool:
    """Tell whether a node is the second half of a linear layer."""
    made = [value.producer() for value in node.inputs if value is not None and not value.is_initializer()]
    return node.op_type == "Add" and len(made) == 1 and made[0] is not None and made[0].op_type == "MatMul"


def _fits(weight: ir.Value) -> bool:
    """Tell whether float16 holds a weight: nothing becomes infinite, and no factor or divisor becomes zero."""
    if weight.dtype != FLOAT or weight.const_value is None:
        return True
    values = read_once(weight.const_value)
    largest = float(np.abs(values[np.isfinite(values)]).max(initial=0.0))
    return largest <= LARGEST and (values.size > 1 or largest == 0.0 or np.float16(largest) != 0.0)


def narrow(
    model: ir.Model, wide: Collection[ir.Node], *, takes: Sequence[TensorSpec], gives: Sequence[TensorSpec]
) -> None:
    """Turn a float32 graph, whose values have types, into a float16 one in place.

    wide: the nodes that stay in float32; sines and cosines always do
    takes, gives: its inputs and outputs, in the types that they shall have
    """
    wide = {*wide, *waves(model)}
    for value, spec in zip(model.graph.inputs, takes, strict=True):
        value.type = ir.TensorType(_dtype(spec))
    forms = _Forms(model.graph)
    for node in list(model.graph):
        dtype = FLOAT if node in wide or _follows_float32(node) or not _knows_half(node) else HALF
        _set_inputs(node, dtype, forms)
        _set_outputs(node, dtype)
    for place, spec in enumerate(gives):
        _set_output(model.graph, place, _dtype(spec), forms)
    forms.drop_unused_weights()


def _dtype(spec: TensorSpec) -> ir.DataType:
    return ir.DataType.from_numpy(np.dtype(spec.dtype))


def _follows_float32(node: ir.Node) -> bool:
    """Tell whether a node only moves values that are in float32 already."""
    moved = [value for value in node.inputs if value is not None and value.dtype in (FLOAT, HALF)]
    moved = [value for value in moved if not value.is_initializer()]
    return node.op_type in MOVES and bool(moved) and all(value.dtype == FLOAT for value in moved)


def _knows_half(node: ir.Node) -> bool:
    rules = schema(node)
    return all(allows(rules, formal(rules.outputs, place), HALF) for place in range(len(node.outputs)))


def _set_inputs(node: ir.Node, dtype: ir.DataType, forms: _Forms) -> None:
    if node.op_type == "Cast":
        return  # takes any type
    found = {value.dtype for value in node.inputs if value is not None}
    if not _computes(node) and len(found & {FLOAT, HALF}) == 1:
        return  # a shape or a comparison, which asks only that its inputs are of one type
    rules = schema(node)
    for place, value in enumerate(node.inputs):
        if value is not None and value.dtype in (FLOAT, HALF):
            # Resize's scales, for one, are always float32
            wanted = dtype if _computes(node) and allows(rules, formal(rules.inputs, place), HALF) else FLOAT
            node.replace_input_with(place, forms.get(value, wanted, node))


def _set_outputs(node: ir.Node, dtype: ir.DataType) -> None:
    """Give a node's outputs their type, and what its attributes say of it."""
    if dtype == FLOAT:
        return
    for value in node.outputs:
        if value.dtype == FLOAT:
            value.type = ir.TensorType(HALF)
            if node.op_type == "Cast":
                node.attributes["to"] = ir.AttrInt64("to", int(HALF))
    filling = node.attributes.get("value")  # of ConstantOfShape
    if filling is not None and filling.as_tensor().dtype == FLOAT:
        half = ir.tensor(filling.as_tensor().numpy().astype(np.float16))
        node.attributes["value"] = ir.AttrTensor("value", half)


def _set_output(graph: ir.Graph, place: int, dtype: ir.DataType, forms: _Forms) -> None:
    """Give one of the graph's outputs its type and keep its name."""
    value = graph.outputs[place]
    if value.dtype != dtype:
        name, value.name = value.name, f"{value.name}.{FLOAT.name.lower()}"
        cast = forms.get(value, dtype, None)
        cast.name, cast.shape = name, value.shape
        graph.outputs[place] = cast


class _Forms:
    """Values in the other type: one cast each, made when it is first asked for. Weights change their type instead."""

    def __init__(self, graph: ir.Graph) -> None:
        self._graph = graph
        self._made: dict[tuple[ir.Value, ir.DataType], ir.Value] = {}

    def get(self, value: ir.Value, dtype: ir.DataType, user: ir.Node | None) -> ir.Value:
        """Return a value in a type. It is cast right before its user, or at the end of the graph."""
        if value.dtype == dtype:
            return value
        if (value, dtype) not in self._made:
            make = self._weight if value.is_initializer() else self._cast
            self._made[value, dtype] = make(value, dtype, user)
        return self._made[value, dtype]

    def drop_unused_weights(self) -> None:
        """Remove the float32 form of weights that are used in float16 alone, which then take its name."""
        for (value, _), form in self._made.items():
            if value.is_initializer() and not value.uses():
                name = value.name
                assert name is not None
                del self._graph.initializers[name]
                form.name = name

    def _weight(self, value: ir.Value, dtype: ir.DataType, user: ir.Node | None) -> ir.Value:
        assert value.const_value is not None and dtype == HALF
        half = ir.Value(name=f"{value.name}.half", shape=value.shape, type=ir.TensorType(HALF))
        half.const_value = _half(value.const_value, half.name)
        self._graph.register_initializer(half)
        return half

    def _cast(self, value: ir.Value, dtype: ir.DataType, user: ir.Node | None) -> ir.Value:
        origin, kind = value.producer(), dtype.name.lower()
        number = f"_{value.index()}" if value.index() else ""  # of a Split's parts
        name = f"{origin.name if origin is not None else value.name}/{kind}{number}"
        cast = ir.node("Cast", [value], {"to": int(dtype)}, name=name)
        result = cast.outputs[0]
        result.name, result.type = f"{value.name}.{kind}", ir.TensorType(dtype)
        if user is None:
            self._graph.append(cast)
        else:
            self._graph.insert_before(user, cast)
        return result


def _half(tensor: ir.TensorProtocol, name: str | None) -> ir.TensorProtocol:
    """Return a weight in float16, converted only when it is written: all of them at once would be another copy."""
    shape = ir.Shape(tensor.shape.numpy())
    return ir.LazyTensor(lambda: ir.Tensor(read_once(tensor).astype(np.float16)), dtype=HALF, shape=shape, name=name)
