"""Graphs in the words of ONNX Runtime's own fast CPU kernels, where the standard's operators have slow ones.

Two operators, by what was measured on them (benchmarks/README.md):

- `GroupNormalization` has no kernel there and is taken apart into a dozen passes over memory. `InstanceNormalization`
  has one, and is the same thing on pictures whose channels stand together in their groups.
- `Attention` writes all its weights to memory. `MultiHeadAttention` works on blocks that stay in the cache, and takes
  its heads side by side, as the layers before and behind it have them: four transpositions fewer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from latentrt.engines.graphs.attention import multi_head_attention
from latentrt.engines.graphs.edits import MICROSOFT, GraphView, taken
from latentrt.engines.graphs.locate_weights import GraphValues
from latentrt.engines.spec import Array

if TYPE_CHECKING:
    from onnx import GraphProto, ModelProto, NodeProto, TensorProto

GROUPS_SINCE = 21  # from this opset on GroupNormalization scales by channel, before by group


def use_host_kernels(model: ModelProto) -> int:
    """Replace operators in a graph by ones that ONNX Runtime has fast CPU kernels for. Returns how many.

    The graph computes in float32. What is not of the form expected stays as it is.
    """
    from onnx import helper

    graph = GraphView.of(model)
    opset = next((found.version for found in model.opset_import if found.domain == ""), 0)
    instead: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type == "GroupNormalization" and opset >= GROUPS_SINCE:
            made = _normalization(node, graph)
        elif node.op_type == "Attention":
            made = multi_head_attention(node, graph)
        else:
            continue
        if made:
            instead[node.output[0]] = made
    graph.replace(instead)
    if instead and all(found.domain != MICROSOFT for found in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return len(instead)


def _normalization(node: NodeProto, graph: GraphView) -> list[NodeProto]:
    """Return the nodes for one GroupNormalization: y = scale * (x - mean) / deviation + bias, by groups of channels."""
    from onnx import helper

    attributes = {a.name: a for a in node.attribute}
    channels, groups = graph.length(node.input[1]), attributes["num_groups"].i
    if channels is None:
        return []
    x, scale, bias = node.input
    own = f"{node.output[0]}.host"
    unit, none = np.ones(groups, dtype=np.float32), np.zeros(groups, dtype=np.float32)
    by_group, by_channel = graph.constant(f"{own}.groups", [0, groups, -1]), [0, channels, -1]
    constants = [graph.constant(f"{own}.unit", unit), graph.constant(f"{own}.none", none)]
    last, channel_axes = graph.constant(f"{own}.last", [1]), graph.constant(f"{own}.channels", by_channel)
    epsilon = attributes["epsilon"].f if "epsilon" in attributes else 1e-5
    return [
        helper.make_node("Shape", [x], [f"{own}.shape"]),
        helper.make_node("Reshape", [x, by_group], [f"{own}.grouped"]),
        helper.make_node(
            "InstanceNormalization",
            [f"{own}.grouped", *constants],
            [f"{own}.normal"],
            name=own,
            epsilon=epsilon,
        ),
        helper.make_node("Reshape", [f"{own}.normal", channel_axes], [f"{own}.split"]),
        helper.make_node("Unsqueeze", [scale, last], [f"{own}.scale"]),
        helper.make_node("Unsqueeze", [bias, last], [f"{own}.bias"]),
        helper.make_node("Mul", [f"{own}.split", f"{own}.scale"], [f"{own}.scaled"]),
        helper.make_node("Add", [f"{own}.scaled", f"{own}.bias"], [f"{own}.moved"]),
        helper.make_node("Reshape", [f"{own}.moved", f"{own}.shape"], [node.output[0]]),
    ]


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
    drop_unused_weights(model.graph)
    return len(instead)


def _convolution(resize: NodeProto, graph: GraphView, values: GraphValues) -> NodeProto | None:
    """Return the one 3 x 3 convolution behind an upsampling, whose weights the graph holds."""
    takers = graph.takers.get(resize.output[0], []) if resize.op_type == "Resize" else []
    if len(takers) != 1:
        return None
    return takers[0] if three_by_three(takers[0], values) else None


def three_by_three(node: NodeProto, values: GraphValues) -> list[Array]:
    """Return weights, and bias if there is one, of a 3 x 3 convolution that keeps a picture's size; else nothing."""
    if node.op_type != "Conv" or THREE_BY_THREE | _attributes(node) != THREE_BY_THREE:
        return []
    found = [stored.values for name in node.input[1:] if (stored := values.get(name)) is not None]
    return found if len(found) == len(node.input) - 1 and found[0].shape[2:] == (3, 3) else []


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
    weights, *biases = three_by_three(convolution, values)
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


def drop_unused_weights(graph: GraphProto) -> None:
    """Remove the initializers of a graph that no node takes."""
    used = {name for node in graph.node for name in taken(node)}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    if len(kept) < len(graph.initializer):
        del graph.initializer[:]
        graph.initializer.extend(kept)
