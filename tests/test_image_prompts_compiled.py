"""A UNet that attends to images in fp16, and as TensorRT-RTX compiles it: two attentions share their queries there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from msgspec.structs import replace

from latentrt import ImagePrompt, Pipeline
from latentrt.engines.bundle.files import Bundle
from latentrt.engines.spec import TensorSpec
from latentrt.engines.verify.verify import verify
from latentrt.export.export import export_checkpoint
from latentrt.export.graphs.golden import TOLERANCES, load_golden
from latentrt.export.graphs.half_precision import narrow_graph
from latentrt.export.options import CheckpointOptions, ControlNetOption
from tests.conftest import Controlled
from tests.rtx import compile_alone
from tests.test_controlnets import hint
from tests.test_families import psnr
from tests.test_image_prompts import ours

Shown = Callable[[str], Controlled]
NEAR = 35  # dB, as other bundles in fp16 on the CPU (tests/test_parity.py)


@pytest.fixture(scope="module")
def half(shown: Shown, workshop: Path) -> Path:
    """The same checkpoint with two of its adapters, in fp16."""
    made = shown("sd1")
    adapters = tuple(ControlNetOption(name=name, path=str(made.networks[name])) for name in ("plain", "plus"))
    options = CheckpointOptions(ip_adapters=adapters)
    export_checkpoint(str(made.checkpoint), workshop / "sd1-shown-fp16", precision="fp16", options=options)
    return workshop / "sd1-shown-fp16"


@pytest.mark.slow
def test_a_bundle_in_fp16_draws_nearly_the_picture_of_fp32(shown: Shown, half: Path) -> None:
    assert all(row.ok for row in verify(Bundle.open(half), backend="cpu"))
    asked = [ImagePrompt(name="plain", image=hint(0), scale=0.6), ImagePrompt(name="plus", image=hint(1), scale=0.4)]
    with Pipeline.load(shown("sd1").bundle, "cpu", threads=1) as wide, Pipeline.load(half, "cpu", threads=1) as narrow:
        assert psnr(ours(narrow, *asked), ours(wide, *asked)) >= NEAR
        assert np.array_equal(ours(narrow), ours(narrow, ImagePrompt(name="plus", image=hint(1), scale=0.0)))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["image_encoder", "image_projection_plain", "image_projection_plus", "unet"])
def test_tensorrt_rtx_compiles_all_of_it_in_fp16(half: Path, tmp_path: Path, name: str) -> None:
    file, _ = compile_alone(half, name, tmp_path, size=(32, 32))
    component = Bundle.open(half).manifest.components[name]
    assert file.stat().st_size > component.weights_bytes and not component.float32_layers


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


def test_no_two_attentions_share_their_queries(shown: Shown) -> None:
    bundle = Bundle.open(shown("sd1").bundle)
    unet = bundle.manifest.components[bundle.manifest.denoiser]
    graph = onnx.load(bundle.path(unet.graph)).graph
    queries = [node.input[0] for node in graph.node if node.op_type == "Attention"]
    assert queries and len(set(queries)) == len(queries)
    assert any(tensor.name == "image_tokens" for tensor in unet.inputs)


def test_tensorrt_rtx_compiles_the_stage(shown: Shown, tmp_path: Path) -> None:
    file, spec = compile_alone(shown("sd1").bundle, "unet", tmp_path, size=(32, 32))
    shapes = {tensor.name: tensor.shape for tensor in spec.inputs}
    assert shapes["image_tokens"] == ("rows", 27, 32) and shapes["image_scale"] == ("rows", 3, 4)
    assert file.stat().st_size > 1_000_000
