"""3 x 3 convolutions by Winograd's method, F(4, 3), in rows: half the multiplications, written as ONNX operators.

arXiv:1509.09308: four outputs of a convolution with three taps are made of six products instead of twelve, of sums of
the six inputs that they see. Here the four are rows below each other. Six sparse depthwise convolutions make the sums,
six convolutions of one row of taps the products, and sums with the matrix below the four rows, which then only have to
be put one below the other. ONNX Runtime runs all of it on whole vectors of channels, as the one convolution before.

In both directions at once fewer multiplications would be left, but so many sums and passes over memory that large
pictures, which do not stay in the cache, are slower for it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentrt.engines.graphs.cpu_rewrites import drop_unused_weights, three_by_three
from latentrt.engines.graphs.edits import GraphView
from latentrt.engines.graphs.locate_weights import GraphValues
from latentrt.engines.spec import Array

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# arXiv:1509.09308, 4.3: B transposed and G for F(4, 3). A transposed is written out in `_rows`.
INPUTS = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ],
    dtype=np.float32,
)
FILTERS = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=np.float64) / 24
TOGETHER = 4  # rows that are made of one set of products
VECTOR = 16  # channels: the widest that ONNX Runtime computes at once
# With fewer channels the sums take as long as the products that they save (benchmarks/cpu_convolutions.py).
LEAST_CHANNELS = 128


def use_winograd(model: ModelProto, path: Path, *, least_channels: int = LEAST_CHANNELS) -> int:
    """Replace every 3 x 3 convolution of many channels. Returns how many.

    path: the file that the graph was read from, beside which its weights lie
    least_channels: of inputs and of outputs
    Twice the weights of each are stored. Outputs differ by rounding: by some 2e-6 of the largest. Any height does: rows
    that are missing for a whole four are computed of zeros, and cut off.
    """
    graph, values = GraphView.of(model), GraphValues(model, path)
    instead: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        weights = three_by_three(node, values)
        if weights and _fits(weights[0], least_channels):
            instead[node.output[0]] = _convolution(node, graph, *weights)
    graph.replace(instead)
    drop_unused_weights(model.graph)
    return len(instead)


def _fits(weights: Array, least_channels: int) -> bool:
    return all(channels % VECTOR == 0 and channels >= least_channels for channels in weights.shape[:2])


def transform_filters(weights: Array) -> Array:
    """Return a 3 x 3 convolution's weights for the six products.

    weights: (out, in, 3, 3), of which the third axis is taken apart; returns (6, out, in, 1, 3), float32
    """
    products = np.tensordot(FILTERS, weights.astype(np.float64), (1, 2))
    return products[:, :, :, None].astype(np.float32)


def _convolution(node: NodeProto, graph: GraphView, weights: Array, *bias: Array) -> list[NodeProto]:
    """Return the nodes for one convolution: the sums of its inputs, the products, and what `_rows` makes of these."""
    from onnx import helper

    own, channels = f"{node.output[0]}.winograd", weights.shape[1]
    nodes: list[NodeProto] = []
    biases = [graph.constant(f"{own}.bias", np.array(values)) for values in bias]
    for i, filters in enumerate(transform_filters(weights)):
        sums = np.tile(INPUTS[i].reshape(1, 1, -1, 1), (channels, 1, 1, 1))
        taken = [node.input[0], graph.constant(f"{own}.sums{i}", sums)]
        # Below, zeros for all that may be missing: from the last row on there is room for one more four, if any is.
        tall: dict[str, Any] = {
            "kernel_shape": [6, 1],
            "strides": [TOGETHER, 1],
            "pads": [1, 0, TOGETHER, 0],
            "group": channels,
        }
        nodes.append(helper.make_node("Conv", taken, [f"{own}.in{i}"], f"{own}.in{i}", **tall))
        last = biases if i in (0, 5) else []  # each of these two is in one row alone
        taken = [f"{own}.in{i}", graph.constant(f"{own}.filters{i}", filters), *last]
        product = helper.make_node("Conv", taken, [f"{own}.{i}"], f"{own}.{i}", kernel_shape=[1, 3], pads=[0, 1, 0, 1])
        nodes.append(product)
    rows = _rows(own, graph, len(weights), biases)
    _say_equal(own, [each.output[0] for each in (*nodes[1::2], *rows)], graph, len(weights))
    return [*nodes, *rows, *_interleave(own, node, graph, len(weights))]


def _say_equal(own: str, names: list[str], graph: GraphView, channels: int) -> None:
    """Note that tensors are of one shape: else ONNX Runtime lays out anew what it could add as it is."""
    from onnx import TensorProto, helper

    axes: list[str | int | None] = [f"{own}.pictures", channels, f"{own}.fours", f"{own}.columns"]
    graph.proto.value_info.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name in names)


def _rows(own: str, graph: GraphView, channels: int, biases: list[str]) -> list[NodeProto]:
    """Return what makes the four rows of the products 0 to 5.

    With a, b = 1 + 2, 1 - 2 and c, d = 3 + 4, 3 - 4 the rows are 0 + a + c, b + 2 d, a + 4 c and b + 8 d + 5
    (arXiv:1509.09308, A transposed). A sum with a multiple is a depthwise convolution that another tensor is added to,
    which ONNX Runtime does in one pass over memory.
    """
    from onnx import helper

    nodes: list[NodeProto] = []

    def add(first: str, second: str, made: str) -> None:
        nodes.append(helper.make_node("Add", [f"{own}.{first}", f"{own}.{second}"], [f"{own}.{made}"]))

    def add_multiple(first: str, factor: int, second: str, made: str, bias: list[str]) -> None:
        factors = graph.constant(f"{own}.{made}.factor", np.full((channels, 1, 1, 1), factor, dtype=np.float32))
        name = f"{made}.multiple"
        taken, given = [f"{own}.{second}", factors, *bias], [f"{own}.{name}"]
        nodes.append(helper.make_node("Conv", taken, given, given[0], group=channels, kernel_shape=[1, 1]))
        add(first, name, made)

    add("1", "2", "a")
    add_multiple("1", -1, "2", "b", [])
    add("3", "4", "c")
    add_multiple("3", -1, "4", "d", [])
    add("0", "a", "first")
    add("first", "c", "row0")
    add_multiple("b", 2, "d", "row1", biases)
    add_multiple("a", 4, "c", "row2", biases)
    add_multiple("b", 8, "d", "last", [])
    add("last", "5", "row3")
    return nodes


def _interleave(own: str, node: NodeProto, graph: GraphView, channels: int) -> list[NodeProto]:
    """Return what puts rows 0 to 3 of every four one below the other, and cuts off what is below the picture."""
    from onnx import helper

    x, whole = node.input[0], graph.constant(f"{own}.whole", [0, channels, -1])
    start, rows = graph.constant(f"{own}.start", [0]), graph.constant(f"{own}.axis", [2])
    beside = [f"{own}.row{i}" for i in range(TOGETHER)]
    return [
        helper.make_node("Concat", beside, [f"{own}.beside"], axis=3),
        helper.make_node("Shape", [x], [f"{own}.height"], start=2, end=3),
        helper.make_node("Shape", [x], [f"{own}.width"], start=3, end=4),
        helper.make_node("Concat", [whole, f"{own}.width"], [f"{own}.shape"], axis=0),
        helper.make_node("Reshape", [f"{own}.beside", f"{own}.shape"], [f"{own}.below"]),
        helper.make_node("Slice", [f"{own}.below", start, f"{own}.height", rows], [node.output[0]]),
    ]
