"""Edits of graphs at build time: they compute what the graph with NumPy around it computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from latentrt.engines import graphs
from latentrt.engines.bundle import Bundle
from latentrt.engines.verification import to_pixels

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
    graphs.prepend_state_head(model, ROWS, bundle.manifest.latents)
    graphs.append_pixel_tail(model)
    state = draw_state(bundle, height=8, width=8)
    session = open_session(model)
    (pixels,) = session.run(None, {"state": state})
    latents = state[:, 0] / np.float32(bundle.manifest.latents.scaling_factor)
    expected = to_pixels(canonical.run(None, {"latent_sample": latents})[0])
    assert np.abs(pixels.astype(int) - expected.astype(int)).max() <= 1  # a value may lie on a rounding's edge
    axes = [session.get_inputs()[0].shape, session.get_outputs()[0].shape]
    assert [shape[0] for shape in axes] == ["pictures", "pictures"] and axes[0][1] == ROWS
