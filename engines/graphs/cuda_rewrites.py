"""Graphs in the words of ONNX Runtime's CUDA kernels: pictures with their channels last, from end to end.

- `Conv` becomes `NhwcConv`: cuDNN's fast kernels read channels last, and would lay every picture out anew twice.
- `GroupNormalization` has no kernel there and is taken apart into some thirty passes over memory. `GroupNorm` is one,
  takes channels last alone, and the SiLU behind it too.
  Where a graph has groups that it does not compute (of an odd number of channels), pictures stay as they are.
- What lies between them (sums, concatenations, upsampling, padding) is carried over, so that a picture is laid out
  anew where it enters and where it leaves, and nowhere else.
- `Attention` becomes `MultiHeadAttention`, which takes its heads side by side: no transposition around it.
- Sums go into the normalisations behind them, the bias of a convolution or a product among what is added:
  `SkipGroupNorm` and `SkipLayerNormalization` give both. ONNX Runtime is told to sum rows in float32
  (`enable_skip_layer_norm_strict_mode`).
- A gated GELU becomes `BiasSplitGelu`: one pass instead of four.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from latentrt.engines.graphs.attention import multi_head_attention
from latentrt.engines.graphs.channels_last import ChannelsLast, axis_of, ranks_of
from latentrt.engines.graphs.edits import MICROSOFT, GraphView

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# Half the widths that BiasSplitGelu was compiled for (bias_split_gelu_impl.cu, ONNX Runtime 1.31.1).
SPLIT_WIDTHS = frozenset({1280, 2560, 3072, 5120, 6144})


def use_cuda_kernels(model: ModelProto) -> None:
    """Replace operators in a graph by those that ONNX Runtime has fast CUDA kernels for.

    Weights of convolutions are transposed by nodes, which ONNX Runtime folds when it saves what it optimised. What is
    not of the form expected stays as it is.
    """
    from onnx import helper

    ranks = ranks_of(model)
    _replace(model, {"Attention": multi_head_attention, "Mul": _gated_gelu})
    _replace_summed_norms(model)
    pictures = ChannelsLast(model, ranks)
    if pictures.suits():
        pictures.rewrite()
    if all(found.domain != MICROSOFT for found in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))


def _replace(model: ModelProto, makers: Mapping[str, Callable[[NodeProto, GraphView], list[NodeProto]]]) -> None:
    """Put what a function makes of each node of an operator in its place, where it makes anything."""
    graph = GraphView.of(model)
    made = {node.output[0]: makers[node.op_type](node, graph) for node in model.graph.node if node.op_type in makers}
    graph.replace({name: nodes for name, nodes in made.items() if nodes})


def _replace_summed_norms(model: ModelProto) -> None:
    """Replace sums of rows, of a product with its bias and what went around it, and their normalisation."""
    graph = GraphView.of(model)
    instead: dict[str, list[NodeProto]] = {}
    for node in model.graph.node:
        takers = graph.takers.get(node.output[0], []) if node.op_type == "Add" else []
        norms = [taker for taker in takers if taker.op_type == "LayerNormalization" and axis_of(taker, -1) in (-1, 2)]
        parts = _product_and_rest(node, graph) if len(norms) == 1 and len(norms[0].input) == 3 else None
        if parts is not None:
            (norm,) = norms
            more = len(takers) > 1 or node.output[0] in {output.name for output in model.graph.output}
            instead[node.output[0]] = [_summed_norm(norm, parts, node.output[0] if more else "")]
            instead[norm.output[0]] = []
    graph.replace(instead)


def _product_and_rest(node: NodeProto, graph: GraphView) -> tuple[str, str, str] | None:
    """Return the product, its bias, and the rest, of product + bias + rest; None where a sum is of something else."""
    for biased, rest in (node.input, reversed(node.input)):
        inner = graph.made_by(biased, "Add")
        for product, bias in () if inner is None else (inner.input, reversed(inner.input)):
            tensor, sole = graph.weights(bias), len(graph.takers[biased]) == 1
            if tensor is not None and len(tensor.dims) == 1 and sole and graph.made_by(product, "MatMul") is not None:
                return product, bias, rest
    return None


def _summed_norm(norm: NodeProto, parts: tuple[str, str, str], total: str) -> NodeProto:
    from onnx import helper

    product, bias, rest = parts
    epsilon = next((a.f for a in norm.attribute if a.name == "epsilon"), 1e-5)
    takes, gives = [product, rest, *norm.input[1:], bias], [norm.output[0], *(["", "", total] if total else [])]
    return helper.make_node(
        "SkipLayerNormalization", takes, gives, f"{norm.output[0]}.sum", domain=MICROSOFT, epsilon=epsilon
    )


def _gated_gelu(node: NodeProto, graph: GraphView) -> list[NodeProto]:
    """Return the node for left * gelu(right), where (left, right) are the halves of a sum with a bias."""
    from onnx import helper

    for left, name in (node.input, reversed(node.input)):
        gelu, halves = graph.made_by(name, "Gelu"), graph.made_by(left, "Split")
        if gelu is None or halves is None or list(halves.output) != [left, gelu.input[0]]:
            continue
        biased = graph.made_by(halves.input[0], "Add")
        for rows, bias in () if biased is None else (biased.input, reversed(biased.input)):
            width = graph.length(bias) or 0
            exact = not any(a.name == "approximate" and a.s != b"none" for a in gelu.attribute)
            if exact and axis_of(halves) in (-1, 2) and width % 2 == 0 and width // 2 in SPLIT_WIDTHS:
                return [
                    helper.make_node(
                        "BiasSplitGelu", [rows, bias], [node.output[0]], f"{node.name}.cuda", domain=MICROSOFT
                    )
                ]
    return []
