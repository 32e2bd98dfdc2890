"""A UNet that attends to images as TensorRT-RTX compiles it, which crashes where two attentions share their queries."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import onnx
import pytest
from msgspec.structs import replace

from latentrt.engines.build_options import BuildOptions
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.errors import EngineError
from latentrt.engines.progress import silent
from latentrt.engines.spec import TensorSpec
from latentrt.engines.tensorrt import build as builder
from latentrt.engines.tensorrt.compile import compile_graph
from latentrt.engines.tensorrt.library import require
from latentrt.export.graphs.golden import TOLERANCES, load_golden
from latentrt.export.graphs.half_precision import narrow_graph
from tests.conftest import Controlled

Shown = Callable[[str], Controlled]


def test_no_two_attentions_share_their_queries(shown: Shown) -> None:
    bundle = Bundle.open(shown("sd1").bundle)
    unet = bundle.manifest.components[bundle.manifest.denoiser]
    graph = onnx.load(bundle.path(unet.graph)).graph
    queries = [node.input[0] for node in graph.node if node.op_type == "Attention"]
    assert queries and len(set(queries)) == len(queries)
    assert any(tensor.name == "image_tokens" for tensor in unet.inputs)


def test_tensorrt_rtx_compiles_the_stage(shown: Shown, tmp_path: Path) -> None:
    try:
        library = require("tensorrt-rtx")
    except EngineError as error:
        pytest.skip(str(error))
    bundle = Bundle.open(shown("sd1").bundle)
    options = BuildOptions(sizes=((32, 32),), compute_capability="8.9", optimization_level=0)
    compiling = partial(compile_graph, library, device=None)
    denoiser = bundle.manifest.denoiser
    file, spec = builder._build_one(compiling, bundle, denoiser, tmp_path, "tensorrt-rtx", options, silent)
    shapes = {tensor.name: tensor.shape for tensor in spec.inputs}
    assert shapes["image_tokens"] == ("rows", 27, 32) and shapes["image_scale"] == ("rows", 3, 4)
    assert (tmp_path / file).stat().st_size > 1_000_000


@pytest.mark.parametrize("name", ["unet", "image_encoder", "image_projection_plus"])
def test_what_reads_images_fits_float16(shown: Shown, tmp_path: Path, name: str) -> None:
    bundle = Bundle.open(shown("sd1").bundle)
    component = bundle.manifest.components[name]

    def half(specs: tuple[TensorSpec, ...]) -> tuple[TensorSpec, ...]:
        return tuple(replace(spec, dtype="float16") if spec.name != "timestep" else spec for spec in specs)

    narrowed = narrow_graph(
        bundle.path(component.graph),
        tmp_path / "model.onnx",
        [load_golden(bundle.path(component.golden))],
        component=name,
        takes=half(component.inputs),
        gives=half(component.outputs),
    )
    assert narrowed.error <= TOLERANCES["fp16"] and not narrowed.float32_layers
