"""Which initializer of a traced graph holds which weight of the module, as far as it can be changed there."""

from __future__ import annotations

from collections.abc import Mapping
from typing import get_args

import onnx_ir as ir

from latentrt.engines.bundle.weight_map import GraphWeight, GraphWeights
from latentrt.engines.lora.names import Part
from latentrt.export.networks.streamed_weights import StoredWeights
from latentrt.export.networks.weight_places import Places

NAMED = frozenset(get_args(Part))  # the components whose weights can be changed later: those that LoRAs are made for
# Which parameters the nodes read, by type: matrices as second inputs, and biases and the numbers of normalizations.
READ: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("Conv", "Gemm", "LayerNormalization", "GroupNormalization"), ("", "weight", "bias")),
    **dict.fromkeys(("MatMul", "RMSNormalization"), ("", "weight")),
    "Add": ("bias", "bias"),
}
WRAPPED = "model."  # how `modules` names the checkpoint's own network


def name_weights(model: ir.Model, weights: StoredWeights, places: Places) -> GraphWeights:
    """Find the weights of a network's layers in its graph, whose nodes are named for modules.

    Where layers share a weight, each gets an initializer of its own.
    """
    names = {name.removeprefix(WRAPPED): name for name in weights.names}
    found: dict[str, GraphWeight] = {}
    for node in list(model.graph):
        module = (node.name or "").rpartition("/")[0]
        for at, parameter in enumerate(READ.get(node.op_type, ())):
            name = f"{module}.{parameter}"
            value = node.inputs[at] if at < len(node.inputs) else None
            if name in found or name not in names or value is None or not value.is_initializer():
                continue
            place, shape = places.get(str(value.name)), tuple(weights.shape(names[name]))
            layout = place.layout(shape) if place and place.weight == weights.first(names[name]) else None
            if layout is not None:
                own = _own(model.graph, node, at, parameter)
                found[name] = GraphWeight(initializer=str(own.name), layout=layout, shape=shape)
    return GraphWeights(weights=found)


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
