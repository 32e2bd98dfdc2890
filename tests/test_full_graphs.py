"""The UNets of SD 1.5, SD 2.1 and SDXL at full size: attention, norms and GELU are single nodes, and fp16 as a whole.

Their weights are single numbers that take the shape of the real ones, so a graph of 2.6 billion weights costs no more
than its nodes. Nothing is computed.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import pytest
import torch
from torch import nn

from latentrt.engines.spec import TensorSpec
from latentrt.export.graphs import half_precision as precision
from latentrt.export.graphs import trace as graphs
from latentrt.export.graphs.types import FLOAT, HALF, infer_types
from latentrt.export.networks.modules import wrap_denoiser

LATENTS = ("batch", 4, "latent_height", "latent_width")
# From the unet/config.json of runwayml/stable-diffusion-v1-5, stabilityai/stable-diffusion-2-1 and
# stabilityai/stable-diffusion-xl-base-1.0.
CONFIGS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sd21": {
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    "sdxl": {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "cross_attention_dim": 2048,
        "attention_head_dim": [5, 10, 20],
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
WHOLE = {
    "sd15": {"Attention": 32, "GroupNormalization": 61, "LayerNormalization": 48, "Gelu": 16},
    "sd21": {"Attention": 32, "GroupNormalization": 61, "LayerNormalization": 48, "Gelu": 16},
    "sdxl": {"Attention": 140, "GroupNormalization": 46, "LayerNormalization": 210, "Gelu": 70},
}
DECOMPOSED = {"Softmax", "InstanceNormalization", "ReduceMean", "Erf", "Tanh"}


def weightless(config: dict[str, Any], wrap: Callable[[Any], nn.Module] = wrap_denoiser) -> nn.Module:
    """Return a UNet whose every weight is one number in another shape."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        module = wrap(UNet2DConditionModel(**config))
    assert not list(module.buffers())
    return without_numbers(module)


def without_numbers(module: nn.Module) -> nn.Module:
    """Return a network with one number in place of each weight."""
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            one = torch.full((), 0.01).expand(weight.shape)
            part.register_parameter(name, nn.Parameter(one, requires_grad=False))
    return module.eval()


def specs(model: str, real: Any) -> list[TensorSpec]:
    width = CONFIGS[model]["cross_attention_dim"]
    rows: list[tuple[str, Any, tuple[int | str, ...]]] = [
        ("sample", real, LATENTS),
        ("timestep", "float32", ("steps",)),
        ("encoder_hidden_states", real, ("batch", "tokens", width)),
    ]
    if model == "sdxl":
        rows += [("text_embeds", real, ("batch", 1280)), ("time_ids", "float32", ("batch", 6))]
    return [TensorSpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in rows]


# SDXL's 70 transformer blocks take torch two minutes to trace, the others half a minute each.
SLOW = pytest.param("sdxl", marks=[pytest.mark.slow, pytest.mark.timeout(1800)])


@pytest.fixture(scope="module", params=["sd15", "sd21", SLOW])
def narrowed(request: pytest.FixtureRequest) -> Iterator[tuple[str, ir.Model]]:
    """A full-size UNet's graph in fp16, with the model's name."""
    name = request.param
    sizes = {"batch": 2, "steps": 1, "tokens": 77, "latent_height": 16, "latent_width": 24}
    takes, gives = specs(name, "float32"), [TensorSpec(name="out_sample", dtype="float32", shape=LATENTS)]
    inputs = {s.name: torch.zeros([sizes[a] if isinstance(a, str) else a for a in s.shape]) for s in takes}
    module = weightless(CONFIGS[name])
    axes = {"latent_height": (16, 1), "latent_width": (16, 1)}
    model = graphs.trace_graph(module, inputs, takes, gives, axes=axes)
    infer_types(model)
    half = [TensorSpec(name="out_sample", dtype="float16", shape=LATENTS)]
    precision.narrow(model, [], takes=specs(name, "float16"), gives=half)
    yield name, model


def test_attention_norms_and_gelu_are_single_nodes(narrowed: tuple[str, ir.Model]) -> None:
    name, model = narrowed
    counts = Counter(node.op_type for node in model.graph)
    assert {operator: counts[operator] for operator in WHOLE[name]} == WHOLE[name]
    assert not DECOMPOSED & set(counts)


def test_the_only_casts_are_those_of_the_sinusoids(narrowed: tuple[str, ir.Model]) -> None:
    """One for the timestep, and one for SDXL's sizes of pictures."""
    name, model = narrowed
    casts = [node for node in model.graph if node.op_type == "Cast"]
    assert len(casts) == {"sd15": 1, "sd21": 1, "sdxl": 2}[name]


def test_queries_keys_and_values_come_from_their_layers_in_float16(narrowed: tuple[str, ir.Model]) -> None:
    _, model = narrowed
    for attention in (node for node in model.graph if node.op_type == "Attention"):
        assert "scale" not in attention.attributes  # ONNX then scales both factors before their product
        for value in attention.inputs[:3]:
            assert value is not None
            path = list(_back_to_product(value))
            assert "Cast" not in path and path[-1] == "MatMul", path
            assert value.dtype == HALF


def _back_to_product(value: ir.Value | None) -> Iterator[str]:
    """Yield the operators between a matrix product and a value, the product last."""
    while value is not None and (node := value.producer()) is not None:
        yield node.op_type
        if node.op_type == "MatMul":
            return
        value = node.inputs[0]


def test_all_weights_are_float16(narrowed: tuple[str, ir.Model]) -> None:
    _, model = narrowed
    wide = {name: value for name, value in model.graph.initializers.items() if value.dtype == FLOAT}
    users = {node.op_type for value in wide.values() for node, _ in value.uses()}
    assert users <= {"Mul", "Resize"}  # the frequencies of the sinusoids, the scales of upsamplers


def test_nodes_are_named_for_their_modules(narrowed: tuple[str, ir.Model]) -> None:
    _, model = narrowed
    names = [node.name for node in model.graph]
    assert len(set(names)) == len(names)
    assert {"conv_in/Conv", "mid_block.attentions.0.transformer_blocks.0.attn2/Attention"} <= set(names)
