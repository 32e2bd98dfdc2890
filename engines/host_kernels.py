"""Graphs in the words of ONNX Runtime's own fast CPU kernels, where the standard's operators have slow ones.

Two operators, by what was measured on them (benchmarks/README.md):

- `GroupNormalization` has no kernel there and is taken apart into a dozen passes over memory. `InstanceNormalization`
  has one, and is the same thing on pictures whose channels stand together in their groups.
- `Attention` writes all its weights to memory. `MultiHeadAttention` works on blocks that stay in the cache, and takes
  its heads side by side, as the layers before and behind it have them: four transpositions fewer.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from latentrt.engines.graph_view import GraphView

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

MICROSOFT = "com.microsoft"
GROUPS_SINCE = 21  # from this opset on GroupNormalization scales by channel, before by group
SPLIT_HEADS = [0, 2, 1, 3]  # (rows, tokens, heads, width) to (rows, heads, tokens, width), and back


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
            made = _attention(node, graph)
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
            name=f"{node.name}.host",
            epsilon=epsilon,
        ),
        helper.make_node("Reshape", [f"{own}.normal", channel_axes], [f"{own}.split"]),
        helper.make_node("Unsqueeze", [scale, last], [f"{own}.scale"]),
        helper.make_node("Unsqueeze", [bias, last], [f"{own}.bias"]),
        helper.make_node("Mul", [f"{own}.split", f"{own}.scale"], [f"{own}.scaled"]),
        helper.make_node("Add", [f"{own}.scaled", f"{own}.bias"], [f"{own}.moved"]),
        helper.make_node("Reshape", [f"{own}.moved", f"{own}.shape"], [node.output[0]]),
    ]


def _attention(node: NodeProto, graph: GraphView) -> list[NodeProto]:
    """Return the nodes for one Attention without a mask, whose heads are split and joined around it."""
    from onnx import helper

    plain = {"scale", "is_causal", "softcap", "qk_matmul_output_mode"}
    attributes = {a.name: a for a in node.attribute}
    dressed = len([name for name in node.input if name]) != 3 or len(node.output) != 1 or not set(attributes) <= plain
    if dressed or any(attributes[name].i or attributes[name].f for name in set(attributes) - {"scale"}):
        return []
    split = [_before_transpose(name, graph) for name in node.input]
    heads = {_heads(name, graph) for name in split}
    after = graph.takers.get(node.output[0], [])
    if None in heads or len(heads) != 1 or len(after) != 1 or not _swaps_heads(after[0]):
        return []
    own, (count,) = f"{node.output[0]}.host", heads
    joined = graph.constant(f"{own}.joined", [0, 0, -1])
    apart = graph.constant(f"{own}.apart", [0, 0, int(count or 0), -1])
    names = [f"{own}.{which}" for which in ("query", "key", "value")]
    back = after[0]
    scale = {"scale": attributes["scale"].f} if "scale" in attributes else {}
    nodes = [helper.make_node("Reshape", [name, joined], [made]) for name, made in zip(split, names, strict=True)]
    nodes.append(
        helper.make_node(
            "MultiHeadAttention", names, [f"{own}.out"], f"{node.name}.host", domain=MICROSOFT, num_heads=count, **scale
        )
    )
    together = back.output[0]
    back.output[0] = f"{own}.unused"  # nobody takes it: it goes with the other nodes that nobody needs
    nodes.append(helper.make_node("Reshape", [f"{own}.out", apart], [together]))
    return nodes


def _before_transpose(name: str, graph: GraphView) -> str:
    """Return what is transposed from (rows, tokens, heads, width) to make a tensor, or nothing."""
    node = graph.made_by(name, "Transpose")
    return node.input[0] if node is not None and _swaps_heads(node) else ""


def _swaps_heads(node: NodeProto) -> bool:
    return node.op_type == "Transpose" and [list(a.ints) for a in node.attribute] == [SPLIT_HEADS]


def _heads(name: str, graph: GraphView) -> int | None:
    """Return the third axis of a tensor that is made by splitting heads, where the graph holds it."""
    split = graph.made_by(name, "Reshape")
    shape = [] if split is None else graph.numbers(split.input[1])
    return shape[2] if len(shape) == 4 else None
