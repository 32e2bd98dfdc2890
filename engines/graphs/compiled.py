"""What a device compiles of a component: its graph with what a picture needs before and behind it, by its role."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from latentrt.engines.bundle.manifest import LatentSpec, Role
from latentrt.engines.graphs.controlnet_stage import fuse_control
from latentrt.engines.graphs.denoise_stage import fuse_stage
from latentrt.engines.graphs.edits import append_embedding_input, append_pixel_tail, prepend_state_head
from latentrt.engines.tensor_names import STATE_ROWS

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto, TypeProto

# The roles whose graphs become part of the denoise stage, which keeps its state in float32.
FUSIONS: Mapping[Role, Callable[..., ModelProto]] = {"denoiser": fuse_stage, "controlnet": fuse_control}
DECODERS: tuple[Role, ...] = ("decoder", "tiny_decoder")


def on_device(
    model: ModelProto, role: Role, latents: LatentSpec, *, state_rows: int = STATE_ROWS, learned: int | None = None
) -> ModelProto:
    """Return the graph of a component for a device on which the sampler's state stays; it may be `model`, changed.

    learned: rows of the input that learned words are looked up in, None for any number
    """
    if role in FUSIONS:
        return FUSIONS[role](model, state_rows=state_rows)
    if role in DECODERS:
        append_pixel_tail(model)
        prepend_state_head(model, state_rows, latents)
    append_embedding_input(model, rows=learned)
    return model


def scale_queries(model: ModelProto) -> None:
    """Scale the queries of fp16 attention, by one factor that is rounded once, and nothing else.

    TensorRT's parser multiplies both queries and keys by the root of an `Attention`'s scale, rounded to fp16; where a
    node names none it computes that from the head size, in fp16, in three operations. Scores are up to 6e-4 too large.
    Queries that come from 8 bits take the factor into their scale, so that nothing stands between the two.
    One factor of the queries errs by 2e-4 at most, and not at all with heads of 64, as SDXL's are
    (tests/test_attention_scale.py). A node that names no scale, and whose head size the graph does not tell, is left
    as it is. It must come before the graph is fused into the denoise stage, in which sizes are not told.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    known = {info.name: info.type.tensor_type for info in (*inferred.value_info, *inferred.input)}
    scales = _scales_of_8_bits(model)
    nodes = []
    for number, node in enumerate(model.graph.node):
        queries = known.get(node.input[0]) if node.op_type == "Attention" else None
        scale = _scale(node, queries) if queries is not None and queries.elem_type == TensorProto.FLOAT16 else None
        if scale is not None:
            factor, scaled = f"attention.{number}.factor", f"attention.{number}.queries"
            dequantised, own = scales.get(node.input[0], (None, 1.0))
            model.graph.initializer.append(numpy_helper.from_array(np.array(scale * own, dtype=np.float16), factor))
            if dequantised is not None:
                dequantised.input[1] = factor
            else:
                nodes.append(helper.make_node("Mul", [node.input[0], factor], [scaled]))
                node.input[0] = scaled
            others = [attribute for attribute in node.attribute if attribute.name != "scale"]
            del node.attribute[:]
            node.attribute.extend([*others, helper.make_attribute("scale", 1.0)])
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _scales_of_8_bits(model: ModelProto) -> dict[str, tuple[NodeProto, float]]:
    """Return, by the tensor that it gives to one node alone, each DequantizeLinear with one scale, and that scale."""
    from onnx import numpy_helper

    users = Counter(name for node in model.graph.node for name in node.input)
    single = {tensor.name: tensor for tensor in model.graph.initializer if not tensor.dims}
    return {
        node.output[0]: (node, float(numpy_helper.to_array(single[node.input[1]])))
        for node in model.graph.node
        if node.op_type == "DequantizeLinear" and node.input[1] in single and users[node.output[0]] == 1
    }


def _scale(attention: NodeProto, queries: TypeProto.Tensor) -> float | None:
    """Return what an attention's scores are multiplied by, None where that is not known."""
    named = next((attribute.f for attribute in attention.attribute if attribute.name == "scale"), None)
    size = queries.shape.dim[-1].dim_value if len(queries.shape.dim) == 4 else 0
    return named or (size**-0.5 if size else None)


def separate_skips(model: ModelProto) -> None:
    """Let each concatenation of channels read a copy of what is used elsewhere too, in a graph that is then fused.

    A compiler may write a tensor straight into the place that it has in a later concatenation, and read it from there,
    strided, wherever else it is used: a UNet's skip connections are added to inside their blocks. A release that adds
    such a view wrongly is known. The copy is a product with a one that depends on an input, so that no compiler can
    leave it out; it changes no number.
    """
    from onnx import helper, numpy_helper

    one, graph = "skips.one", model.graph
    users = Counter(name for node in graph.node for name in node.input)
    nodes: list[NodeProto] = []
    for node in graph.node:
        joins = node.op_type == "Concat" and any(
            attribute.name == "axis" and attribute.i == 1 for attribute in node.attribute
        )
        for place, name in enumerate(node.input if joins and len(node.input) == 2 else ()):
            if users[name] > 1:
                copy = f"skips.{name}"
                nodes.append(helper.make_node("CastLike", [one, name], [f"{copy}.one"]))
                nodes.append(helper.make_node("Mul", [name, f"{copy}.one"], [copy]))
                node.input[place] = copy
        nodes.append(node)
    for name, value in {"skips.first": [0], "skips.unit": [1]}.items():
        graph.initializer.append(numpy_helper.from_array(np.array(value, dtype=np.int64), name))
    del graph.node[:]
    # What a model row belongs to is 0 or more, which no compiler knows: the lesser of it plus one, and of one.
    graph.node.extend(
        [
            helper.make_node("Gather", ["picture_of_row", "skips.first"], ["skips.picture"]),
            helper.make_node("Add", ["skips.picture", "skips.unit"], ["skips.next"]),
            helper.make_node("Min", ["skips.next", "skips.unit"], [one]),
            *nodes,
        ]
    )


def on_host(model: ModelProto, role: Role) -> ModelProto:
    """Return the graph of a component around which NumPy computes the stages: `model`, changed."""
    if role in DECODERS:
        append_pixel_tail(model)
    append_embedding_input(model)
    return model
