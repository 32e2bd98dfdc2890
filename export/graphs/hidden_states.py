"""What optimum gives of every layer of SDXL's text encoders, as the one output that ours have: what clip-skip reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from onnx import GraphProto

EACH = "hidden_states."  # with the number of layers behind it: 0 is the tokens' own
SKIPPED = "skipped_hidden_states"


def join_hidden_states(graph: GraphProto) -> None:
    """Add the states that the last 1, 2, … layers did not change yet, (batch, layers - 1, tokens, width), in place.

    They are what `networks.modules.TextEncoder` gives where no norm follows. A graph without them stays as it is.
    """
    from onnx import helper

    types = {output.name: output.type.tensor_type.elem_type for output in graph.output}
    layers = sum(name.startswith(EACH) for name in types) - 1
    names = [f"{EACH}{layer}" for layer in range(layers - 1, 0, -1)]
    if not names or SKIPPED in types or not set(names) <= set(types):
        return
    graph.node.append(helper.make_node("Constant", [], [f"{SKIPPED}.axis"], value_ints=[1]))
    for name in names:
        graph.node.append(helper.make_node("Unsqueeze", [name, f"{SKIPPED}.axis"], [f"{SKIPPED}.{name}"]))
    graph.node.append(helper.make_node("Concat", [f"{SKIPPED}.{name}" for name in names], [SKIPPED], axis=1))
    graph.output.append(helper.make_tensor_value_info(SKIPPED, types[names[0]], [None] * 4))
