"""Which initializer of a traced graph holds which weight of the module: checked by value, not by name alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import numpy as np
import onnx_ir as ir
from torch import Tensor

from latentrt.engines.bundle.weight_map import AS_NAMED, TRANSPOSED, GraphWeight, GraphWeights
from latentrt.engines.lora.names import Part
from latentrt.export.networks.streamed_weights import StoredWeights

NAMED = frozenset(get_args(Part))  # the components whose weights can be changed later: those that LoRAs are made for
# Which parameters the nodes read, by type: matrices as second inputs, and biases and the numbers of normalizations.
READ: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("Conv", "Gemm", "LayerNormalization", "GroupNormalization"), ("", "weight", "bias")),
    "MatMul": ("", "weight"),
    "Add": ("bias", "bias"),
}
WRAPPED = "model."  # how `modules` names the checkpoint's own network


def name_weights(model: ir.Model, weights: StoredWeights) -> GraphWeights:
    """Find the weights of a network's layers in its graph, whose nodes are named for modules.

    Where layers share an initializer, because their weights are equal, each gets one of its own.
    """
    names = {name.removeprefix(WRAPPED): name for name in weights.names}
    found: dict[str, GraphWeight] = {}
    for node in list(model.graph):
        module = (node.name or "").rpartition("/")[0]
        for place, parameter in enumerate(READ.get(node.op_type, ())):
            name = f"{module}.{parameter}"
            value = node.inputs[place] if place < len(node.inputs) else None
            if name in found or name not in names or value is None or not value.is_initializer():
                continue
            weight = weights.read(names[name])
            layout = _layout(value, weight)
            if layout is not None:
                own = _own(model.graph, node, place, parameter)
                found[name] = GraphWeight(initializer=str(own.name), layout=layout, shape=tuple(weight.shape))
    return GraphWeights(weights=found)


def _layout(value: ir.Value, tensor: Tensor) -> str | None:
    """Return how an initializer holds a weight, None if it does not."""
    assert value.const_value is not None
    stored, weight = value.const_value.numpy(), tensor.detach().numpy()
    if stored.shape == weight.shape and np.array_equal(stored, weight):
        return AS_NAMED
    if weight.ndim == 2 and stored.shape == weight.shape[::-1] and np.array_equal(stored, weight.T):
        return TRANSPOSED
    return None


def _own(graph: ir.Graph, node: ir.Node, place: int, parameter: str) -> ir.Value:
    """Return an initializer that only this node reads, in place of one that others read too."""
    value = node.inputs[place]
    assert value is not None
    if len(value.uses()) == 1:
        return value
    own = ir.Value(name=f"{node.name}.{parameter}", shape=value.shape, type=value.type, const_value=value.const_value)
    graph.register_initializer(own)
    node.replace_input_with(place, own)
    return own
