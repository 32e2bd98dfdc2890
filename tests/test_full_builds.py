"""Full-size denoisers of SD 1.5 and SDXL become TensorRT-RTX engines on a machine with no GPU.

    pytest -m slow -s tests/test_full_builds.py -k sd15

The graphs are those that an fp16 export gives, their weights random: the compiler's time and memory need no trained
ones. Each is compiled in a process of its own, whose time and peak memory are printed as JSON.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
import torch

from latentrt.engines.build_options import BuildOptions, Profile
from latentrt.engines.errors import EngineError
from latentrt.engines.graphs.denoise_stage import fuse_stage
from latentrt.engines.graphs.edits import load_graph
from latentrt.engines.progress import silent
from latentrt.engines.spec import TensorSpec
from latentrt.engines.tensorrt import build as tensorrt
from latentrt.engines.tensorrt import library as trt_library
from latentrt.engines.tensorrt.compile import compile_graph
from latentrt.export.graphs import half_precision as precision
from latentrt.export.graphs import trace as graphs
from latentrt.export.graphs.types import infer_types
from latentrt.runtime.bench.machine import describe
from tests.test_full_graphs import CONFIGS, LATENTS, specs, weightless

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

FACTOR = 8
LEAST = 1024  # smaller tensors are constants of the graph, and stay what they are


def write_graph(name: str, path: Path) -> int:
    """Write a denoiser's fp16 graph with random weights beside it; return how many bytes they are."""
    sizes = {"batch": 2, "steps": 1, "tokens": 77, "latent_height": 16, "latent_width": 24}
    takes, gives = specs(name, "float32"), [TensorSpec(name="out_sample", dtype="float32", shape=LATENTS)]
    inputs = {s.name: torch.zeros([sizes[a] if isinstance(a, str) else a for a in s.shape]) for s in takes}
    axes = {"latent_height": (16, 1), "latent_width": (16, 1)}
    model = graphs.trace_graph(weightless(CONFIGS[name]), inputs, takes, gives, axes=axes)
    infer_types(model)
    half = [TensorSpec(name="out_sample", dtype="float16", shape=LATENTS)]
    precision.narrow(model, [], takes=specs(name, "float16"), gives=half)
    offset = sow(model, path.with_suffix(".data"))
    ir.save(model, path)
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


def compile_denoiser(graph: Path, side: int) -> dict[str, Any]:
    """Compile the fused stage of one guided picture, alone in its process."""
    library = trt_library.require("tensorrt-rtx")
    start = time.perf_counter()
    model = fuse_stage(load_graph(graph))
    edited = graph.with_name("fused.onnx")
    onnx.save(model, str(edited))
    profile = Profile(width=FACTOR * side, height=FACTOR * side, pictures=1, rows=2, tokens=77)
    spec = tensorrt.spec_of("unet", model, [profile], factor=FACTOR)
    options = BuildOptions(compute_capability="8.9")
    plan = compile_graph(library, edited, spec, options, tf32=False, device=None, what="build unet", report=silent)
    return {
        "profile": str(profile),
        "library": f"tensorrt-rtx {library.__version__}",
        "seconds": round(time.perf_counter() - start, 1),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "engine_bytes": plan.nbytes,
    }


@pytest.mark.parametrize(("name", "side"), [("sd15", 64), ("sdxl", 128)])
def test_a_full_size_denoiser_is_compiled_without_a_gpu(name: str, side: int, tmp_path: Path) -> None:
    try:
        trt_library.require("tensorrt-rtx")
    except EngineError as error:
        pytest.skip(str(error))
    graph = tmp_path / "model.onnx"
    weights = write_graph(name, graph)
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        figures = pool.apply(compile_denoiser, (graph, side))
    command = f"pytest -m slow -s tests/test_full_builds.py -k {name}"
    result = {"machine": describe(), "command": command, "model": name, "weights_bytes": weights, **figures}
    print(json.dumps(result, indent=1))
    assert weights > {"sd15": 1.7, "sdxl": 5.1}[name] * 1e9
    assert figures["engine_bytes"] > 0.99 * weights  # the weights are in it, once
    assert figures["engine_bytes"] < 1.1 * weights
