"""Full-size denoisers of SD 1.5, SDXL and SD 3.5 medium become TensorRT-RTX engines on a machine with no GPU.

    pytest -m slow -s tests/test_full_builds.py -k '[sd35-medium]'

The graphs are those that an fp16 export gives, their weights random: the compiler's time and memory need no trained
ones. `sd15-images` and `sdxl-images` attend to the image of an IP-Adapter Plus too. Each is compiled in a process of
its own, whose time and peak memory are printed as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch
from torch import nn

from latentrt.engines.build_options import BuildOptions, Profile
from latentrt.engines.errors import EngineError
from latentrt.engines.graphs.denoise_stage import fuse_stage
from latentrt.engines.graphs.edits import load_graph
from latentrt.engines.progress import silent
from latentrt.engines.spec import TensorSpec
from latentrt.engines.tensor_names import IMAGE_SCALE, IMAGE_TOKENS, SKIP_LAYERS
from latentrt.engines.tensorrt import build as tensorrt
from latentrt.engines.tensorrt import library as trt_library
from latentrt.engines.tensorrt.compile import compile_graph
from latentrt.export.configs.denoisers import MEDIUM as SKIPPED
from latentrt.export.graphs import half_precision as precision
from latentrt.export.graphs import trace as graphs
from latentrt.export.graphs.types import infer_types
from latentrt.export.networks.image_prompts import CROSS, ImageAttention
from latentrt.export.networks.modules import wrap_denoiser
from latentrt.export.networks.transformer import wrap_transformer
from latentrt.runtime.bench.machine import describe
from tests.test_full_graphs import CONFIGS, specs, weightless, without_numbers

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import random_sd3

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

FACTOR = 8
SHOWN, LAYERS = 16, {"sd15": 16, "sdxl": 70}  # tokens of an IP-Adapter Plus, and the layers that attend to them
LEAST = 1024  # smaller tensors are constants of the graph, and stay what they are


class Model(NamedTuple):
    """A denoiser at full size.

    takes: its inputs, whose numbers are of a type; least: gigabytes that it weighs; sides: see `trace_graph`
    """

    make: Callable[[list[str]], nn.Module]
    takes: Callable[[Any], list[TensorSpec]]
    side: int
    least: float
    tokens: int = 77
    sides: tuple[int, int] = (16, 1)


def unet(model: str, names: list[str], *, images: bool = False) -> nn.Module:
    return weightless(CONFIGS[model], partial(with_images, names) if images else wrap_denoiser)


def with_images(names: list[str], unet: Any) -> nn.Module:
    """Wrap a UNet that attends to the image of one IP-Adapter Plus. names: of its inputs"""
    layers = [name for name in unet.attn_processors if name.endswith(CROSS)]
    made = {}
    for number, name in enumerate(layers):
        width = unet.get_submodule(name.removesuffix(".processor")).inner_dim
        weight = torch.empty(width, unet.config.cross_attention_dim)
        made[name] = ImageAttention([weight], [weight], [SHOWN], number)
    unet.set_attn_processor({**unet.attn_processors, **made})
    return wrap_denoiser(unet, names)


def unet_takes(model: str, real: Any, *, images: bool = False) -> list[TensorSpec]:
    width = CONFIGS[model]["cross_attention_dim"]
    shapes = {IMAGE_TOKENS: ("batch", SHOWN, width), IMAGE_SCALE: ("batch", 1, LAYERS[model])}
    further = [TensorSpec(name=name, dtype=real, shape=shape) for name, shape in shapes.items()]
    return [*specs(model, real), *(further if images else [])]


def medium(names: list[str]) -> nn.Module:
    """Return the transformer of 3.5 medium, whose published blocks may be skipped, with its own table of positions."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        model = SD3Transformer2DModel(**{**random_sd3.TRANSFORMER, **random_sd3.MEDIUM})
    model.pos_embed.register_buffer("pos_embed", torch.from_numpy(random_sd3.positions(model)), persistent=False)
    return without_numbers(wrap_transformer(model, names, skip_layers=SKIPPED))


def medium_takes(real: Any) -> list[TensorSpec]:
    rows: list[tuple[str, Any, tuple[int | str, ...]]] = [
        ("sample", real, ("batch", 16, "latent_height", "latent_width")),
        ("timestep", "float32", ("steps",)),
        ("encoder_hidden_states", real, ("batch", "tokens", 4096)),
        ("pooled_projections", real, ("batch", 2048)),
        (SKIP_LAYERS, "float32", ("batch",)),
    ]
    return [TensorSpec(name=name, dtype=dtype, shape=shape) for name, dtype, shape in rows]


MODELS = {
    **{
        f"{name}{'-images' if images else ''}": Model(
            make=partial(unet, name, images=images), takes=partial(unet_takes, name, images=images), side=side, least=gb
        )
        for name, side, gb in (("sd15", 64, 1.7), ("sdxl", 128, 5.1))
        for images in (False, True)
    },
    "sd35-medium": Model(make=medium, takes=medium_takes, side=128, least=4.4, tokens=77 + 256, sides=(4, 2)),
}


def write_graph(model: Model, path: Path) -> int:
    """Write a denoiser's fp16 graph with random weights beside it; return how many bytes they are."""
    sizes = {"batch": 2, "steps": 1, "tokens": model.tokens, "latent_height": 16, "latent_width": 24}
    takes, narrow = model.takes("float32"), model.takes("float16")
    out = {
        spec.dtype: [TensorSpec(name="out_sample", dtype=spec.dtype, shape=spec.shape)]
        for spec in (takes[0], narrow[0])
    }
    inputs = {s.name: torch.zeros([sizes[a] if isinstance(a, str) else a for a in s.shape]) for s in takes}
    axes = {"latent_height": model.sides, "latent_width": model.sides}
    module = model.make([spec.name for spec in takes])
    graph = graphs.trace_graph(module, inputs, takes, out["float32"], axes=axes)
    infer_types(graph)
    precision.narrow(graph, [], takes=narrow, gives=out["float16"])
    offset = sow(graph, path.with_suffix(".data"))
    ir.save(graph, path)
    return offset


def sow(model: ir.Model, file: Path) -> int:
    """Put random numbers in place of every large initializer, in a file; return its size."""
    generator, offset = np.random.default_rng(0), 0
    with file.open("wb") as data:
        for value in model.graph.initializers.values():
            assert value.const_value is not None
            count = int(np.prod(value.const_value.shape.numpy()))
            if count < LEAST:
                continue
            dtype = value.const_value.dtype
            numbers = generator.standard_normal(count, dtype=np.float32) * np.float32(0.02)
            size = data.write(numbers.astype(dtype.numpy()).tobytes())
            value.const_value = ir.ExternalTensor(
                file.name, offset, size, dtype, shape=value.const_value.shape, name=value.name, base_dir=file.parent
            )
            offset += size
    return offset


def compile_denoiser(graph: Path, side: int, tokens: int) -> dict[str, Any]:
    """Compile the fused stage of one guided picture, alone in its process."""
    library = trt_library.require("tensorrt-rtx")
    start = time.perf_counter()
    model = fuse_stage(load_graph(graph))
    edited = graph.with_name("fused.onnx")
    onnx.save(model, str(edited))
    profile = Profile(width=FACTOR * side, height=FACTOR * side, pictures=1, rows=2, tokens=tokens)
    spec = tensorrt.spec_of("denoiser", model, [profile], factor=FACTOR)
    options = BuildOptions(compute_capability="8.9")
    plan = compile_graph(library, edited, spec, options, tf32=False, device=None, what="build", report=silent)
    return {
        "profile": str(profile),
        "library": f"tensorrt-rtx {library.__version__}",
        "seconds": round(time.perf_counter() - start, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "engine_bytes": plan.nbytes,
    }


@pytest.mark.parametrize("name", MODELS)
def test_a_full_size_denoiser_is_compiled_without_a_gpu(name: str, tmp_path: Path) -> None:
    try:
        trt_library.require("tensorrt-rtx")
    except EngineError as error:
        pytest.skip(str(error))
    model, graph = MODELS[name], tmp_path / "model.onnx"
    weights = write_graph(model, graph)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        figures = pool.apply(compile_denoiser, (graph, model.side, model.tokens))
    command = f"pytest -m slow -s tests/test_full_builds.py -k '[{name}]'"
    result = {"machine": describe(), "command": command, "model": name, "weights_bytes": weights, **figures}
    print(json.dumps(result, indent=1))
    assert weights > model.least * 1e9
    assert figures["engine_bytes"] > 0.99 * weights  # the weights are in it, once
    assert figures["engine_bytes"] < 1.1 * weights
