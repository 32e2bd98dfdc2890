"""Values beyond float16 brought into it by powers of two, which change no result.

Every value of a float32 graph gets an exponent: it is held as value / 2^exponent. Norms give the same for it once their
epsilon is divided by 4^exponent. Sums, and what moves or resizes values, hold all of theirs at one exponent. A layer
without an activation has an exponent before it and one behind it, and its weights take the difference. All else
(activations, softmax, the graph's own inputs and outputs) needs the number itself, at exponent 0. The recorded
ranges say which of the others have another.

So the residual stream of a VAE, which overflows in SDXL's, is held at a fraction between its norms. Factors that are
powers of two are exact: the float32 graph computes what it did before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from latentrt.export.graphs.ranges import LIMIT, Ranges
from latentrt.export.graphs.types import FLOAT, MOVES, read_once

# Other inputs may reach further than the recorded ones: what is brought in comes well below the limit. What that costs
# at the other end is nothing beside values that are so large.
TARGET = LIMIT / 4
EPSILON = 1e-5  # the standard's, of each norm


@dataclass(frozen=True, slots=True, kw_only=True)
class Rescaled:
    """What became of a graph.

    ranges: those of its values as they are held now
    weights: the exponents of the initializers that have changed: they hold their weights / 2^exponent
    """

    ranges: Ranges
    weights: Mapping[str, int]


def rescale(model: ir.Model, ranges: Ranges) -> Rescaled:
    """Hold what is beyond the limit at an exponent, in place, wherever the graph's operators allow it.

    model: in float32, its values have types
    """
    streams = _find_streams(model.graph)
    exponents = _choose(model.graph, streams, ranges)
    for norm in streams.norms:
        _divide_epsilon(norm, exponents.get(_computed(norm)[0], 0))
    weights = _divide_weights(model.graph, streams, exponents)
    held = {value.name: exponent for value, exponent in exponents.items()}
    values = {name: math.ldexp(largest, -held.get(name, 0)) for name, largest in ranges.values.items()}
    return Rescaled(ranges=Ranges(values=values, logits=ranges.logits), weights=weights)


@dataclass(frozen=True, slots=True)
class _Streams:
    """Which values share an exponent, and what depends on it.

    parents: another value of the same stream; the head, which has none, stands for the stream
    fixed: the heads of streams at exponent 0
    weights: initializers, by their nodes and places, with the values that they lead from and to; None is at exponent 0
    products: of two computed values
    """

    parents: dict[ir.Value, ir.Value] = field(default_factory=dict)
    fixed: set[ir.Value] = field(default_factory=set)
    norms: list[ir.Node] = field(default_factory=list)
    weights: list[tuple[ir.Node, int, ir.Value | None, ir.Value]] = field(default_factory=list)
    products: list[ir.Node] = field(default_factory=list)

    def head(self, value: ir.Value) -> ir.Value:
        while value in self.parents:
            value = self.parents[value]
        return value

    def share(self, values: Iterable[ir.Value]) -> None:
        """Hold values at one exponent."""
        head, *others = dict.fromkeys(self.head(value) for value in values)
        self.parents.update(dict.fromkeys(others, head))
        if self.fixed.intersection(others):
            self.fixed.add(head)

    def fix(self, values: Iterable[ir.Value]) -> None:
        """Hold values at exponent 0."""
        self.fixed.update(self.head(value) for value in values)

    def is_fixed(self, value: ir.Value) -> bool:
        """Tell whether a value is at exponent 0 whatever its range."""
        return self.head(value) in self.fixed

    def weigh(self, node: ir.Node, places: Iterable[int], source: ir.Value | None = None) -> None:
        """Note that initializers lead from a value to the node's first output."""
        self.weights.extend((node, place, source, node.outputs[0]) for place in places)


def _find_streams(graph: ir.Graph) -> _Streams:
    streams = _Streams()
    streams.fix((*graph.inputs, *graph.outputs))
    for node in graph:
        if node.op_type == "Shape":  # asks nothing of the numbers
            continue
        rule = RULES.get(node.op_type)
        if rule is None or not rule(node, streams):
            streams.fix((*_computed(node).values(), *_results(node)))
    for node in streams.products:
        _settle_product(node, streams)
    return streams


def _computed(node: ir.Node) -> dict[int, ir.Value]:
    """Return the float32 inputs that are no initializers, by their places."""
    return {place: value for place, value in _floats(node).items() if not value.is_initializer()}


def _constant(node: ir.Node) -> list[int]:
    """Return the places of the float32 inputs that are initializers."""
    return [place for place, value in _floats(node).items() if value.is_initializer()]


def _floats(node: ir.Node) -> dict[int, ir.Value]:
    return {place: value for place, value in enumerate(node.inputs) if value is not None and value.dtype == FLOAT}


def _results(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.outputs if value.dtype == FLOAT]


# Each rule notes what a node asks of its values, and tells whether it is of a form that the rule knows.


def _sum(node: ir.Node, streams: _Streams) -> bool:
    """A fraction of all inputs gives the same fraction of the outputs."""
    results = _results(node)
    if results:
        streams.share((*_computed(node).values(), *results))
        streams.weigh(node, _constant(node))
    return bool(results)


def _first(node: ir.Node, streams: _Streams) -> bool:
    """A fraction of the first input does, and the others stay: what resizes or divides it."""
    computed = _computed(node)
    if 0 not in computed:
        return False
    streams.share((computed.pop(0), *_results(node)))
    streams.fix(computed.values())
    return True


def _layer(node: ir.Node, streams: _Streams) -> bool:
    """Weights, and perhaps a bias, lead from one input to the output."""
    if list(computed := _computed(node)) != [0]:
        return False
    streams.weigh(node, [1], computed[0])
    streams.weigh(node, [place for place in _constant(node) if place > 1])
    return True


def _product(node: ir.Node, streams: _Streams) -> bool:
    """A weight leads from the other factor to the product. Where both are computed, one is at exponent 0."""
    computed = list(_computed(node).values())
    if len(computed) == 1:
        streams.weigh(node, _constant(node), computed[0])
    elif computed:
        streams.products.append(node)
    return bool(computed)


def _settle_product(node: ir.Node, streams: _Streams) -> None:
    a, b = _computed(node).values()
    if streams.is_fixed(a):
        streams.share((b, *node.outputs))
    elif streams.is_fixed(b):
        streams.share((a, *node.outputs))
    else:
        streams.fix((a, b, *node.outputs))


def _norm(node: ir.Node, streams: _Streams) -> bool:
    """The result is the same for a fraction, and weight and bias can make it one."""
    if list(_computed(node)) != [0] or len(node.outputs) != 1:
        return False
    streams.norms.append(node)
    streams.weigh(node, _constant(node))
    return True


def _attention(node: ir.Node, streams: _Streams) -> bool:
    """The result is a mean of values. Queries and keys make logits, which are needed as they are."""
    computed = _computed(node)
    if len(node.outputs) != 1 or not {0, 1, 2} <= set(computed) <= {0, 1, 2, 3}:
        return False
    streams.share((computed.pop(2), node.outputs[0]))
    streams.fix(computed.values())
    return True


RULES: Mapping[str, Callable[[ir.Node, _Streams], bool]] = {
    **dict.fromkeys(MOVES, _sum),
    **dict.fromkeys(("Add", "Sub", "Sum", "Mean", "Max", "Min", "Where", "Neg", "Abs", "Relu", "LeakyRelu"), _sum),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceMin", "ReduceSum"), _sum),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "MaxPool", "DepthToSpace", "SpaceToDepth"), _sum),
    **dict.fromkeys(("Div", "Resize"), _first),
    **dict.fromkeys(("Conv", "ConvTranspose", "Gemm"), _layer),
    **dict.fromkeys(("MatMul", "Mul"), _product),
    **dict.fromkeys(("GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization"), _norm),
    "Attention": _attention,
}


def _choose(graph: ir.Graph, streams: _Streams, ranges: Ranges) -> dict[ir.Value, int]:
    """Return the exponents of the values that have another one than 0."""
    values = [value for node in graph for value in _results(node)]
    reach: dict[ir.Value, float] = {}
    for value in values:
        head, largest = streams.head(value), ranges.values.get(value.name or "", 0.0)
        reach[head] = float(np.maximum(reach.get(head, 0.0), largest))  # NaN wins
    exponents = {
        head: math.ceil(math.log2(largest / TARGET))
        for head, largest in reach.items()
        if head not in streams.fixed and LIMIT < largest < math.inf
    }
    return {value: exponents[streams.head(value)] for value in values if streams.head(value) in exponents}


def _divide_epsilon(norm: ir.Node, exponent: int) -> None:
    if exponent:
        epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else EPSILON
        norm.attributes["epsilon"] = ir.AttrFloat32("epsilon", math.ldexp(epsilon, -2 * exponent))


def _divide_weights(graph: ir.Graph, streams: _Streams, exponents: Mapping[ir.Value, int]) -> dict[str, int]:
    """Give nodes the weights that lead between their exponents. Returns the exponents of those that have changed.

    Each has the name of the weight that it is made of, where no other node needs that one.
    """
    made: dict[tuple[ir.Value, int], ir.Value] = {}
    for node, place, source, result in streams.weights:
        weight, exponent = node.inputs[place], exponents.get(result, 0)
        exponent -= exponents.get(source, 0) if source is not None else 0
        assert weight is not None
        if exponent:
            if (weight, exponent) not in made:
                made[weight, exponent] = _divided(graph, weight, exponent)
            node.replace_input_with(place, made[weight, exponent])
    changed = {}
    for (weight, exponent), form in made.items():
        name = weight.name or ""
        if not weight.uses() and graph.initializers.get(name) is weight:
            del graph.initializers[name]
            form.name = name
        changed[form.name or ""] = exponent
    return changed


def _divided(graph: ir.Graph, weight: ir.Value, exponent: int) -> ir.Value:
    """Add a weight / 2^exponent to a graph, computed when it is used: all of them at once would be another copy."""
    tensor = weight.const_value
    assert tensor is not None
    name, shape = f"{weight.name}/{2.0**exponent:g}", ir.Shape(tensor.shape.numpy())
    made = ir.Value(name=name, shape=weight.shape, type=weight.type)
    made.const_value = ir.LazyTensor(
        lambda: ir.Tensor(np.ldexp(read_once(tensor), -exponent)), dtype=FLOAT, shape=shape, name=name
    )
    graph.register_initializer(made)
    return made
