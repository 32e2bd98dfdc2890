"""Edits of graphs at build time: they compute what the graph with NumPy around it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from latentrt.engines.bundle.files import Bundle
from latentrt.engines.compare import to_pixels
from latentrt.engines.graphs import edits as graphs

ROWS = 3
# Over the output's range. fp16: ONNX Runtime leaves out a cast to float16 before a layer that it computes in float32.
CLOSE = {"fp32": 1e-5, "fp16": 2e-3}


def open_session(model: onnx.ModelProto) -> Any:
    return onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])


def draw_state(bundle: Bundle, *, height: int, width: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    shape = (2, ROWS, bundle.manifest.latents.channels, height, width)
    return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)


@pytest.mark.parametrize("name", ["sd1_bundle", "sd2_bundle", "sd1_half_bundle"])
def test_a_decoder_with_a_state_head_decodes_the_states_first_row(name: str, request: pytest.FixtureRequest) -> None:
    bundle = Bundle.open(request.getfixturevalue(name))
    path = bundle.path(bundle.manifest.components["vae_decoder"].graph)
    canonical, headed = onnx.load(str(path)), onnx.load(str(path))
    space = bundle.manifest.latents
    graphs.prepend_state_head(headed, ROWS, space)
    onnx.checker.check_model(headed)
    state = draw_state(bundle, height=6, width=10)
    latents = state[:, 0] / np.float32(space.scaling_factor)
    dtype = np.float16 if bundle.manifest.precision == "fp16" else np.float32
    (expected,) = open_session(canonical).run(None, {"latent_sample": latents.astype(dtype)})
    (found,) = open_session(headed).run(None, {"state": state})
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=0, atol=CLOSE[bundle.manifest.precision] * np.abs(expected).max())


def test_head_and_tail_together_go_from_state_to_pixels(sd1_bundle: Path) -> None:
    bundle = Bundle.open(sd1_bundle)
    path = bundle.path(bundle.manifest.components["vae_decoder"].graph)
    model, canonical = onnx.load(str(path)), open_session(onnx.load(str(path)))
    graphs.append_pixel_tail(model)
    graphs.prepend_state_head(model, ROWS, bundle.manifest.latents)
    state = draw_state(bundle, height=8, width=8)
    session = open_session(model)
    pixels, squares = session.run(None, {"state": state})
    latents = state[:, 0] / np.float32(bundle.manifest.latents.scaling_factor)
    expected = to_pixels(canonical.run(None, {"latent_sample": latents})[0])
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 1  # a value may lie on a rounding's edge
    axes = [session.get_inputs()[0].shape, session.get_outputs()[0].shape]
    assert [shape[0] for shape in axes] == ["pictures", "pictures"] and axes[0][1] == ROWS
    assert squares.dtype == np.float32 and np.isfinite(squares).all()
    np.testing.assert_allclose(squares[:, 0], np.square(latents).sum(axis=(1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e20])
def test_a_decoder_tells_which_pictures_latents_are_not_finite(sd1_bundle: Path, number: float) -> None:
    """Pixels do not show it: in uint8 they are as good as any. The picture beside it is what it was."""
    bundle = Bundle.open(sd1_bundle)
    model = onnx.load(str(bundle.path(bundle.manifest.components["vae_decoder"].graph)))
    graphs.append_pixel_tail(model)
    graphs.prepend_state_head(model, ROWS, bundle.manifest.latents)
    session, state = open_session(model), draw_state(bundle, height=8, width=8)
    expected, _ = session.run(None, {"state": state})
    state[1, 0, 2, 3, 3] = number
    pixels, squares = session.run(None, {"state": state})
    assert np.isfinite(squares[0]).all() and not np.isfinite(squares[1, 0])
    np.testing.assert_array_equal(pixels[0], expected[0])


@pytest.mark.parametrize("factor", [3e38, np.float32(np.inf)])
def test_a_decoder_tells_of_pixels_that_are_not_finite(factor: float) -> None:
    """Finite latents that overflow on the way, as a VAE's in float16 do."""
    axes = ["batch", 3, "height", "width"]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, axes) for name in ("latent_sample", "sample")]
    weight = numpy_helper.from_array(np.array(factor, dtype=np.float32), "weight")
    graph = helper.make_graph(
        [helper.make_node("Mul", ["latent_sample", "weight"], ["sample"])], "vae", info[:1], info[1:], [weight]
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    graphs.append_pixel_tail(model)
    onnx.checker.check_model(model)
    latents = np.zeros((2, 3, 4, 4), dtype=np.float32)
    latents[1] = 5
    _, squares = open_session(model).run(None, {"latent_sample": latents})
    assert np.isfinite(squares[:, 0]).all()
    assert not np.isfinite(squares[1, 1])
