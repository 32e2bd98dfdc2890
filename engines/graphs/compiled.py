"""What a device compiles of a component: its graph with what a picture needs before and behind it, by its role."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from latentrt.engines.bundle.manifest import LatentSpec, Role
from latentrt.engines.graphs.controlnet_stage import fuse_control
from latentrt.engines.graphs.denoise_stage import fuse_stage
from latentrt.engines.graphs.edits import append_embedding_input, append_pixel_tail, prepend_state_head
from latentrt.engines.tensor_names import STATE_ROWS

if TYPE_CHECKING:
    from onnx import ModelProto

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

    An `Attention` that names no scale is given 1 / sqrt(head size) by TensorRT's parser as a factor of queries and of
    keys, each computed in fp16 by three operations: the scores are up to 6e-4 too large. The one factor of the queries
    errs by 2e-4 at most, and not at all with heads of 64, as SDXL's are (tests/test_attention_scale.py). Heads whose
    size the graph does not tell are left as they are.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    inferred = onnx.shape_inference.infer_shapes(model).graph.value_info
    known = {info.name: info.type.tensor_type for info in inferred}
    nodes = []
    for number, node in enumerate(model.graph.node):
        tensor = known.get(node.input[0]) if node.op_type == "Attention" else None
        size = tensor.shape.dim[-1].dim_value if tensor is not None and len(tensor.shape.dim) == 4 else 0
        scaled = any(attribute.name == "scale" for attribute in node.attribute)
        if size and not scaled and tensor is not None and tensor.elem_type == TensorProto.FLOAT16:
            factor, queries = f"attention.{number}.factor", f"attention.{number}.queries"
            model.graph.initializer.append(numpy_helper.from_array(np.array(size**-0.5, dtype=np.float16), factor))
            nodes.append(helper.make_node("Mul", [node.input[0], factor], [queries]))
            node.input[0] = queries
            node.attribute.append(helper.make_attribute("scale", 1.0))
        nodes.append(node)
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def on_host(model: ModelProto, role: Role) -> ModelProto:
    """Return the graph of a component around which NumPy computes the stages: `model`, changed."""
    if role in DECODERS:
        append_pixel_tail(model)
    append_embedding_input(model)
    return model
