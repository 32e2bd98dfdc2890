"""Attention as ONNX Runtime's kernels read it: `MultiHeadAttention`, whose heads stand side by side in each token."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from latentrt.engines.graphs.edits import MICROSOFT, GraphView

if TYPE_CHECKING:
    from onnx import NodeProto

SPLIT_HEADS = [0, 2, 1, 3]  # (rows, tokens, heads, width) to (rows, heads, tokens, width), and back
HEADS_FIRST, TOKENS_FIRST = 2, 1  # the axis of tokens in each
NORMS = ("RMSNormalization", "LayerNormalization")


class Heads(msgspec.Struct, frozen=True, kw_only=True, eq=False):
    """A tensor (rows, tokens, heads, width). nodes: what makes it, as far as the graph does not hold it"""

    name: str
    count: int
    nodes: tuple[NodeProto, ...] = ()


def multi_head_attention(node: NodeProto, graph: GraphView) -> list[NodeProto]:
    """Return the nodes for one Attention without a mask, whose heads are split and joined around it.

    Between splitting and attention there may be what treats each head of a token alone, and what puts tokens of
    several streams one after the other, as in Stable Diffusion 3: both are done on tokens whose heads stand together.
    """
    from onnx import helper

    plain = {"scale", "is_causal", "softcap", "qk_matmul_output_mode"}
    attributes = {a.name: a for a in node.attribute}
    dressed = len([name for name in node.input if name]) != 3 or len(node.output) != 1 or not set(attributes) <= plain
    if dressed or any(attributes[name].i or attributes[name].f for name in set(attributes) - {"scale"}):
        return []
    split = [found for name in node.input if (found := _tokens_first(name, graph)) is not None]
    after = graph.takers.get(node.output[0], [])
    if len(split) != 3 or len({each.count for each in split}) != 1 or len(after) != 1 or not _swaps_heads(after[0]):
        return []
    own, count = f"{node.output[0]}.host", split[0].count
    joined = graph.constant(f"{own}.joined", [0, 0, -1])
    apart = graph.constant(f"{own}.apart", [0, 0, count, -1])
    names = [f"{own}.{which}" for which in ("query", "key", "value")]
    back = after[0]
    scale = {"scale": attributes["scale"].f} if "scale" in attributes else {}
    nodes = [made for each in split for made in each.nodes]
    nodes += [helper.make_node("Reshape", [each.name, joined], [made]) for each, made in zip(split, names, strict=True)]
    nodes.append(
        helper.make_node("MultiHeadAttention", names, [f"{own}.out"], own, domain=MICROSOFT, num_heads=count, **scale)
    )
    together = back.output[0]
    back.output[0] = f"{own}.unused"  # nobody takes it: it goes with the other nodes that nobody needs
    nodes.append(helper.make_node("Reshape", [f"{own}.out", apart], [together]))
    return nodes


def _tokens_first(name: str, graph: GraphView) -> Heads | None:
    """Return the tensor (rows, tokens, heads, width) of which one of (rows, heads, tokens, width) is the transpose."""
    node = graph.makers.get(name)
    if node is None:
        return None
    if _swaps_heads(node):
        count = _heads(node.input[0], graph)
        return None if count is None else Heads(name=node.input[0], count=count)
    if len(graph.takers[name]) != 1:
        return None
    axis = next((int(a.i) for a in node.attribute if a.name == "axis"), -1)
    if node.op_type in NORMS and len(node.output) == 1 and axis in (-1, 3):
        return _made(node, graph, taken=1, axis=-1)
    if node.op_type == "Concat" and axis in (HEADS_FIRST, HEADS_FIRST - 4):
        return _made(node, graph, taken=len(node.input), axis=TOKENS_FIRST)
    return None


def _made(node: NodeProto, graph: GraphView, *, taken: int, axis: int) -> Heads | None:
    """Return what a node makes of its first inputs when these have their tokens first."""
    from onnx import helper

    inner = [found for name in node.input[:taken] if (found := _tokens_first(name, graph)) is not None]
    if len(inner) != taken or len({each.count for each in inner}) != 1:
        return None
    same = {a.name: helper.get_attribute_value(a) for a in node.attribute if a.name != "axis"}
    name = f"{node.output[0]}.tokens"
    takes = [*(each.name for each in inner), *node.input[taken:]]
    made = helper.make_node(node.op_type, takes, [name], name, axis=axis, **same)
    return Heads(name=name, count=inner[0].count, nodes=(*(each for one in inner for each in one.nodes), made))


def _swaps_heads(node: NodeProto) -> bool:
    return node.op_type == "Transpose" and [list(a.ints) for a in node.attribute] == [SPLIT_HEADS]


def _heads(name: str, graph: GraphView) -> int | None:
    """Return the third axis of a tensor that is made by splitting heads, where the graph holds it."""
    split = graph.made_by(name, "Reshape")
    shape = [] if split is None else graph.numbers(split.input[1])
    return shape[2] if len(shape) == 4 else None
