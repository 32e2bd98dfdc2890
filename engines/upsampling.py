"""A picture doubled and convolved 3 x 3, as four convolutions 2 x 2 of the small one: 16 products instead of 36.

A pixel doubled by its nearest neighbour stands four times beside itself, so that each of the four pixels that come of
one sees only 2 x 2 different ones, with the sums of the weights that fall on each. In float32 the result differs by
its rounding alone.

    row 2 i     = w0 x[i - 1] + (w1 + w2) x[i]
    row 2 i + 1 = (w0 + w1) x[i] + w2 x[i + 1]                  and columns likewise
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentrt.engines.graph_view import GraphView, taken
from latentrt.engines.spec import Array
from latentrt.engines.weight_places import GraphValues

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

DOUBLED = [1, 1, 2, 2]
THREE_BY_THREE = {
    "kernel_shape": [3, 3],
    "pads": [1, 1, 1, 1],
    "strides": [1, 1],
    "dilations": [1, 1],
    "group": 1,
    "auto_pad": 0,
}
NEAREST = {"mode": b"nearest", "coordinate_transformation_mode": b"asymmetric", "nearest_mode": b"floor"}


def split_upsampling(model: ModelProto, path: Path) -> int:
    """Replace every nearest doubling with a 3 x 3 convolution behind it. Returns how many.

    path: the file that the graph was read from, beside which its weights lie
    A UNet that takes any size computes the sizes that it upsamples to, and stays as it is: a branch for those that are
    doubled is refused by ONNX Runtime when it reads back what it saved (names of one branch stand in the other too).
    """
    graph, values = GraphView.of(model), GraphValues(model, path)
    instead: dict[str, list[NodeProto]] = {}
    for resize in model.graph.node:
        convolution = _convolution(resize, graph, values)
        if convolution is None or _attributes(resize) | NEAREST != _attributes(resize):
            continue
        if len(resize.input) == 3 and graph.numbers(resize.input[2]) == DOUBLED:
            nodes, tensors = _phases(resize.input[0], convolution, values)
            model.graph.initializer.extend(tensors)
            instead[convolution.output[0]] = nodes
    graph.replace(instead)
    _drop_unused_weights(model.graph)
    return len(instead)


def _convolution(resize: NodeProto, graph: GraphView, values: GraphValues) -> NodeProto | None:
    """Return the one 3 x 3 convolution behind an upsampling, whose weights the graph holds."""
    takers = graph.takers.get(resize.output[0], []) if resize.op_type == "Resize" else []
    if len(takers) != 1 or takers[0].op_type != "Conv":
        return None
    (node,) = takers
    weights = [values.get(name) for name in node.input[1:]]
    fits = weights[0] is not None and weights[0].values.shape[2:] == (3, 3) and None not in weights
    return node if fits and THREE_BY_THREE | _attributes(node) == THREE_BY_THREE else None


def _attributes(node: NodeProto) -> dict[str, Any]:
    from onnx import helper

    found = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
    if found.get("auto_pad") == b"NOTSET":
        found["auto_pad"] = 0
    return found


def phase_weights(weights: Array, *, row: int, column: int) -> Array:
    """Return what a 3 x 3 convolution is for one of the four pixels that one becomes.

    weights: (out, in, 3, 3); row, column: 0 or 1, the pixel; returns (out, in, 2, 2)
    """
    for axis, second in ((2, row), (3, column)):
        first, middle, last = (np.take(weights, i, axis) for i in range(3))
        parts = [first + middle, last] if second else [first, middle + last]
        weights = np.stack(parts, axis)
    return weights


def _phases(x: str, convolution: NodeProto, values: GraphValues) -> tuple[list[NodeProto], list[TensorProto]]:
    """Return the four convolutions and what lays their pixels side by side, and the weights of all."""
    from onnx import helper, numpy_helper

    output = convolution.output[0]
    own = f"{output}.phases"
    weights, *biases = (stored.values for name in convolution.input[1:] if (stored := values.get(name)) is not None)
    nodes, tensors, outputs = [], [], []
    tensors += [numpy_helper.from_array(np.array(bias), f"{own}.bias") for bias in biases]
    for row, column in ((0, 0), (0, 1), (1, 0), (1, 1)):
        name = f"{own}.{row}{column}"
        tensors.append(numpy_helper.from_array(phase_weights(weights, row=row, column=column), f"{name}.weight"))
        takes = [x, f"{name}.weight", *(tensor.name for tensor in tensors[: len(biases)])]
        pads = [1 - row, 1 - column, row, column]
        nodes.append(helper.make_node("Conv", takes, [name], name, kernel_shape=[2, 2], pads=pads))
        outputs.append(name)
    nodes.append(helper.make_node("Concat", outputs, [f"{own}.all"], axis=1))
    nodes.append(helper.make_node("DepthToSpace", [f"{own}.all"], [output], blocksize=2, mode="DCR"))
    return nodes, tensors


def _drop_unused_weights(graph: GraphProto) -> None:
    used = {name for node in graph.node for name in taken(node)}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)
