"""What ONNX Runtime's CUDA operators compute, in the standard's, by their documented definitions (ContribOperators.md).

So that a graph written for CUDA also runs where there is no CUDA.
"""

from __future__ import annotations

from typing import Any

import onnx
from onnx import helper, parser

from latentrt.engines.graphs.edits import MICROSOFT

STANDARD = "standard"
FUNCTIONS = """
<domain: "standard", opset_import: ["" : 23]>
NhwcConv <kernel_shape, pads, strides, dilations> (x, w, b) => (y) {
    first = Transpose <perm = [0, 3, 1, 2]> (x)
    weights = Transpose <perm = [0, 3, 1, 2]> (w)
    made = Conv <kernel_shape: ints = @kernel_shape, pads: ints = @pads, strides: ints = @strides,
                 dilations: ints = @dilations> (first, weights, b)
    y = Transpose <perm = [0, 2, 3, 1]> (made)
}
<domain: "standard", opset_import: ["" : 23]>
GroupNorm <groups, epsilon> (x, gamma, beta) => (y) {
    first = Transpose <perm = [0, 3, 1, 2]> (x)
    scale = CastLike (gamma, x)
    bias = CastLike (beta, x)
    made = GroupNormalization <num_groups: int = @groups, epsilon: float = @epsilon> (first, scale, bias)
    y = Transpose <perm = [0, 2, 3, 1]> (made)
}
<domain: "standard", opset_import: ["" : 23, "standard" : 1]>
GroupNormSilu <groups, epsilon> (x, gamma, beta) => (y) {
    made = standard.GroupNorm <groups: int = @groups, epsilon: float = @epsilon> (x, gamma, beta)
    gate = Sigmoid (made)
    y = Mul (made, gate)
}
<domain: "standard", opset_import: ["" : 23, "standard" : 1]>
SkipGroupNorm <groups, epsilon> (x, gamma, beta, skip) => (y, sum) {
    shape = Shape (x)
    ends = Constant <value_ints = [0, 3]> ()
    few = Gather (shape, ends)
    one = Constant <value_ints = [1]> ()
    rows, channels = Split <axis = 0, num_outputs = 2> (few)
    size = Size (skip)
    whole = Size (x)
    same = Equal (size, whole)
    broadcast = Concat <axis = 0> (rows, one, one, channels)
    kept = Where (same, shape, broadcast)
    spread = Reshape (skip, kept)
    sum = Add (x, spread)
    y = standard.GroupNorm <groups: int = @groups, epsilon: float = @epsilon> (sum, gamma, beta)
}
<domain: "standard", opset_import: ["" : 23, "standard" : 1]>
SkipGroupNormSilu <groups, epsilon> (x, gamma, beta, skip) => (y, sum) {
    made, sum = standard.SkipGroupNorm <groups: int = @groups, epsilon: float = @epsilon> (x, gamma, beta, skip)
    gate = Sigmoid (made)
    y = Mul (made, gate)
}
<domain: "standard", opset_import: ["" : 23, "standard" : 1]>
SkipGroupNormBias <groups, epsilon> (x, gamma, beta, skip, bias) => (y, sum) {
    biased = Add (x, bias)
    y, sum = standard.SkipGroupNorm <groups: int = @groups, epsilon: float = @epsilon> (biased, gamma, beta, skip)
}
<domain: "standard", opset_import: ["" : 23, "standard" : 1]>
SkipGroupNormBiasSilu <groups, epsilon> (x, gamma, beta, skip, bias) => (y, sum) {
    biased = Add (x, bias)
    y, sum = standard.SkipGroupNormSilu <groups: int = @groups, epsilon: float = @epsilon> (biased, gamma, beta, skip)
}
<domain: "standard", opset_import: ["" : 23]>
SkipLayerNormalization <epsilon> (x, skip, gamma, beta, bias) => (y, mean, deviation, sum) {
    biased = Add (x, bias)
    sum = Add (biased, skip)
    y, mean, deviation = LayerNormalization <epsilon: float = @epsilon> (sum, gamma, beta)
}
<domain: "standard", opset_import: ["" : 23]>
BiasSplitGelu (x, bias) => (y) {
    biased = Add (x, bias)
    left, right = Split <axis = -1, num_outputs = 2> (biased)
    gate = Gelu (right)
    y = Mul (left, gate)
}
"""


def standard(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a graph in which functions of the standard's operators stand for those of CUDA alone."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    functions = [parser.parse_function(f"<domain{text}") for text in FUNCTIONS.split("<domain")[1:]]
    outputs = {function.name: len(function.output) for function in functions}
    for node in copy.graph.node:
        if node.domain == MICROSOFT and node.op_type in outputs:
            _use_function(node)
            made = [*node.output, *[""] * (outputs[node.op_type] - len(node.output))]
            del node.output[:]
            node.output.extend(name or f"{made[0]}.unused.{number}" for number, name in enumerate(made))
    copy.functions.extend(functions)
    copy.opset_import.append(helper.make_opsetid(STANDARD, 1))
    return copy


def _use_function(node: Any) -> None:
    attributes = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    node.domain = STANDARD
    if node.op_type in ("GroupNorm", "SkipGroupNorm"):
        assert attributes.pop("channels_last") == 1
        node.op_type += "Bias" if len(node.input) == 5 else ""
        node.op_type += "Silu" if attributes.pop("activation") else ""
    if node.op_type == "NhwcConv":
        assert attributes.pop("group", 1) == 1
        attributes.pop("auto_pad", None)
    del node.attribute[:]
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
